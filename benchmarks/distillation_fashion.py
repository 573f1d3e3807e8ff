"""A student with a quarter of the parameters on Fashion-MNIST: alone, with each objective, and without labels.

python benchmarks/distillation_fashion.py --data fashion_mnist.npz

All students of a seed have the same start, the same batches and the same number of steps. Every accuracy is that of a
float32 file on the 10,000 test images. The teacher's outputs are recorded once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.distillation import AttentionMaps, Decoupled, LogitError, Relations, record
from dwindle.measuring.litert import LiteRTRunner


def network(width: int) -> keras.Model:
    """Return a network of three convolutions and a hidden layer."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    for number, (filters, strides) in enumerate(((width, 2), (2 * width, 1), (2 * width, 2))):
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU(name=f"map{number}")(layers.BatchNormalization()(x))
    x = layers.Dense(4 * width, activation="relu", name="hidden")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train(model: keras.Model, x: Any, y: Any, epochs: int, rate: float, seed: int) -> None:
    """Train with Adam and a falling rate; the order of samples follows the seed."""
    keras.utils.set_random_seed(seed)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(x) // 128))
    model.compile(keras.optimizers.Adam(schedule), LOSS)
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="fashion_mnist.npz of keras.datasets")
    parser.add_argument("--train", type=int, default=60_000, help="training images (default 60000)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of a student (default 20)")
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=20, help="width of the teacher's first layer (default 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", help="rows of the table (default: all); `alone` is always there")
    options = parser.parse_args()
    data = np.load(options.data)
    x, test = ((data[key][..., None] / 255).astype(np.float32) for key in ("x_train", "x_test"))
    y, labels = data["y_train"].astype(np.int64), data["y_test"]
    x, y = x[: options.train], y[: options.train]

    with tempfile.TemporaryDirectory() as folder:

        def accuracy(model: keras.Model) -> float:
            path = Path(folder) / "model.tflite"
            dw.export(model, path)
            return float((LiteRTRunner(path).predict([test])[0].argmax(1) == labels).mean() * 100)

        # The teacher sees images moved by up to two pixels; the students do not.
        keras.utils.set_random_seed(100)
        teacher = network(options.width)
        moved = keras.layers.RandomTranslation(0.07, 0.07, fill_mode="constant")
        train(keras.Sequential([keras.Input((28, 28, 1)), moved, teacher]), x, y, options.teacher_epochs, 3e-3, 100)
        said = record(teacher, x, Path(folder) / "said")
        print(f"teacher: {teacher.count_params():,} parameters, {accuracy(teacher):.2f}%", flush=True)

        def taught(**arguments: Any) -> Callable[[keras.Model], keras.Model]:
            arguments = {"teacher": said, "temperature": 4.0, "alpha": 0.9, **arguments}
            return lambda student: dw.distill(student, **arguments)

        maps = [AttentionMaps(student="map1", teacher="map1", weight=10.0)]
        rows: dict[str, tuple[Callable[[keras.Model], keras.Model], bool]] = {
            "alone": (lambda student: student, True),
            "soft targets": (taught(), True),
            "decoupled": (taught(objective=Decoupled(others=2.0)), True),
            "logit error": (taught(objective=LogitError(weight=1.0)), True),
            "soft targets and relations": (taught(objective=["soft", Relations(weight=5.0, angles=0.0)]), True),
            "soft targets and attention maps": (taught(teacher=teacher, features=maps), True),
            "soft targets, no labels": (taught(alpha=1.0), False),
        }
        found: dict[str, list[float]] = {}
        for seed in options.seeds:
            for name, (coach, labelled) in rows.items():
                if name != "alone" and options.rows and name not in options.rows:
                    continue
                student = dw.shrink(teacher, width=0.5, seed=seed)
                train(coach(student), x, y if labelled else None, options.epochs, 3e-3, seed)
                found.setdefault(name, []).append(accuracy(student))
                print(f"  seed {seed}, {name}: {found[name][-1]:.2f}%", flush=True)
        print(f"\nstudents: {student.count_params():,} parameters, {options.epochs} epochs of {len(x):,} images\n")
        print("| student | accuracy | mean | against alone |")
        print("| --- | --- | --- | --- |")
        alone = np.mean(found["alone"])
        for name, values in found.items():
            listed = " ".join(f"{value:.2f}" for value in values)
            print(f"| {name} | {listed} | {np.mean(values):.2f} | {np.mean(values) - alone:+.2f} |")


if __name__ == "__main__":
    main()
