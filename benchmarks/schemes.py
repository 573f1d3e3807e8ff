"""Every scheme on two networks: bytes, latency in LiteRT on the CPU, and whether TensorFlow Lite Micro runs the file.

python benchmarks/schemes.py

Fully connected layers, and depthwise separable convolutions; random weights, moving averages adapted to the data, as
after training. Files take turns while they are timed; figures are shares of the float32 file's. The table is Markdown.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.measuring.latency import compare_latency
from dwindle.measuring.memory import measure_memory
from dwindle.quantization import SCHEMES


def dense() -> keras.Model:
    """Return a network of 1.6 million weights in fully connected layers."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((512,)), layers.Dense(1024, activation="relu"), layers.Dense(1024, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def convolutional() -> keras.Model:
    """Return six depthwise separable blocks on images of 96x96, 0.2 million weights."""
    layers = keras.layers
    x = inputs = keras.Input((96, 96, 3))
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.0)(x))
    for filters, strides in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1)):
        x = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.0)(x))
        x = layers.Conv2D(filters, 1, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.0)(x))
    model = keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    model(noise(model), training=True)
    return model


def noise(model: keras.Model) -> np.ndarray:
    """Return 64 samples for a model."""
    return np.random.default_rng(0).normal(size=(64, *model.inputs[0].shape[1:])).astype(np.float32)


def figures(model: keras.Model, folder: Path) -> dict[str, tuple[float, float, str]]:
    """Return, for each scheme, bytes and latency as shares of float32's, and whether TFLM runs it."""
    samples = noise(model)
    files = [dw.export(model, folder / f"{name}.tflite", scheme=name, data=samples) for name in SCHEMES]
    times = [latency.p50_ms for latency in compare_latency([file.path for file in files], seconds=2.0)]
    micro = ["no" if measure_memory(file.path).arena_bytes is None else "yes" for file in files]
    return {
        name: (file.size_bytes / files[0].size_bytes, taken / times[0], runs)
        for name, file, taken, runs in zip(SCHEMES, files, times, micro, strict=True)
    }


def main() -> None:
    """Print the table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    keras.utils.set_random_seed(0)
    columns = []
    for build in (dense, convolutional):
        with tempfile.TemporaryDirectory() as folder:
            columns.append(figures(build(), Path(folder)))
    print("| scheme | bytes, dense | bytes, convolutions | latency, dense | latency, convolutions | runs in TFLM |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in SCHEMES:
        (one_size, one_time, one_runs), (two_size, two_time, two_runs) = (column[name] for column in columns)
        runs = one_runs if one_runs == two_runs else f"dense {one_runs}, convolutions {two_runs}"
        print(f"| {name} | {one_size:.2f} | {two_size:.2f} | {one_time:.1f} | {two_time:.1f} | {runs} |", flush=True)


if __name__ == "__main__":
    main()
