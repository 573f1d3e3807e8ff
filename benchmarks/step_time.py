"""What a technique costs: time of a training step against plain ``fit``, interleaved in one run.

python benchmarks/step_time.py
"""

from __future__ import annotations

import time

import keras
import numpy as np

import dwindle as dw

ROUNDS, STEPS, BATCH = 7, 40, 64


def mlp() -> keras.Model:
    """Return an MLP of 669,706 parameters."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((784,)), layers.Dense(512, activation="relu"), layers.Dense(512, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def cnn() -> keras.Model:
    """Return a small CNN."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def main() -> None:
    """Print the median time of a step of each technique as a factor of the plain step's."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 10, STEPS * BATCH)
    for name, build, shape in (("MLP", mlp, (784,)), ("CNN", cnn, (28, 28, 1))):
        x = generator.random((STEPS * BATCH, *shape)).astype(np.float32)
        model = build()
        schedule = dw.PolynomialDecay(end=10_000, frequency=100)
        every = dw.PolynomialDecay(end=10_000, frequency=1)
        runs = {
            "plain": model,
            "pruned, masks every 100 steps": dw.prune(model, 0.8, schedule=schedule),
            "pruned, masks every step": dw.prune(model, 0.8, schedule=every),
            "int8 in training": dw.quantize(model, "int8", data=x[:64]),
            "the same graph, plain": dw.lift(model),
            "distilled from itself": dw.distill(build(), model),
        }
        times: dict[str, list[float]] = {run: [] for run in runs}
        for run in runs.values():
            run.compile("adam", "sparse_categorical_crossentropy")
            run.fit(x, y, batch_size=BATCH, verbose=0)
        for _ in range(ROUNDS):
            for run, twin in runs.items():
                begun = time.perf_counter()
                twin.fit(x, y, batch_size=BATCH, verbose=0)
                times[run].append((time.perf_counter() - begun) / STEPS * 1000)
        plain = float(np.median(times["plain"]))
        print(f"{name}, {model.count_params():,} parameters: a plain step takes {plain:.2f} ms")
        for run, taken in times.items():
            print(f"  {run:32} {np.median(taken) / plain:.2f}x the plain step")


if __name__ == "__main__":
    main()
