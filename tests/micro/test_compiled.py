"""The program of an export, compiled against TensorFlow Lite Micro's sources where they are.

`DWINDLE_TFLM` names a tree as its create_tflm_tree.py makes it; where a libtflm.a lies in it, the sources are not compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from micro.conftest import clustered
from micro.test_streaming import file_with_variables, step_model

from dwindle.micro import export_micro
from dwindle.micro.sources import compiled_bytes

needs_sources = pytest.mark.skipif(
    not os.environ.get("DWINDLE_TFLM"), reason="DWINDLE_TFLM names no sources of TensorFlow Lite Micro"
)


def run_program(folder: Path, build: Path) -> str:
    tree = os.environ["DWINDLE_TFLM"]
    library = os.path.join(tree, "libtflm.a")
    more = [f"-DTFLM_LIBRARY={library}"] if os.path.exists(library) else []
    configure = ["cmake", "-B", str(build), "-S", str(folder), f"-DTFLM_DIR={tree}", *more]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    done = subprocess.run([str(build / "run_model")], check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


def check(made, build: Path) -> None:
    said = run_program(made.folder, build)
    assert "Largest difference from the recorded outputs: 0" in said
    used, given = map(int, re.search(r"Arena: (\d+) of (\d+) bytes", said).groups())
    assert 0 < used <= made.arena_bytes
    assert made.needed_bytes < given


@needs_sources
def test_a_cnn(cnn_file, tmp_path):
    (tmp_path / "model.tflite").write_bytes(cnn_file.content)
    check(export_micro(tmp_path / "model.tflite", tmp_path / "out"), tmp_path / "build")


@needs_sources
def test_encoded_weights(cnn_file, tmp_path):
    (tmp_path / "model.tflite").write_bytes(clustered(cnn_file.content))
    made = export_micro(tmp_path / "model.tflite", tmp_path / "out", decode=True)
    assert made.encoded
    check(made, tmp_path / "build")


@needs_sources
@pytest.mark.parametrize("scheme", ["int8", "float32"])
def test_states(rows, tmp_path, scheme):
    whole, x = rows
    made = export_micro(step_model(whole), tmp_path / "out", data=x[:16], scheme=scheme, states={1: 1, 2: 2})
    check(made, tmp_path / "build")


@needs_sources
def test_variables(digits, tmp_path):
    content, _ = file_with_variables()
    (tmp_path / "listener.tflite").write_bytes(content)
    frames = digits[1][0][0, :, None, :, 0]
    check(export_micro(tmp_path / "listener.tflite", tmp_path / "out", data=frames), tmp_path / "build")


@needs_sources
def test_a_changed_weight_is_noticed(cnn_file, tmp_path):
    """The program does compare: a file whose weights are others gives a difference."""
    (tmp_path / "model.tflite").write_bytes(cnn_file.content)
    made = export_micro(tmp_path / "model.tflite", tmp_path / "out")
    source = made.folder / "sample.h"
    text = source.read_text()
    start = text.index("kSampleOutput0[] = {") + len("kSampleOutput0[] = {")
    values = [int(v) for v in re.findall(r"\d+", text[start : text.index("}", start)])]
    other = ", ".join(str(int(v)) for v in np.uint8(np.array(values) + 7))
    source.write_text(text[:start] + other + text[text.index("}", start) :])
    assert "Largest difference from the recorded outputs: 7" in run_program(made.folder, tmp_path / "build")


@pytest.mark.skipif(shutil.which("arm-none-eabi-g++") is None, reason="no compiler for Arm")
def test_constants_for_cortex_m_are_the_file(cnn_file):
    assert compiled_bytes(cnn_file.content) == len(cnn_file.content)
