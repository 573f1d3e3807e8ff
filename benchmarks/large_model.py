"""A model of 100 MB: what calibrating, writing int8 and converting cost, in time and memory.

python benchmarks/large_model.py [--samples 200]

ResNet50 (25.6 million parameters) with inputs of 224x224 and random weights: calibrating and writing int8 beside
running the samples; writing its float32 `.tflite` beside TensorFlow's converter alone; writing and loading it as ONNX.
Each part runs in a process of its own; memory is the growth of its peak resident memory from when the libraries are
imported, and what is converted is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

SIDE = 224


def images(count: int) -> np.ndarray:
    """Return seeded noise."""
    return np.random.default_rng(0).random((count, SIDE, SIDE, 3), dtype=np.float32)


def resnet() -> Any:
    """Return the model."""
    import keras

    keras.utils.set_random_seed(0)
    return keras.applications.ResNet50(weights=None, input_shape=(SIDE, SIDE, 3))


def make(file: Path, count: int) -> dict[str, float]:
    """Write the float file."""
    del count
    from dwindle.exporting import float_file

    file.write_bytes(float_file(resnet()))
    return {}


def clear_peak() -> int:
    """Begin the peak anew; return the resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(told.split()[1]) * 1024


def run(file: Path, count: int) -> dict[str, float]:
    """Run the samples through LiteRT, one thread, one at a time."""
    from dwindle.measuring import LiteRTRunner

    runner = LiteRTRunner(file.read_bytes())
    x = images(count)
    runner.run(x[:1])
    begun = time.perf_counter()
    for sample in x:
        runner.run(sample[None])
    return {"seconds": time.perf_counter() - begun}


def write(file: Path, count: int) -> dict[str, float]:
    """Calibrate on the samples and write int8."""
    from dwindle.quantization import calibrate, resolve_scheme, write_quantized

    content, x = file.read_bytes(), images(count)
    calibrate_and = resolve_scheme("int8")
    before = peak()
    begun = time.perf_counter()
    ranges = calibrate(content, [x])
    calibrated = time.perf_counter() - begun
    written = write_quantized(content, calibrate_and, ranges)
    return {
        "seconds": time.perf_counter() - begun, "calibrated": calibrated, "bytes": len(written),
        "memory": peak() - before,
    }  # fmt: skip


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds and the bytes that something takes."""
    before = clear_peak()
    begun = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - begun, "memory": peak() - before}


def convert(file: Path, count: int) -> dict[str, float]:
    """Write the float file with TensorFlow's converter alone."""
    del file, count
    import tensorflow as tf

    import dwindle.exporting  # noqa: F401 - the same libraries are there for both

    model = resnet()
    return measured(lambda: tf.lite.TFLiteConverter.from_keras_model(model).convert())


def export(file: Path, count: int) -> dict[str, float]:
    """Write the float file, verified."""
    del count
    import tensorflow  # noqa: F401

    import dwindle as dw

    model = resnet()
    return measured(lambda: dw.export(model, file.with_name("exported.tflite"), scheme="float32"))


def to_onnx(file: Path, count: int) -> dict[str, float]:
    """Write an ONNX file, verified."""
    del count
    import dwindle as dw

    model = resnet()
    return measured(lambda: dw.export(model, file.with_suffix(".onnx")))


def load(file: Path, count: int) -> dict[str, float]:
    """Load the ONNX file, compared with ONNX Runtime."""
    del count
    import keras
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    import dwindle as dw

    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).predict(np.zeros((1, 2)), verbose=0)
    return measured(lambda: dw.load(file.with_suffix(".onnx")))


PARTS = {
    "make": make,
    "run": run,
    "write": write,
    "convert": convert,
    "export": export,
    "to-onnx": to_onnx,
    "load": load,
}


def main() -> None:
    """Run each part in a process of its own and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.part is not None:
        print(json.dumps(PARTS[options.part](options.file, options.samples)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        given = ["--file", str(file), "--samples", str(options.samples)]

        def part(name: str) -> dict[str, float]:
            command = [sys.executable, __file__, "--part", name, *given]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found: dict[str, float] = json.loads(said.splitlines()[-1])
            return found

        done = {name: part(name) for name in PARTS}
        size = file.stat().st_size

    def cost(name: str) -> str:
        one = done[name]
        return f"{one['seconds']:.1f} s, {one['memory'] / 1e6:.0f} MB ({one['memory'] / size:.2f} times the file)"

    plain, made = done["run"], done["write"]
    print(f"file: {size / 1e6:.1f} MB float32, {made['bytes'] / 1e6:.1f} MB int8; {options.samples} samples")
    print(f"running the samples: {plain['seconds']:.1f} s")
    ratio = made["seconds"] / plain["seconds"]
    print(f"calibrating {made['calibrated']:.1f} s, with writing {cost('write')}: {ratio:.2f}x")
    ratio = done["export"]["seconds"] / done["convert"]["seconds"]
    print(f"TensorFlow's converter alone: {cost('convert')}; export, verified: {cost('export')}: {ratio:.2f}x")
    print(f"to ONNX: {cost('to-onnx')}; loaded: {cost('load')}")


if __name__ == "__main__":
    main()
