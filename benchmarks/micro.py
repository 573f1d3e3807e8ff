"""Microcontrollers: bytes of a DS-CNN's file as it is quantized, stripped and encoded; arena; agreement.

python benchmarks/micro.py [--epochs 3] [--samples 500]

A DS-CNN (a 10x4 convolution, four depthwise separable blocks of 64 channels, 24,000 parameters, as in MLPerf Tiny) is
trained on the digits that dwindle ships, at 28x28. Its integer weights are then clustered, k-means on the integers of
each tensor, or pruned, 80% of each kernel by magnitude, without training on: bytes are what is looked at. Every file is
run in TensorFlow Lite Micro, and its accuracy is measured there. The table is Markdown.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.lifting.flatbuffer import parse, read_graph, serialize
from dwindle.measuring.litert import LiteRTRunner, quantize
from dwindle.micro.encoding import encode_weights
from dwindle.micro.running import run_micro
from dwindle.micro.stripping import strip
from dwindle.micro.verifying import run_litert
from dwindle.quantization.schemes import SCHEMES

layers = keras.layers


def ds_cnn() -> keras.Model:
    """Return the network."""
    x = inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(64, (10, 4), strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    for _ in range(4):
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Conv2D(64, 1, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="ds_cnn")


def clustered(content: bytes, count: int) -> bytes:
    """Return the file with at most ``count`` integers in each kernel: k-means, from evenly spaced quantiles."""
    model = copy.deepcopy(parse(content))
    for operation in read_graph(content).operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if kernel is None or kernel.value is None or kernel.dtype != np.int8 or kernel.value.ndim < 2:
            continue
        values = kernel.value.astype(np.float64).ravel()
        centres = np.quantile(values, np.linspace(0, 1, count))
        for _ in range(50):
            nearest = np.abs(values[:, None] - centres).argmin(1)
            sums, sizes = np.bincount(nearest, values, count), np.bincount(nearest, minlength=count)
            centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        shared = np.rint(centres).astype(np.int8)[np.abs(values[:, None] - centres).argmin(1)]
        model.buffers[kernel.buffer].data = np.frombuffer(shared.tobytes(), np.uint8)
    return serialize(model)


def pruned(content: bytes, sparsity: float) -> bytes:
    """Return the file with the smallest integers of each kernel set to 0."""
    model = copy.deepcopy(parse(content))
    for operation in read_graph(content).operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if kernel is None or kernel.value is None or kernel.dtype != np.int8 or kernel.value.ndim < 2:
            continue
        values = kernel.value.ravel().copy()
        values[np.argsort(np.abs(values.astype(int)), kind="stable")[: int(sparsity * values.size)]] = 0
        model.buffers[kernel.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    return serialize(model)


def measured(content: bytes, x: np.ndarray, y: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Return accuracy and arena of a file in TensorFlow Lite Micro, and its outputs."""
    run = run_micro(content, [x])
    return float((run.outputs[0].argmax(-1) == y).mean()), run.arena_bytes, run.outputs[0]


def rows(name: str, content: bytes, x: np.ndarray, y: np.ndarray) -> None:
    """Print a row for each form of a file."""
    accuracy, arena, expected = measured(content, x, y)
    reference = run_litert(content, [x], reference=True)[0]
    same = float((reference == expected).mean())
    print(f"| {name} | {len(content):,} | {arena:,} | {accuracy:.4f} | {same:.2%} of outputs as LiteRT's reference |")
    encoded, weights = encode_weights(content)
    forms = {"stripped": strip(content), "stripped, for TFLM only": strip(content, micro_only=True)}
    if weights:
        kinds = sorted({f"{weight.encoding}, {weight.bits} bits" for weight in weights})
        forms[f"{len(weights)} weights encoded: {'; '.join(kinds)}"] = strip(encoded, micro_only=True)
    for form, made in forms.items():
        _, arena, found = measured(made, x, y)
        identical = "identical" if np.array_equal(found, expected) else "DIFFERENT"
        times = f"{len(content) / len(made):.2f} times smaller, {len(forms['stripped']) / len(made):.2f} than stripped"
        print(f"| - {form} | {len(made):,} | {arena:,} | {identical} | {times} |")


def main() -> None:
    """Print the table."""
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-samples", type=int, help="only so many, for a quick run")
    parser.add_argument("--samples", type=int, default=500, help="test samples that run in TensorFlow Lite Micro")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    data = dw.load_demo_data()
    x, y = data.train.x[0][: options.train_samples], data.train.y[: options.train_samples]
    picked = data.test.take(options.samples)
    model = ds_cnn()
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=options.epochs, verbose=0)
    print(f"{model.count_params():,} parameters, {options.epochs} epochs, {len(x):,} training samples")
    print(f"float accuracy on {len(picked)} test samples: {model.evaluate(picked.x[0], picked.y, verbose=0)[1]:.4f}\n")
    print("| file | bytes | arena, bytes | accuracy in TFLM | |")
    print("| --- | --- | --- | --- | --- |")
    schemes = {"a scale each channel": SCHEMES["int8"],
               "a scale each tensor": dataclasses.replace(SCHEMES["int8"], granularity="tensor")}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, scheme in schemes.items():
            path = Path(folder) / "model.tflite"
            dw.export(model, path, scheme=scheme, data=x[:500], io_type="int8")
            content = path.read_bytes()
            raw = quantize(picked.x[0], LiteRTRunner(content).inputs[0])
            rows(f"int8, {name}", content, raw, picked.y)
            for count in (16, 8):
                rows(f"int8, {name}, {count} values", clustered(content, count), raw, picked.y)
            rows(f"int8, {name}, 80% zeros", pruned(content, 0.8), raw, picked.y)


if __name__ == "__main__":
    main()
