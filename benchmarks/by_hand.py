"""What one would try by hand on the residual network of `search.py`, at as many training steps as the search's file.

python benchmarks/by_hand.py --data fashion_mnist.npz [--tfmot PYTHON] [--found FILE] [--epochs 20] [--folder FOLDER]

The TensorFlow converter's int8; a student half as wide, distilled and trained in int8; TFMOT's combined recipe (pruned,
clustered, quantized: PCQAT), for which ``--tfmot`` names the Python of an environment that has it; and ``--found``, a
file of the search. With ``--folder`` the trained original and the files stay there, and are not made again; the
original is where `search.py --out` has it as well.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from quantization_accuracy import converter
from search import residual, trained

import dwindle as dw
from dwindle.exporting import float_file

BATCH = 64


def student(model: keras.Model, train: tuple, epochs: int, path: Path) -> None:
    """Write a student of half the width: distilled for three quarters of the epochs, then in quantized training."""
    x, y = train

    def fit(student: keras.Model, rounds: int, rate: float) -> None:
        coach = dw.distill(student, model)
        decay = keras.optimizers.schedules.CosineDecay(rate, rounds * (len(x) // BATCH + 1))
        coach.compile(keras.optimizers.Adam(decay), "sparse_categorical_crossentropy")
        coach.fit(x, y, batch_size=BATCH, epochs=rounds, verbose=0)

    narrow = dw.shrink(model, width=0.5)
    quantized = max(1, epochs // 4)
    fit(narrow, epochs - quantized, 2e-3)
    twin = dw.quantize(narrow, "int8", x[:200])
    fit(twin, quantized, 5e-4)
    dw.export(twin, path, data=x[:256])


def combined(python: str, model: keras.Model, train: tuple, epochs: int, path: Path) -> None:
    """Write TFMOT's file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "weights.npz", *model.get_weights())
        np.savez(folder / "data.npz", x=train[0], y=train[1])
        script = Path(__file__).parent / "peers" / "tfmot_pcqat.py"
        subprocess.run([python, script, folder, str(epochs), str(BATCH)], check=True, stdout=subprocess.DEVNULL)
        path.write_bytes((folder / "tfmot.tflite").read_bytes())


def main() -> None:
    """Make the files and print what was measured on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="fashion_mnist.npz of keras.datasets")
    parser.add_argument("--tfmot")
    parser.add_argument("--found")
    parser.add_argument("--folder")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    with np.load(options.data) as arrays:
        x, x_test = ((arrays[k][..., None] / 255).astype(np.float32) for k in ("x_train", "x_test"))
        y, y_test = arrays["y_train"].astype(np.int64), arrays["y_test"].astype(np.int64)
    train, test = (x[:-10_000], y[:-10_000]), (x_test, y_test)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"x_train": train[0], "y_train": train[1]}
        model, _ = trained(residual, folder / "residual.keras", data, 20)

        def told(name: str, file: Path, make: Callable[[Path], object]) -> None:
            if not file.exists():
                make(file)
            found = dw.measure(file, test)
            packed = dw.pack(file, Path(temporary) / "packed.dwz").packed_bytes
            zipped = len(gzip.compress(file.read_bytes(), 9))
            print(f"{name}: {found.accuracy:.2%}, {found.size_bytes:,} bytes, gzip {zipped:,}, packed {packed:,}, "
                  f"p50 {1000 * found.latency.p50_ms:.1f} us", flush=True)  # fmt: skip

        keras.utils.set_random_seed(0)
        told("original", folder / "float.tflite", lambda path: path.write_bytes(float_file(model)))
        told("converter int8", folder / "int8.tflite", lambda path: path.write_bytes(converter(model, x[:200])))
        if options.found:
            told("the search's", Path(options.found), lambda path: parser.error(f"{path} does not exist"))
        told("distilled student, int8", folder / "student.tflite",
             lambda path: student(model, train, options.epochs, path))  # fmt: skip
        if options.tfmot:
            told("TFMOT pruned, clustered, int8", folder / "tfmot.tflite",
                 lambda path: combined(options.tfmot, model, train, options.epochs, path))  # fmt: skip


if __name__ == "__main__":
    main()
