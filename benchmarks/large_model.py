"""A model of 100 MB: calibrating and writing int8 beside running the samples, in time and memory.

python benchmarks/large_model.py [--samples 200]

ResNet50 (25.6 million parameters) with inputs of 224x224 and random weights. Each part runs in a process of its own;
memory is the growth of its peak resident memory over what it has when the file is read.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

SIDE = 224


def images(count: int) -> np.ndarray:
    """Return seeded noise."""
    return np.random.default_rng(0).random((count, SIDE, SIDE, 3), dtype=np.float32)


def make(file: Path) -> None:
    """Write the float file."""
    import keras

    from dwindle.exporting import float_file

    keras.utils.set_random_seed(0)
    file.write_bytes(float_file(keras.applications.ResNet50(weights=None, input_shape=(SIDE, SIDE, 3))))


def peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def main() -> None:
    """Run each part in a process of its own and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--part", choices=("make", "run", "write"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.part == "make":
        make(options.file)
    elif options.part is not None:
        print(json.dumps({"run": run, "write": write}[options.part](options.file, options.samples)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.tflite"

            def part(name: str) -> str:
                command = [
                    sys.executable,
                    __file__,
                    "--part",
                    name,
                    "--file",
                    str(file),
                    "--samples",
                    str(options.samples),
                ]
                return subprocess.run(command, check=True, capture_output=True, text=True).stdout

            part("make")
            size = file.stat().st_size
            plain, made = json.loads(part("run").splitlines()[-1]), json.loads(part("write").splitlines()[-1])
        print(f"file: {size / 1e6:.1f} MB float32, {made['bytes'] / 1e6:.1f} MB int8; {options.samples} samples")
        print(f"running the samples: {plain['seconds']:.1f} s")
        times = made["memory"] / size
        print(
            f"calibrating {made['calibrated']:.1f} s, with writing {made['seconds']:.1f} s: "
            f"{made['seconds'] / plain['seconds']:.2f}x; memory {made['memory'] / 1e6:.0f} MB: {times:.2f}x"
        )


if __name__ == "__main__":
    main()
