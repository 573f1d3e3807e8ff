"""Low rank and depth on Fashion-MNIST: accuracy of files at once and after an epoch of training, bytes, latency.

python benchmarks/low_rank_and_depth.py --data fashion_mnist.npz

One residual network of eight blocks, trained for three epochs on 30,000 images. Files take turns while they are timed;
every accuracy is that of a float32 file on 10,000 test images. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.measuring.latency import compare_latency
from dwindle.measuring.litert import LiteRTRunner
from dwindle.pruning.depth import drop_blocks


def network() -> keras.Model:
    """Return a residual network of eight blocks, 0.4 million weights."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
    for filters, strides in ((32, 1), (64, 2)):
        if strides > 1:
            x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3, strides=2, padding="same")(x)))
        for _ in range(4):
            y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(x)))
            y = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(y))
            x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


def train(model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, rate: float) -> None:
    """Train a model with Adam and a falling rate."""
    steps = epochs * -(-len(x) // 128)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0)


def main() -> None:
    """Print the tables."""
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="fashion_mnist.npz of keras.datasets")
    parser.add_argument("--train", type=int, default=30_000, help="training images (default 30000)")
    options = parser.parse_args()
    data = np.load(options.data)
    x, test = ((data[key][..., None] / 255).astype(np.float32) for key in ("x_train", "x_test"))
    x, y, labels = x[: options.train], data["y_train"][: options.train].astype(np.int64), data["y_test"]
    keras.utils.set_random_seed(0)
    model = network()
    train(model, x, y, 3, 3e-3)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.tflite"
        dw.export(model, base)

        def accuracy(content: Path) -> float:
            return float((LiteRTRunner(content).predict([test])[0].argmax(1) == labels).mean() * 100)

        def row(name: str, made: Any) -> None:
            path = Path(folder) / "made.tflite"
            dw.export(made, path)
            at_once = accuracy(path)
            keras.utils.set_random_seed(0)
            train(made, x, y, 1, 1e-3)
            dw.export(made, path)
            times = compare_latency([base, path])
            sizes = base.stat().st_size, path.stat().st_size
            print(
                f"| {name} | {made.count_params():,} | {at_once:.2f} | {accuracy(path):.2f} | "
                f"{sizes[0] / sizes[1]:.2f}x | {times[0].p50_ms / times[1].p50_ms:.2f}x |", flush=True,
            )  # fmt: skip

        print("| model | parameters | accuracy | after an epoch | times smaller | times faster |")
        print("| --- | --- | --- | --- | --- | --- |")
        row("as it is", dw.finalize(model))
        for share in (0.6, 0.4, 0.2):
            for name, given in (("weights", None), ("data", x[:2000])):
                row(f"low rank, {share:.0%}, from {name}", dw.factorize(model, parameters=share, data=given))
        for count in (2, 4):
            for criterion in ("magnitude", "similarity", "output"):
                given = None if criterion == "magnitude" else x[:2000]
                row(
                    f"{count} blocks dropped by {criterion}", drop_blocks(model, count, data=given, criterion=criterion)
                )
        row("4 blocks dropped by output, greedily", drop_blocks(model, 4, data=x[:2000], greedy=True))
        row("low rank, 40%, then 2 blocks", drop_blocks(dw.factorize(model, parameters=0.4, data=x[:2000]), 2, data=x))


if __name__ == "__main__":
    main()
