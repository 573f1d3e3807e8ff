"""`dwindle.compress` on MNIST and Fashion-MNIST: what it finds, in what time, and what single techniques reach.

python benchmarks/search.py lenet --data mnist.npz
python benchmarks/search.py residual --data fashion_mnist.npz
python benchmarks/search.py usual --data mnist.npz
python benchmarks/search.py infeasible --data mnist.npz
python benchmarks/search.py workers --data mnist.npz [--engine ray]

``lenet``: LeNet-5, at most 0.1 points lost, 20 KB, 0.35 of the time. ``residual``: ResNet8, about 78,000
parameters, at most 0.5 points lost; the smallest file and the fastest are told. ``usual``: LeNet-5, at most
0.5 points lost, 50 KB, half of the time. ``infeasible``: 2 KB without any loss, in five minutes. ``workers``: trials
an hour with one worker and with two. With ``--out`` the runs stay and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.demo import lenet5

layers = keras.layers


def residual() -> keras.Model:
    """Return ResNet8 for images of 28 x 28: seven convolutions and one dense layer."""

    def convolution(x: Any, filters: int, strides: int = 1, size: int = 3) -> Any:
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 16))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = convolution(layers.ReLU()(convolution(x, filters, strides)), filters)
        shortcut = x if strides == 1 else convolution(x, filters, strides, 1)
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="resnet8")


def trained(make: Any, path: Path, data: dict[str, np.ndarray], epochs: int) -> tuple[keras.Model, float]:
    """Return the original and the seconds that its training took."""
    if path.exists():
        model = keras.models.load_model(path)
        return model, float(path.with_suffix(".seconds").read_text())
    keras.utils.set_random_seed(0)
    model = make()
    rate = keras.optimizers.schedules.CosineDecay(1e-3, epochs * (len(data["x_train"]) // 64 + 1))
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    begun = time.perf_counter()
    model.fit(data["x_train"], data["y_train"], batch_size=64, epochs=epochs, verbose=0)
    seconds = time.perf_counter() - begun
    model.save(path)
    path.with_suffix(".seconds").write_text(str(seconds))
    return model, seconds


def main() -> None:
    """Run a case and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("lenet", "residual", "usual", "infeasible", "workers"))
    parser.add_argument("--data", required=True, help="mnist.npz or fashion_mnist.npz of keras.datasets")
    parser.add_argument("--out", help="folder that stays")
    parser.add_argument("--budget", help="such as 20m")
    parser.add_argument("--epochs", type=int, default=20, help="of a whole training in the search (default 20)")
    parser.add_argument("--original-epochs", type=int, help="of the original's training (default 15; residual 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="local")
    parser.add_argument("--minimize", choices=("size", "latency"))
    options = parser.parse_args()
    file = np.load(options.data)
    images = {part: (file[f"x_{part}"][..., None] / 255).astype(np.float32) for part in ("train", "test")}
    # The last training images pick; the original has not seen them either. The 10,000 test images judge. More samples
    # pick where more are wrong: the margin of a limit on the loss is that of chance.
    picking = 10_000 if options.case == "residual" else 5_000
    data = {
        "x_train": images["train"][:-picking], "y_train": file["y_train"][:-picking],
        "x_val": images["train"][-picking:], "y_val": file["y_train"][-picking:],
        "x_test": images["test"], "y_test": file["y_test"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make, epochs = (residual, 20) if options.case == "residual" else (lenet5, 15)
        epochs = options.original_epochs or epochs
        model, took = trained(make, folder / f"{make.__name__}.keras", data, epochs)
        print(
            f"original: {model.count_params():,} parameters, {epochs} epochs in {took:.0f} s",
            flush=True,
        )
        {"workers": workers}.get(options.case, one)(model, data, took, folder, options)


def one(model: keras.Model, data: Any, took: float, folder: Path, options: argparse.Namespace) -> None:
    """Run one search and print its trials."""
    goals = {
        "lenet": dw.Goals(max_drop="0.1%", max_size="20KB", max_latency="0.35x", minimize=options.minimize),
        "residual": dw.Goals(max_drop="0.5%", minimize=options.minimize),
        "usual": dw.Goals(max_drop="0.5%", max_size="50KB", max_latency="0.5x", minimize=options.minimize),
        "infeasible": dw.Goals(max_drop=0, max_size="2KB"),
    }[options.case]
    budget = options.budget or {"lenet": "20m", "residual": "40m", "usual": "5m", "infeasible": "5m"}[options.case]
    out = folder / f"{options.case}-{options.minimize}-{options.seed}"
    begun, first = time.perf_counter(), []

    def watch(event: Any) -> None:
        print(f"{time.perf_counter() - begun:6.0f} s  {event.text}", flush=True) if event.kind != "progress" else None
        if event.kind == "end" and event.trial and event.facts.get("meets") and not first:
            first.append(time.perf_counter() - begun)

    result = dw.compress(
        model, data=data, goals=goals, out=out, budget=budget, epochs=options.epochs, seed=options.seed, watch=watch,
        resume=out.exists(), engine=options.engine,
    )  # fmt: skip
    report = result.report
    before, after = report["baseline"], report["result"]
    early = first[0] if first else float("nan")
    print(f"met: {result.met}, after {time.perf_counter() - begun:.0f} s; the first file that met the goals after "
          f"{early:.0f} s, {early / took:.2f} of the original's training")  # fmt: skip
    print(f"judged on {report['metric']['judged_on']} data: {before['accuracy']:.4f} -> {after['accuracy']:.4f}, "
          f"{before['size_bytes']:,} -> {after['size_bytes']:,} bytes "
          f"({before['size_bytes'] / after['size_bytes']:.1f}x), p50 {before['latency_ms']['p50'] * 1000:.1f} -> "
          f"{after['latency_ms']['p50'] * 1000:.1f} us "
          f"({before['latency_ms']['p50'] / after['latency_ms']['p50']:.2f}x)")  # fmt: skip
    rows = {trial["id"]: trial for trial in report["trials"]}
    pair = data["x_test"], data["y_test"]
    for name, number in report.get("alternatives", {}).items():
        trial = rows[number]
        tested = dw.measure(out / trial["file"], pair).accuracy
        print(f"{name}: [{number}] {trial['name']}: test {tested:.4f}, {trial['size_bytes']:,} bytes "
              f"({before['size_bytes'] / trial['size_bytes']:.1f}x), "
              f"{trial['baseline_p50_ms'] / trial['latency_ms']['p50']:.2f}x faster")  # fmt: skip
    print("; ".join(verdict["text"] for verdict in report["verdicts"]))


def workers(model: keras.Model, data: Any, took: float, folder: Path, options: argparse.Namespace) -> None:
    """Print the trials an hour with one worker and with two."""
    del took
    rates = []
    for count in (1, 2):
        begun = time.perf_counter()
        result = dw.compress(
            model, data=data, goals=dw.Goals(max_drop="0.1%", max_size="20KB"), out=folder / f"workers-{count}",
            epochs=options.epochs, trials=16, workers=count, engine=options.engine if count > 1 else "local",
            force=True, seed=options.seed,
        )  # fmt: skip
        done = sum(trial["status"] == "done" for trial in result.report["trials"])
        rates.append(3600 * done / (time.perf_counter() - begun))
        print(f"{count} worker(s): {done} trials, {rates[-1]:.0f} an hour", flush=True)
    print(f"{rates[1] / rates[0]:.2f} times the trials an hour with two workers")


if __name__ == "__main__":
    main()
