"""What writes no `.tflite` works on every Keras backend that is installed: masks, schedules, distillation, resuming."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_training_techniques_on_other_backends(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed; pip install {backend} into .venv runs this")
    pruning = [f"pruning/test_{name}.py" for name in ("masks", "structures", "criteria")]
    names = [
        *pruning,
        "test_distillation.py",
        "distillation/test_objectives.py",
        "distillation/test_coach.py",
        "test_weights.py",
        "lifting/test_shared_constants.py",
    ]
    # Warnings are the backend's own; loops with a GradientTape need TensorFlow, and so does converting a class of a test.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider",
               "-k", "not custom_training_loop and not table", *(str(TESTS / name) for name in names)]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "KERAS_BACKEND": backend}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
