"""The smallest file that reads MNIST: a small network, trained, pruned, clustered, exported, packed.

python benchmarks/smallest_network.py --data mnist.npz [--channels 8 18 32] [--seeds 0 1 2]

Three convolutions and a mean over space, trained on images that are moved, turned and stretched a little. The trained
network is exported and lifted, so that its batch normalizations are folded; then it is pruned over a schedule, its
weights share 8 values, and its biases are put on a grid. The file is a ``.tflite`` of float32 weights, stripped of
names. The error is that of this file on the 10,000 test images; the bytes are those of the ``.dwz`` that restores it,
with its graph.
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
from dwindle.attaching import attach
from dwindle.clustering import round_biases
from dwindle.measuring.litert import LiteRTRunner
from dwindle.micro.stripping import strip
from dwindle.weights import KeepZeros

BATCH = 256


def network(channels: list[int]) -> keras.Model:
    """Return a convolution of 5 x 5 with strides, two of 3 x 3, each followed by a pooling, and a classifier."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    for number, filters in enumerate(channels):
        size, strides = (3, 1) if number else (5, 2)
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.95)(x))
        x = layers.MaxPooling2D()(x) if number else x
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


class Moved(keras.utils.PyDataset):
    """Batches in random order, each image moved by up to some pixels both ways."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int, pixels: int = 1) -> None:
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


class Warped(keras.utils.PyDataset):
    """Batches in random order, each image moved, turned, stretched and sheared.

    Args:
        x: Images, ``(n, 28, 28, 1)``.
        y: Their classes.
        seed: Of order and changes.
        strength: 1: by up to 2 pixels, 8 degrees, a tenth; less in proportion.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int, strength: float = 1.0) -> None:
        super().__init__()
        self.x, self.y, self.strength = x, y, strength
        self.generator = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __getitem__(self, index: int) -> tuple[object, np.ndarray]:
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        angle, wide, high, shear, right, down = self.strength * self.generator.uniform(-1, 1, (6, len(rows)))
        angle, wide, high = np.deg2rad(8 * angle), 1 + 0.1 * wide, 1 + 0.1 * high
        a, b = np.cos(angle) * wide, 0.15 * shear - np.sin(angle) * high
        c, d = np.sin(angle) * wide, np.cos(angle) * high
        middle, zero = 13.5, np.zeros(len(rows))
        across, along = middle * (1 - a - b) + 2 * right, middle * (1 - c - d) + 2 * down
        matrices = np.stack([a, b, across, c, d, along, zero, zero], axis=1).astype(np.float32)
        return keras.ops.image.affine_transform(self.x[rows], matrices, data_format="channels_last"), self.y[rows]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.generator.permutation(len(self.y))


def fit(model: keras.Model, train: Warped, epochs: int, rate: float) -> None:
    """Train with a rate that falls to a hundredth."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(train), alpha=0.01)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    model.fit(train, epochs=epochs, verbose=0)


def held(model: keras.Model) -> keras.Model:
    """Return the model with the zeros of its kernels held where they are."""
    kernels = {layer.name: layer.kernel.numpy() for layer in model.layers if layer.weights}
    return attach(model, {(name, "kernel"): [KeepZeros(mask=(value != 0))] for name, value in kernels.items()})


def main() -> None:
    """Print a Markdown row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist.npz of keras.datasets")
    parser.add_argument("--channels", type=int, nargs=3, default=[8, 18, 32])
    parser.add_argument("--epochs", type=int, nargs=3, default=[30, 8, 12], help="trained, pruned, clustered")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--bias-bits", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="folder for the trained networks, or to take them from")
    options = parser.parse_args()
    with np.load(options.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    for name in ("x_train", "x_test"):
        data[name] = (data[name] / np.float32(255)).astype(np.float32)[..., None]
    print("| channels | seed | weights | trained | pruned | clustered: error of the file | bytes of the .dwz | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            print(row(options, data, seed, Path(folder)), flush=True)


def row(options: argparse.Namespace, data: dict[str, np.ndarray], seed: int, folder: Path) -> str:
    """Train, prune, cluster, export and pack one network; return its row."""
    begun = time.perf_counter()

    def error(model: keras.Model) -> float:
        predicted = model.predict(data["x_test"], batch_size=1000, verbose=0).argmax(1)
        return 100 * float((predicted != data["y_test"]).mean())

    keras.utils.set_random_seed(seed)
    strong, weak = (Warped(data["x_train"], data["y_train"], seed, strength) for strength in (1.0, 0.5))
    trained, pruning, clustered = options.epochs
    name = f"{'-'.join(map(str, options.channels))}-{trained}-{seed}.keras"
    kept = None if options.keep is None else options.keep / name
    if kept is not None and kept.exists():
        model = dw.load(kept)
    else:
        model = network(options.channels)
        fit(model, strong, trained, 1e-2)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            model.save(kept)
    errors = [error(model)]
    model = dw.load(dw.export(model, folder / "trained.tflite").path)
    schedule = dw.PolynomialDecay(end=int(0.6 * pruning * len(weak)), frequency=50)
    model = dw.prune(model, options.sparsity, scope="global", schedule=schedule)
    fit(model, weak, pruning, 2e-3)
    errors.append(error(model))
    model = dw.cluster(held(dw.finalize(model)), options.clusters, reassign=10)
    fit(model, weak, clustered, 1e-3)
    model = round_biases(dw.finalize(model), options.bias_bits)
    file = dw.export(model, folder / "m.tflite").path
    file.write_bytes(strip(file.read_bytes()))
    packed = dw.pack(file, folder / "m.dwz")
    wrong = LiteRTRunner(file).predict([data["x_test"]])[0].argmax(1) != data["y_test"]
    errors.append(100 * float(wrong.mean()))
    return (
        f"| {' '.join(map(str, options.channels))} | {seed} | {model.count_params():,} | "
        f"{' | '.join(f'{each:.2f}%' for each in errors)} | {packed.packed_bytes:,} | "
        f"{time.perf_counter() - begun:.0f} s |"
    )


if __name__ == "__main__":
    main()
