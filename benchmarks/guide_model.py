"""The MNIST model of TFMOT's guides, as small as a `.tflite` gets without being packed or zipped.

python benchmarks/guide_model.py --data mnist.npz [--seeds 0 1 2]

A convolution of 12 channels, a pooling, a classifier: 20,410 parameters. The float model is trained as the guides do
it, for four epochs. Another one is trained for longer, on images moved by up to a pixel. Its weights are then quantized
to 4 bits in training, with all channels, and with the five that `prune` leaves. The exported file is stripped of what
LiteRT does not read. Accuracies are those of the files, by LiteRT, on the 10,000 test images. The table is Markdown.
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
from smallest_network import Moved

import dwindle as dw
from dwindle.measuring.litert import LiteRTRunner
from dwindle.micro.stripping import strip

layers = keras.layers


def guide_model() -> keras.Model:
    """Return the guides' model, with logits as outputs."""
    return keras.Sequential(
        [
            keras.Input((28, 28)), layers.Reshape((28, 28, 1)), layers.Conv2D(12, 3, activation="relu", name="conv"),
            layers.MaxPooling2D(2), layers.Flatten(), layers.Dense(10, name="digit"),
        ]
    )  # fmt: skip


class Flat(Moved):
    """Moved images without an axis of channels."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = super().__getitem__(index)
        return x[..., 0], y


def main() -> None:
    """Print a Markdown row for each file and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist.npz of keras.datasets")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quantized-epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with np.load(options.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    for name in ("x_train", "x_test"):
        data[name] = (data[name] / np.float32(255)).astype(np.float32)
    print("| file | seed | parameters | bytes of the .tflite | accuracy | time |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for seed in options.seeds:
        keras.utils.set_random_seed(seed)
        train = Flat(data["x_train"][..., None], data["y_train"], seed)

        def fit(model: keras.Model, epochs: int, rate: float, train: Flat = train) -> None:
            schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(train))
            model.compile(keras.optimizers.Adam(schedule), loss)
            model.fit(train, epochs=epochs, verbose=0)

        def report(name: str, model: keras.Model, begun: float, seed: int = seed) -> None:
            with tempfile.TemporaryDirectory() as folder:
                exported = dw.export(model, Path(folder) / "m.tflite", data=data["x_train"][:1000]).path
                small = Path(folder) / "small.tflite"
                small.write_bytes(strip(exported.read_bytes()))
                predicted = LiteRTRunner(small).predict([data["x_test"]])[0].argmax(1)
                accuracy = float((predicted == data["y_test"]).mean())
                print(
                    f"| {name} | {seed} | {model.count_params():,} | {small.stat().st_size:,} | {accuracy:.4f} | "
                    f"{time.perf_counter() - begun:.0f} s |",
                    flush=True,
                )

        begun = time.perf_counter()
        model = guide_model()
        model.compile("adam", loss)
        model.fit(data["x_train"], data["y_train"], batch_size=32, epochs=4, validation_split=0.1, verbose=0)
        report("float, as the guides train it", model, begun)
        begun = time.perf_counter()
        model = guide_model()
        fit(model, options.epochs, 5e-3)
        report("float, trained for longer", model, begun)
        for channels in (12, 5):
            begun = time.perf_counter()
            slim = model
            if channels < 12:
                slim = dw.prune(model, 1 - channels / 12, structure="channel")
                fit(slim, options.epochs, 3e-3)
            aware = dw.quantize(slim, "int4-dynamic")
            fit(aware, options.quantized_epochs, 2e-3)
            report(f"4-bit weights, {channels} channels", aware, begun)


if __name__ == "__main__":
    main()
