"""The export list, the lean import and the command's start-up."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import dwindle


def test_every_public_name_is_there():
    for name in dwindle.__all__:
        assert getattr(dwindle, name) is not None, name


def test_the_names_of_the_architecture_are_there():
    promised = {"load", "prune", "quantize", "distill", "factorize", "finalize", "export", "measure", "compress", "Goals",
                "Scheme"}  # fmt: skip
    assert promised <= set(dwindle.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = dwindle.prun


@pytest.mark.parametrize(
    "code", ["import dwindle", "import dwindle.cli; dwindle.cli._parser()", "import dwindle.errors"]
)
def test_importing_brings_in_no_framework(code):
    heavy = "{'keras', 'tensorflow', 'torch', 'jax', 'ai_edge_litert', 'ai_edge_quantizer', 'numpy', 'jinja2', 'rich'}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_help_starts_quickly_enough_to_be_typed():
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dwindle", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - begun)
    # The promise is 0.5 s on an idle machine; a framework import, which this guards against, takes several seconds.
    assert min(times) < 1.5


def test_measuring_and_inspecting_a_file_import_no_training_framework(tmp_path, trained):
    dwindle.export(trained, tmp_path / "model.tflite")
    code = (
        f"import sys, dwindle; path = {str(tmp_path / 'model.tflite')!r}; dwindle.inspect_file(path); "
        "dwindle.measure(path); print(sorted({'keras', 'tensorflow', 'torch', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
