"""Pruning channels: every architecture of `keras.applications` cut, and a network that becomes faster.

python benchmarks/channels.py architectures [NAME ...] [--out FILE] [--size N]
python benchmarks/channels.py fashion --data fashion_mnist.npz [--out FILE]
python benchmarks/channels.py latency

`fashion`: a residual network is trained on all of Fashion-MNIST, pruned to 2 and 4 times fewer MACs and fine-tuned;
accuracy on all test images, of the float32 files and the int8 files that LiteRT ran, and their times, the files taking
turns. Stages that are in the output file are not run again.

`architectures`: for each, processor seconds to find the groups and to build the smaller model at its smallest input,
parameters and MACs before and after half of every group's channels went, and the largest difference from the model with
those channels masked to zero, as a share of the largest output, at 30% and 60%. Weights are random. With ``--size`` the
first of these only, at that input.

`latency`: the residual network, untrained, with measured latency as the target; what its file takes, timed once more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import keras
import numpy as np
from applications import architectures, built, images
from pruning_reference import difference

import dwindle as dw
from dwindle.measuring import LiteRTRunner
from dwindle.measuring.latency import compare_latency
from dwindle.pruning import ChannelOptions, groups, plan_channels

EPOCHS, TUNING, BATCH = 15, 15, 128
WIDTHS = (24, 48, 96)
layers = keras.layers


def one(name: str, size: int | None) -> dict[str, Any]:
    """Analyse and cut one architecture."""
    if size is None:
        model = built(name)
    else:
        keras.utils.set_random_seed(0)
        model = architectures()[name](weights=None, input_shape=(size, size, 3), classifier_activation=None)
    begun = time.process_time()
    plan = plan_channels(model, ChannelOptions(sparsity=0.5))
    planned = time.process_time()
    plan.apply()
    done = time.process_time()
    row: dict[str, Any] = {
        "plan_s": planned - begun, "cut_s": done - planned, "parameters": plan.parameters, "macs": plan.macs,
        "groups": len(plan.groups), "pinned": list(plan.notes),
    }  # fmt: skip
    if size is None:
        for sparsity in (0.3, 0.6):
            plan = plan_channels(model, ChannelOptions(sparsity=sparsity, criterion="random"))
            row[f"error_{sparsity}"] = difference(plan, [images(model, 4)])
    return row


def network() -> keras.Model:
    """Return a residual network of seven convolutions and two shortcuts, 5.7 million MACs."""

    def convolution(x: Any, filters: int, strides: int = 1, size: int = 3) -> Any:
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.95)(x)

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, WIDTHS[0], 2))
    for number, filters in enumerate(WIDTHS):
        strides = 1 if number == 0 else 2
        y = convolution(layers.ReLU()(convolution(x, filters, strides)), filters)
        x = layers.ReLU()(layers.Add()([y, x if number == 0 else convolution(x, filters, strides, 1)]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def fit(model: keras.Model, data: dw.Data, epochs: int, rate: float, teacher: keras.Model | None = None) -> None:
    """Train a model in place, with flips, and with a teacher's logits where there is one."""
    x, y = data.train.x[0], data.train.y
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * (len(x) // BATCH))
    generator = np.random.default_rng(0)
    loss: Any = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    targets = y
    if teacher is not None:
        targets = np.concatenate([y[:, None], teacher.predict(x, batch_size=512, verbose=0)], axis=1).astype(np.float32)

        def loss(true: Any, logits: Any) -> Any:
            hard = keras.losses.sparse_categorical_crossentropy(true[:, 0], logits, from_logits=True)
            soft = keras.losses.categorical_crossentropy(
                keras.ops.softmax(true[:, 1:] / 3.0), logits / 3.0, from_logits=True
            )
            return 0.3 * hard + 0.7 * 9.0 * soft

    model.compile(keras.optimizers.Adam(schedule), loss)
    for _ in range(epochs):
        flipped = generator.random(len(x)) < 0.5
        model.fit(np.where(flipped[:, None, None, None], x[:, :, ::-1], x), targets, batch_size=BATCH, verbose=0)


def fashion(path: Path, out: Path, until: str | None = None) -> None:
    """Train, prune, fine-tune and measure, or stop after one stage; print one line a model."""
    data = dw.read_data(path, rescale=1 / 255, validation_fraction=0.0)
    image = lambda split: dataclasses.replace(split, x=(split.x[0].reshape(-1, 28, 28, 1),))  # noqa: E731
    data = dataclasses.replace(data, train=image(data.train), test=image(data.test))
    keep = out.with_suffix("")
    keep.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    names = {"original": 1.0, "2x": 2.0, "4x": 4.0}
    models: dict[str, keras.Model] = {}
    for name, times in names.items():
        file = keep / f"{name}.keras"
        if file.exists():
            models[name] = keras.saving.load_model(file, compile=False)
            continue
        begun = time.time()
        if times == 1:
            models[name] = network()
            fit(models[name], data, EPOCHS, 3e-3)
        else:
            plan = plan_channels(
                models["original"], ChannelOptions(sparsity=1 - 1 / times, target="macs", multiple=8, scope="layer")
            )
            print(plan, flush=True)
            models[name] = plan.apply()
            fit(models[name], data, TUNING, 2e-3, models["original"])
        models[name].save(file)
        print(f"{name}: {time.time() - begun:.0f} s", flush=True)
        if name == until:
            return
    rows: dict[str, Any] = {}
    for scheme in ("float32", "int8"):
        files = []
        for name, model in models.items():
            file = keep / f"{name}-{scheme}.tflite"
            dw.export(model, file, scheme, None if scheme == "float32" else (data.train.x[0][:500], data.train.y[:500]))
            files.append(file)
        for name, file, latency in zip(models, files, compare_latency(files, seconds=4.0), strict=True):
            found = LiteRTRunner(file).predict([data.test.x[0]])[0].argmax(axis=-1)
            rows[f"{name} {scheme}"] = {
                "accuracy": float((found == data.test.y).mean()), "p50_ms": latency.p50_ms, "p90_ms": latency.p90_ms,
                "size_bytes": file.stat().st_size, "macs": groups(models[name]).macs,
                "parameters": models[name].count_params(),
            }  # fmt: skip
    out.write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        base = rows[f"original {name.split()[1]}"]
        print(
            f"{name:18} {row['accuracy']:.2%} ({row['accuracy'] - base['accuracy']:+.2%}), {row['p50_ms']:.4f} ms, "
            f"{base['p50_ms'] / row['p50_ms']:.2f} times faster, {base['macs'] / row['macs']:.2f} times fewer MACs, "
            f"{row['parameters']:,} parameters, {row['size_bytes']:,} bytes"
        )


def latency() -> None:
    """Print the time of files that were cut to a time."""
    keras.utils.set_random_seed(0)
    model = network()
    with tempfile.TemporaryDirectory() as folder:
        original = dw.export(model, Path(folder) / "original.tflite").path
        for wanted in (0.7, 0.5, 0.3):
            plan = plan_channels(model, ChannelOptions(sparsity=1 - wanted, target="latency"))
            file = dw.export(plan.apply(), Path(folder) / f"{wanted}.tflite").path
            before, after = compare_latency([original, file], seconds=4.0)
            print(f"{wanted:.2f} of the time wanted, {after.p50_ms / before.p50_ms:.3f} taken", flush=True)


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["architectures", "fashion", "latency"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("channels.json"))
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--size", type=int, default=None)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.what == "fashion":
        fashion(options.data, options.out, options.names[0] if options.names else None)
        return
    if options.what == "latency":
        latency()
        return
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.names or architectures():
        if name not in done:
            done[name] = one(name, options.size)
            options.out.write_text(json.dumps(done, indent=1))
            keras.backend.clear_session()
        row = done[name]
        errors = [f"at {key[6:]} off by {value:.1e}; " for key, value in row.items() if key.startswith("error")]
        print(
            f"{name:20} {row['groups']:4} groups in {row['plan_s']:5.1f} s, cut in {row['cut_s']:5.1f} s, parameters "
            f"{row['parameters'][0] / 1e6:.1f}M to {row['parameters'][1] / 1e6:.1f}M, MACs {row['macs'][0] / 1e6:.0f}M "
            f"to {row['macs'][1] / 1e6:.0f}M; {''.join(errors)}{len(row['pinned'])} pinned",
            flush=True,
        )


if __name__ == "__main__":
    main()
