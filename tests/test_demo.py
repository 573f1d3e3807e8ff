"""The demo meets its goals, and each example ends in a file whose accuracy is measured. Minutes long."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dwindle as dw

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_meets_its_goals(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "dwindle", "demo", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["met"]
    assert report["baseline"]["size_bytes"] > 1_700_000
    assert (out / "model.tflite").stat().st_size <= 45_000
    assert report["result"]["accuracy"] >= report["baseline"]["accuracy"] - 0.005
    assert report["result"]["latency_ms"]["p50"] <= report["baseline"]["latency_ms"]["p50"] / 2
    told = report["verification"]
    assert told["samples"] == 3000
    assert told["quanta"] <= 1.0
    assert told["same_class"] + told["ties"] == told["samples"]


@pytest.mark.slow
@pytest.mark.parametrize(("example", "file"), [
    ("prune_mnist.py", "pruned.tflite"), ("distill_mnist.py", "student_int8.tflite"), ("quantize_mnist.py", "int8_in_training.tflite"),
    ("cluster_mnist.py", "clustering_quantized.tflite")])  # fmt: skip
def test_an_example_ends_in_a_measured_file(example, file):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    data = dw.load_demo_data()
    found = dw.measure(ROOT / "examples" / "out" / file, (data.test.x[0], data.test.y))
    assert found.accuracy > 0.9
    assert f"{found.accuracy:.4f}" in re.findall(r"0\.\d{4}", done.stdout)
