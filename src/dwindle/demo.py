"""The demo: LeNet-5 on MNIST digits, trained here and compressed to stated goals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from dwindle.compressing import Goals, Result, compress
from dwindle.compressing.events import Event, Tell
from dwindle.data import Data, load_demo_data
from dwindle.seeding import seeded

GOALS = Goals(max_drop="0.5%", max_size="45KB", max_latency="0.5x")
EPOCHS = 8
# Enough for a file well within the goals; more would take longer than one waits for a demo.
TRIALS = 28


def lenet5() -> keras.Model:
    """Return LeNet-5 as Caffe has it: 431,080 parameters, input ``(28, 28, 1)`` in [0, 1], 10 classes.

    References:
        LeCun et al. 1998, Gradient-based learning applied to document recognition.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1), name="image"),
            layers.Conv2D(20, 5, name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(50, 5, name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(500, activation="relu", name="dense1"),
            layers.Dense(10, activation="softmax", name="digit"),
        ],
        name="lenet5",
    )


def train_original(data: Data, *, epochs: int, seed: int, tell: Tell) -> keras.Model:
    """Train the demo's original on the training images."""
    assert data.train is not None  # noqa: S101 - the demo's data has training images
    with seeded(seed):
        model = lenet5()
        steps = epochs * (len(data.train) // 64 + 1)
        rate = keras.optimizers.schedules.CosineDecay(1e-3, decay_steps=steps)
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        for epoch in range(epochs):
            logs = model.fit(
                data.train.x[0], data.train.y, batch_size=64, initial_epoch=epoch, epochs=epoch + 1, verbose=0
            )
            reached = logs.history["accuracy"][-1]
            text = f"original: epoch {epoch + 1}/{epochs}, training accuracy {reached:.4f}"
            tell(Event(kind="progress", text=text, facts={"epoch": epoch + 1, "epochs": epochs}))
    return model


def run_demo(
    *,
    out: str | Path,
    epochs: int | None = None,
    seed: int = 0,
    threads: int = 1,
    resume: bool = False,
    force: bool = False,
    watch: Tell,
    command: str | None = None,
) -> Result:
    """Train LeNet-5 on the shipped digits (or all of MNIST from the Keras cache) and compress it to `GOALS`."""
    data = load_demo_data()
    counts: dict[str, Any] = {n: len(s) for n, s in (("training", data.train), ("test", data.test)) if s is not None}
    say = _notes(watch)
    say(f"data: {data.source}, " + ", ".join(f"{count:,} {name} images" for name, count in counts.items()))
    say(f"goals: at most 0.5 points less accuracy, at most 45 KB, at most half of the time; results in {out}")
    model = train_original(data, epochs=epochs or EPOCHS, seed=seed, tell=watch)
    return compress(
        model, goals=GOALS, out=out, data=data, seed=seed, threads=threads, trials=TRIALS, resume=resume, force=force,
        watch=watch, source="LeNet-5, trained by the demo", command=command,
    )  # fmt: skip


def _notes(tell: Tell) -> Callable[[str], None]:
    return lambda text: tell(Event(kind="note", text=text))
