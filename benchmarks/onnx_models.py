"""ONNX files of other people: how they are read, and how far the model and its float32 file are from ONNX Runtime.

python benchmarks/onnx_models.py FILE[=LENGTHS] [FILE[=LENGTHS] ...]

LENGTHS is the shape of the only input where lengths are open, such as ``?,3,48,320``. Each line is one of the table in
docs/onnx.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dwindle as dw


def main() -> None:
    """Print a Markdown row for each file."""
    print("| file | read in | notes | float32 file against the model |")
    print("| --- | --- | --- | --- |", flush=True)
    for argument in sys.argv[1:]:
        file, _, lengths = argument.partition("=")
        shape = tuple(None if n == "?" else int(n) for n in lengths.split(",")) if lengths else None
        begun = time.perf_counter()
        model = dw.load(file, inputs=shape, layout="channels_last")
        seconds = time.perf_counter() - begun
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = dw.export(model, Path(folder) / "m.tflite").verification
                written = f"largest difference {found.max_abs_error:.2g}"
            except dw.VerificationError as error:
                written = f"refused: {str(error).split(';')[0]}"
        print(f"| {Path(file).name} | {seconds:.1f} s | {'; '.join(model.notes)} | {written} |", flush=True)


if __name__ == "__main__":
    main()
