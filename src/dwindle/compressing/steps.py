"""Doing the steps of a plan, with the same functions that a user calls by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.clustering import cluster
from dwindle.data import Split
from dwindle.distillation import distill, ends_in, record
from dwindle.errors import ConfigError
from dwindle.exporting import pack_inputs
from dwindle.factorization import factorize
from dwindle.interruption import Interruption, StopTraining
from dwindle.pruning import PolynomialDecay, prune
from dwindle.quantization import quantize
from dwindle.shrinking import shrink

BATCH_SIZE = 64
# A schedule of pruning ends here, so that the rest of the training repairs what was removed.
PRUNING_SHARE = 0.6

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What steps work with.

    Attributes:
        original: The model to compress; it is also the teacher.
        train: Training samples, or None.
        loss: Loss of the training.
        distills: Whether the original can teach (one output of at least two classes).
        seed: Seeds weights and the order of samples.
        say: Called with progress, one line.
        interruption: Asked at each step and batch.
        folder: Where what the original says of the training samples is recorded, once for all trials; None: it is asked
            in every step.
    """

    original: keras.Model
    train: Split | None
    loss: Any
    distills: bool
    seed: int
    say: Say
    interruption: Interruption = field(default_factory=Interruption)
    folder: Path | None = None


def run_steps(steps: Any, bench: Workbench) -> keras.Model:
    """Do every step but the export; return the model to export."""
    model = bench.original
    steps = list(steps)
    for number, (step, options) in enumerate(steps):
        bench.interruption.check()
        if step == "export":
            break
        if step == "prune":
            coming = next((o for s, o in steps[number + 1 :] if s == "train"), None)
            model = _prune(model, options, coming, bench)
        else:
            model = _STEPS[step](model, options, bench)
    return model


def _shrink(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    return shrink(
        model, width=options["width"], depth=options["depth"], start=options["start"], seed=bench.seed
    )  # fmt: skip


def _factorize(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    del bench
    return factorize(model, energy=options["energy"])


def _cluster(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    del bench
    return cluster(model, options["clusters"], options["init"], options["per_channel"])


def _quantize(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    return quantize(model, options["scheme"], data=None if bench.train is None else list(bench.train.x))


def _prune(
    model: keras.Model, options: Mapping[str, Any], training: Mapping[str, Any] | None, bench: Workbench
) -> keras.Model:
    structure = options["structure"]
    structure = tuple(structure) if isinstance(structure, list) else structure
    if structure in ("channel", "depth"):  # what is cut is gone at once
        return prune(model, options["sparsity"], structure=structure)
    schedule = None
    if training is not None:
        steps = training["epochs"] * _steps_per_epoch(_need(bench))
        end = max(1, round(steps * PRUNING_SHARE))
        schedule = PolynomialDecay(end=end, frequency=max(1, end // 10))
    return prune(model, options["sparsity"], structure=structure, schedule=schedule)


def _train(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    split = _need(bench)
    if model is bench.original:
        raise ConfigError(
            "a plan trains the model as it came; put a step such as `shrink`, `prune` or `quantize` before `train`"
        )
    learner, x = model, pack_inputs(model, split.x)
    if bench.distills:
        teacher = (
            bench.original if bench.folder is None else record(bench.original, x, bench.folder, progress=bench.say)
        )
        learner = distill(model, teacher, temperature=options["temperature"], alpha=options["alpha"])
    steps = options["epochs"] * _steps_per_epoch(split)
    rate = keras.optimizers.schedules.CosineDecay(options["learning_rate"], decay_steps=max(1, steps))
    learner.compile(keras.optimizers.Adam(rate), loss=bench.loss)
    learner.fit(
        x, split.y, batch_size=BATCH_SIZE, epochs=options["epochs"], verbose=0,
        callbacks=[_Progress(bench.say, options["epochs"]), StopTraining(bench.interruption)],
    )  # fmt: skip
    return model


_STEPS: dict[str, Callable[[keras.Model, Mapping[str, Any], Workbench], keras.Model]] = {
    "shrink": _shrink,
    "factorize": _factorize,
    "cluster": _cluster,
    "quantize": _quantize,
    "train": _train,
}


def _need(bench: Workbench) -> Split:
    if bench.train is None or bench.train.y is None:
        raise ConfigError("this plan trains, and there is no labelled training data; pass `train` (x_train, y_train)")
    return bench.train


def _steps_per_epoch(split: Split) -> int:
    return math.ceil(len(split) / BATCH_SIZE)


class _Progress(keras.callbacks.Callback):
    """Say the epoch and the loss."""

    def __init__(self, say: Say, epochs: int) -> None:
        super().__init__()
        self._say = say
        self._epochs = epochs

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Say how far it is."""
        self._say(f"epoch {epoch + 1}/{self._epochs}, loss {(logs or {}).get('loss', float('nan')):.4f}")


def training_loss(model: keras.Model, y: np.ndarray | None) -> Any:
    """Return the loss to train with: the model's own if it was compiled, else by its output and the labels.

    Args:
        model: The original.
        y: Training labels; None where there are none.
    """
    compiled = getattr(model, "loss", None)
    if compiled is not None and getattr(model, "compiled", False):
        return compiled
    units = model.outputs[0].shape[-1]
    if len(model.outputs) == 1 and units is not None and units > 1 and y is not None:
        logits = not ends_in(model, "softmax")
        if np.issubdtype(y.dtype, np.integer) and (y.ndim == 1 or y.shape[-1] == 1):
            return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
        if y.ndim == 2 and y.shape[1] == units and np.allclose(y.sum(axis=1), 1):
            return keras.losses.CategoricalCrossentropy(from_logits=logits)
    if len(model.outputs) == 1 and ends_in(model, "sigmoid"):
        return keras.losses.BinaryCrossentropy()
    return keras.losses.MeanSquaredError()
