"""The smallest file that reads MNIST: a small network, trained, quantized to 4 bits in training, exported, packed.

python benchmarks/smallest_network.py --data mnist.npz [--channels 8 12 16] [--seeds 0 1 2]

Three convolutions and a mean over space; images are shifted by up to two pixels while it trains. The error is that of
the ``.tflite`` on the 10,000 test images; the bytes are those of the ``.dwz`` that restores it, with its graph.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.measuring.litert import LiteRTRunner

BATCH = 256


def network(channels: list[int]) -> keras.Model:
    """Return three convolutions of 3 x 3 with batch normalization, two of them with strides, and a classifier."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    for filters, strides in zip(channels, (2, 1, 2), strict=True):
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.95)(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


class Moved(keras.utils.PyDataset):
    """Batches in random order, each image moved by up to some pixels both ways."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int, pixels: int = 2) -> None:
        super().__init__()
        self.places = 2 * pixels + 1
        padded = np.pad(x[..., 0], ((0, 0), (pixels, pixels), (pixels, pixels)))
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, (28, 28), axis=(1, 2))
        self.y, self.generator = y, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        down, right = self.generator.integers(0, self.places, (2, len(rows)))
        return self.windows[rows, down, right][..., None], self.y[rows]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.generator.permutation(len(self.y))


def main() -> None:
    """Print a Markdown row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist.npz of keras.datasets")
    parser.add_argument("--channels", type=int, nargs=3, default=[8, 12, 16])
    parser.add_argument("--bits", type=int, default=4, choices=[2, 4, 8])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--quantized-epochs", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with np.load(options.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    for name in ("x_train", "x_test"):
        data[name] = (data[name] / np.float32(255)).astype(np.float32)[..., None]
    print("| channels | bits | seed | weights | error of the float model | error of the file | .tflite | .dwz | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for seed in options.seeds:
        begun = time.perf_counter()
        keras.utils.set_random_seed(seed)
        model = network(options.channels)
        train = Moved(data["x_train"], data["y_train"], seed)

        def fit(model: keras.Model, epochs: int, rate: float, train: Moved = train) -> None:
            schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(train))
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(schedule), loss)
            model.fit(train, epochs=epochs, verbose=0)

        fit(model, options.epochs, 5e-3)
        predicted = model.predict(data["x_test"], batch_size=1000, verbose=0).argmax(1)
        before = 100 * float((predicted != data["y_test"]).mean())
        sample = data["x_train"][:1000]
        aware = dw.quantize(model, dw.Scheme(weights=options.bits, activations=8), sample)
        fit(aware, options.quantized_epochs, 1e-3)
        with tempfile.TemporaryDirectory() as folder:
            file = dw.export(aware, Path(folder) / "m.tflite", data=sample).path
            packed = dw.pack(file, Path(folder) / "m.dwz")
            error = 100 * float((LiteRTRunner(file).predict([data["x_test"]])[0].argmax(1) != data["y_test"]).mean())
            print(
                f"| {' '.join(map(str, options.channels))} | {options.bits} | {seed} | {model.count_params():,} | "
                f"{before:.2f}% | {error:.2f}% | {file.stat().st_size:,} | {packed.packed_bytes:,} | "
                f"{time.perf_counter() - begun:.0f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
