"""What a distillation step costs: a plain step of the student, recorded outputs, the teacher itself; interleaved.

python benchmarks/distillation_steps.py

A teacher of several times the student's size, whose outputs are recorded once. A factor is the median over rounds, in
each of which all take turns: what else the machine does changes from round to round.
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

import dwindle as dw
from dwindle.distillation import record

ROUNDS, STEPS, BATCH = 25, 60, 64


def mlp(width: int) -> keras.Model:
    """Return a network of two hidden layers."""
    layers = keras.layers
    hidden = [layers.Dense(width, activation="relu"), layers.Dense(width, activation="relu")]
    return keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *hidden, layers.Dense(10)])


def cnn(width: int) -> keras.Model:
    """Return a network of three convolutions."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(width, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(2 * width, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(2 * width, 3, activation="relu"), layers.Flatten(), layers.Dense(10),
        ]
    )  # fmt: skip


def main() -> None:
    """Print the time of a step as a factor of the student's plain step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    x = generator.random((STEPS * BATCH, 28, 28, 1)).astype(np.float32)
    y = generator.integers(0, 10, len(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    print("| student | parameters | teacher | plain step | recorded outputs | the teacher itself |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, build, small, large in (("MLP", mlp, 512, 1200), ("CNN", cnn, 16, 64)):
        with tempfile.TemporaryDirectory() as folder:
            teacher = build(large)
            said = record(teacher, x, Path(folder) / "said")
            runs = {"plain": build(small), "recorded": dw.distill(build(small), said),
                    "itself": dw.distill(build(small), teacher)}  # fmt: skip
            times: dict[str, list[float]] = {run: [] for run in runs}
            for run in runs.values():
                run.compile("adam", loss)
                run.fit(x, y, batch_size=BATCH, verbose=0)
            for _ in range(options.rounds):
                for run, model in runs.items():
                    begun = time.perf_counter()
                    model.fit(x, y, batch_size=BATCH, verbose=0)
                    times[run].append((time.perf_counter() - begun) / STEPS * 1000)
            recorded, itself = (np.median(np.divide(times[run], times["plain"])) for run in ("recorded", "itself"))
            print(
                f"| {name} | {runs['plain'].count_params():,} | {teacher.count_params():,} | "
                f"{np.median(times['plain']):.2f} ms | {recorded:.2f}x | {itself:.2f}x |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
