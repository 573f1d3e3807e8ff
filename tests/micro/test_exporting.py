"""The folder for microcontrollers: what is in it, what is refused, and sources that compile."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest

from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.lifting.flatbuffer import read_graph
from dwindle.micro import export_micro
from dwindle.micro.running import run_micro
from dwindle.micro.sources import FILES, arena_with_margin
from dwindle.micro.verifying import agreement, run_litert

HASH = """
#include <cstdio>
#include "model.h"
int main() {
  if (reinterpret_cast<uintptr_t>(kModelData) % 16 != 0) return 1;
  return fwrite(kModelData, 1, kModelBytes, stdout) == kModelBytes ? 0 : 2;
}
"""


@pytest.fixture(scope="module")
def exported(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro") / "digits"
    return export_micro(trained, folder, data=digits[0][0][:200], verify_samples=32)


def test_the_file_is_full_integer_small_and_agrees(exported, digits):
    graph = read_graph(exported.file.read_bytes())
    assert {tensor.dtype for tensor in (*graph.inputs, *graph.outputs)} == {np.int8}
    assert all(tensor.dtype in (np.int8, np.int32) for tensor in graph.tensors)
    assert exported.verification is not None
    assert exported.verification.passed
    assert [found.passed for found in exported.agreements] == [True, True]
    assert exported.agreements[0].identical == 1
    assert exported.agreements[0].values == 320
    assert exported.size_bytes == exported.file.stat().st_size < exported.plain_bytes
    assert exported.arena_bytes > exported.persistent_bytes > 0


def test_the_arena_is_what_print_allocations_says(exported):
    from dwindle.measuring.memory import measure_memory

    assert measure_memory(exported.file).arena_bytes == exported.arena_bytes


def test_the_arena_that_is_needed_is_the_smallest(exported):
    from tflite_micro import runtime

    content = exported.file.read_bytes()
    runtime.Interpreter.from_bytes(content, arena_size=exported.needed_bytes)
    with pytest.raises(RuntimeError):
        runtime.Interpreter.from_bytes(content, arena_size=exported.needed_bytes - 16)
    assert exported.needed_bytes >= exported.arena_bytes - 16


def test_the_folder_holds_sources(exported):
    names = {path.name for path in exported.folder.iterdir()}
    assert names == {*FILES, "digits.ino"}
    main = (exported.folder / "main.cc").read_text()
    calls = re.findall(r"resolver\.(Add\w+)\(\)", main)
    assert calls == ["AddConv2D", "AddFullyConnected", "AddMaxPool2D", "AddReshape", "AddSoftmax"]
    assert "MicroMutableOpResolver<5>" in main
    header = (exported.folder / "model.h").read_text()
    assert f"kArenaBytes = {arena_with_margin(exported.needed_bytes)};" in header
    assert arena_with_margin(exported.needed_bytes) >= exported.needed_bytes * 1.1
    graph = read_graph(exported.file.read_bytes())
    scale = re.search(r"kInput0Scale = (\S+)f;", header).group(1)
    assert np.float32(scale) == graph.inputs[0].scale[0]
    readme = (exported.folder / "README.md").read_text()
    assert f"{exported.size_bytes:,}" in readme
    assert f"{exported.arena_bytes:,}" in readme


def test_model_cc_compiles_to_the_bytes_of_the_file(exported, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "dump.cc").write_text(HASH)
    sources = [str(tmp_path / "dump.cc"), str(exported.folder / "model.cc")]
    strict = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = [compiler, *strict, "-I", str(exported.folder), *sources, "-o", str(tmp_path / "dump")]
    subprocess.run(command, check=True, capture_output=True)
    dumped = subprocess.run([str(tmp_path / "dump")], check=True, capture_output=True).stdout
    assert hashlib.sha256(dumped).hexdigest() == exported.sha256
    assert dumped == exported.file.read_bytes()


def test_the_sample_is_what_the_interpreter_gives(exported):
    text = (exported.folder / "sample.h").read_text()
    found = {
        name: bytes(int(value) for value in re.findall(r"\d+", body))
        for name, body in re.findall(r"kSample(\w+?0)\[\] = \{([^}]*)\}", text)
    }
    x = np.frombuffer(found["Input0"], np.int8).reshape(1, 28, 28, 1)
    y = run_micro(exported.file.read_bytes(), [x]).outputs[0]
    assert found["Output0"] == y.tobytes()
    assert y.argmax() == run_litert(exported.file.read_bytes(), [x])[0].argmax()


def test_a_file_is_exported_as_it_is(cnn_file, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(cnn_file.content)
    made = export_micro(path, tmp_path / "out", verify_samples=4)
    assert made.verification is None
    expected = run_litert(cnn_file.content, cnn_file.samples)[0]
    np.testing.assert_array_equal(run_litert(made.file.read_bytes(), cnn_file.samples)[0], expected)
    again = export_micro(path, tmp_path / "out", verify_samples=4)
    assert again.sha256 == made.sha256


def test_a_lacking_operator_is_named_and_nothing_is_written(tmp_path):
    layers = keras.layers
    model = keras.Sequential([keras.Input((4, 4, 4, 1)), layers.Conv3D(2, 2, name="volume"), layers.Flatten()])
    with pytest.raises(UnsupportedModelError, match=r"`CONV_3D` \(layer `volume`\)"):
        export_micro(model, tmp_path / "out", data=np.zeros((4, 4, 4, 4, 1), np.float32))
    assert not list(tmp_path.iterdir())


def test_a_type_that_a_kernel_refuses_is_named_with_its_layer(trained, digits, tmp_path):
    with pytest.raises(UnsupportedModelError, match="operator `CONV_2D` of layer `conv`, on float32, int8"):
        export_micro(trained, tmp_path / "out", scheme="int8-dynamic", data=digits[0][0][:8])
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_refused(cnn_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    path = tmp_path / "model.tflite"
    path.write_bytes(cnn_file.content)
    with pytest.raises(ConfigError, match=r"holds something other than an export.*`thesis.txt`"):
        export_micro(path, tmp_path / "mine")
    with pytest.raises(ConfigError, match="is a file"):
        export_micro(path, path)
    with pytest.raises(ConfigError, match=r"`scheme` is 'int8', but .* is a file that has its types"):
        export_micro(path, tmp_path / "out", scheme="int8")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_agreement_counts():
    a = np.zeros((1, 200), np.int8)
    b = a.copy()
    b[0, :3] = 1, -1, 5
    found = agreement("x", [a], [b])
    assert (found.identical, found.within, found.largest, found.passed) == (0.985, 0.995, 5.0, True)
    b[0, 3:6] = 2
    assert not agreement("x", [a], [b]).passed
    assert agreement("x", [np.int8([-128])], [np.int8([127])]).largest == 255
    assert not agreement("x", [np.float32([1, 2])], [np.float32([1, 2.001])]).passed
    assert agreement("x", [np.float32([1, 2])], [np.float32([1, 2.0001])]).passed
