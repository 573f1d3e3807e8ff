"""Sparse files: bytes, bytes after compression, latency and loading time against the dense file.

python benchmarks/sparse_files.py [--network dense] [--scheme float32]

Fully connected layers, and 1x1 and 3x3 convolutions, pruned to several sparsities by magnitude from random weights.
Dense and sparse files take turns while they are timed. Every sparse file is verified against the model, and its outputs
are compared with the dense file's bit for bit. The table is Markdown.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from schemes import dense

import dwindle as dw
from dwindle.measuring.latency import compare_latency
from dwindle.measuring.litert import LiteRTRunner, quiet_stderr

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SCHEMES = ("float32", "float16", "int8", "int8-weights")


def convolutions() -> keras.Model:
    """Return 0.9 million weights in 1x1 and 3x3 convolutions."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 64))
    for filters, size, strides in ((256, 1, 1), (128, 3, 2), (512, 1, 1), (512, 1, 1), (64, 3, 1)):
        x = layers.Conv2D(filters, size, strides=strides, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


def loading_ms(path: Path) -> float:
    """Return how long LiteRT takes to load a file and get it ready, the median of nine times."""
    content, taken = path.read_bytes(), []
    for _ in range(9):
        begun = time.perf_counter()
        with quiet_stderr():
            Interpreter(model_content=content, num_threads=1).allocate_tensors()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken)) * 1e3


def main() -> None:
    """Print the table."""
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=["dense", "convolutions"], help="only this one")
    parser.add_argument("--scheme", choices=SCHEMES, help="only this one")
    options = parser.parse_args()
    networks = [build for build in (dense, convolutions) if options.network in (None, build.__name__)]
    print(
        "| network | scheme | zeros | dense, KB | sparse, KB | dense in zlib | sparse in zlib | latency | loading, ms |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for build in networks:
            keras.utils.set_random_seed(0)
            model = build()
            x = np.random.default_rng(0).normal(size=(64, *model.input_shape[1:])).astype(np.float32)
            for scheme in [options.scheme] if options.scheme else SCHEMES:
                for sparsity in SPARSITIES:
                    pruned = dw.finalize(dw.prune(model, sparsity))
                    paths = [Path(folder) / name for name in ("dense.tflite", "sparse.tflite")]
                    for path in paths:
                        dw.export(pruned, path, scheme=scheme, data=x, sparse=path is paths[1])
                    same = [LiteRTRunner(path).predict([x])[0] for path in paths]
                    np.testing.assert_array_equal(*same)
                    times = compare_latency(paths)
                    sizes = [path.stat().st_size / 1e3 for path in paths]
                    packed = [len(zlib.compress(path.read_bytes(), 9)) / 1e3 for path in paths]
                    print(
                        f"| {build.__name__} | {scheme} | {sparsity:.0%} | {sizes[0]:,.0f} | {sizes[1]:,.0f} | "
                        f"{packed[0]:,.0f} | {packed[1]:,.0f} | {times[1].p50_ms / times[0].p50_ms:.2f}x | "
                        f"{loading_ms(paths[0]):.1f} / {loading_ms(paths[1]):.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
