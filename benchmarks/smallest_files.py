"""The smallest files of LeNet-300-100 and LeNet-5 on all of MNIST: pruned, clustered, packed; error against bytes.

python benchmarks/smallest_files.py --data mnist.npz --pruned FOLDER [--network mlp] [--times 60] [--clusters 8 16]

FOLDER holds what ``pruning_mnist.py --out FOLDER`` wrote. Each network is clustered and trained on with its zeros and
its values held; its biases are put on a grid; it is exported to a ``.tflite`` of float32 weights, which is stripped of
names and packed. The error is that of the stripped file on the 10,000 test images; the bytes are those of the ``.dwz``
that restores it, with its graph.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from pruning_mnist import Shifted

import dwindle as dw
from dwindle.attaching import attach
from dwindle.clustering import round_biases
from dwindle.measuring.litert import LiteRTRunner
from dwindle.micro.stripping import strip
from dwindle.weights import KeepZeros


def held(model: keras.Model) -> keras.Model:
    """Return the model with the zeros of its kernels held where they are."""
    kernels = {layer.name: layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel")}
    return attach(model, {(name, "kernel"): [KeepZeros(mask=(value != 0))] for name, value in kernels.items()})


def silenced(model: keras.Model) -> keras.Model:
    """Return the model with biases of 0 in hidden units that no weight reads any more: it computes the same."""
    plain = dw.finalize(model)
    dense = [layer for layer in plain.layers if isinstance(layer, keras.layers.Dense)]
    for layer, reader in itertools.pairwise(dense):
        layer.bias.assign(layer.bias.numpy() * (reader.kernel.numpy() != 0).any(axis=1))
    return plain


def main() -> None:
    """Print a Markdown row for each network, seed and number of values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist.npz of keras.datasets")
    parser.add_argument("--pruned", required=True, type=Path, help="folder of pruned models")
    parser.add_argument("--network", default="mlp", choices=["mlp", "conv"])
    parser.add_argument("--times", default="60", help="times fewer weights, as in the names of the files")
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--entropy", type=float, default=0.0)
    parser.add_argument("--bias-bits", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with np.load(options.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    for name in ("x_train", "x_test"):
        data[name] = (data[name] / np.float32(255)).astype(np.float32).reshape(-1, 28, 28, 1)
    print("| network | values | error of the pruned model | error of the file | bytes of the .dwz |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:

        def measured(model: keras.Model) -> tuple[float, int]:
            file = dw.export(model, Path(folder) / "m.tflite").path
            file.write_bytes(strip(file.read_bytes()))
            packed = dw.pack(file, Path(folder) / "m.dwz")
            predicted = LiteRTRunner(file).predict([data["x_test"]])[0].argmax(1)
            return 100 * float((predicted != data["y_test"]).mean()), packed.packed_bytes

        for seed in options.seeds:
            keras.utils.set_random_seed(seed)
            pruned = dw.load(options.pruned / f"{options.network}-{options.times}-{seed}.keras")
            before, plain = measured(pruned)
            print(
                f"| {options.network} {options.times}x, seed {seed} | any | {before:.2f}% | {before:.2f}% | {plain:,} |"
            )
            for clusters in options.clusters:
                shared = dw.cluster(held(pruned), clusters, entropy=options.entropy, reassign=10)
                train = Shifted(data["x_train"], data["y_train"], seed)
                rate = keras.optimizers.schedules.CosineDecay(5e-4, options.epochs * len(train))
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                shared.compile(keras.optimizers.Adam(rate), loss)
                shared.fit(train, epochs=options.epochs, verbose=0)
                after, size = measured(round_biases(silenced(shared), options.bias_bits))
                print(
                    f"| {options.network} {options.times}x, seed {seed} | {clusters} | {before:.2f}% | {after:.2f}% | "
                    f"{size:,} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
