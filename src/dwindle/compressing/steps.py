"""Doing the steps of a plan, with the same functions that a user calls by hand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.clustering import cluster
from dwindle.compressing.events import Event, Tell
from dwindle.compressing.shifting import LARGEST_SHIFT, SMALLEST, Shifted, shifts
from dwindle.compressing.stages import Stages
from dwindle.data import Split
from dwindle.distillation import distill, ends_in, record
from dwindle.errors import ConfigError
from dwindle.exporting import pack_inputs
from dwindle.factorization import factorize
from dwindle.feeding import fed
from dwindle.interruption import Interruption, StopTraining
from dwindle.pruning import PolynomialDecay, prune
from dwindle.quantization import quantize
from dwindle.seeding import seeded
from dwindle.shrinking import shrink

BATCH_SIZE = 64
# Steps between two looks at callbacks: small models train up to a third faster, to the same bits.
STEPS_AT_ONCE = 8
# A schedule of pruning ends here, so that the rest of the training repairs what was removed.
PRUNING_SHARE = 0.6
# Criteria of channels that look at gradients, and at how many samples.
GRADIENT_CRITERIA, SAMPLES = ("taylor", "fisher"), 512


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What steps work with.

    Attributes:
        original: The model to compress; it is also the teacher.
        train: Training samples, or None.
        loss: Loss of the training.
        distills: Whether the original can teach (one output of at least two classes).
        seed: Seeds weights and the order of samples.
        tell: Called with progress.
        interruption: Asked at each step and batch.
        folder: Where what the original says of the training samples is recorded, once for all trials; None: it is asked
            in every step.
        stages: Where trained models are kept for other plans that begin alike; None: nowhere.
    """

    original: keras.Model
    train: Split | None
    loss: Any
    distills: bool
    seed: int
    tell: Tell
    interruption: Interruption = field(default_factory=Interruption)
    folder: Path | None = None
    stages: Stages | None = None


def run_steps(steps: Sequence[tuple[str, Mapping[str, Any]]], bench: Workbench) -> keras.Model:
    """Do every step but the export; return the model to export.

    Each step has a seed of its own, made from the bench's seed and all steps up to it: the same steps make the same
    model, whether they are done in one go or from a stage that was kept.
    """
    steps = [pair for pair in steps if pair[0] != "export"]
    done, model = (0, None) if bench.stages is None else bench.stages.nearest(steps)
    model = bench.original if model is None else model
    for number, (step, options) in list(enumerate(steps))[done:]:
        bench.interruption.check()
        first = steps[: number + 1]
        with seeded(_seed(first, bench.seed)):
            if step == "prune":
                coming = next((o for s, o in steps[number + 1 :] if s == "train"), None)
                model = _prune(model, options, coming, bench)
            else:
                model = _STEPS[step](model, options, bench)
        if step == "train" and bench.stages is not None and all(name != "quantize" for name, _ in first):
            bench.stages.keep(first, model)
    return model


def _seed(steps: Sequence[tuple[str, Mapping[str, Any]]], seed: int) -> int:
    told = json.dumps([seed, [[step, dict(options)] for step, options in steps]], sort_keys=True)
    return int.from_bytes(hashlib.sha256(told.encode("utf8")).digest()[:4], "little")


def _shrink(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    return shrink(
        model, width=options["width"], depth=options["depth"], start=options["start"], multiple=options["multiple"],
        seed=bench.seed,
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
    if structure == "depth":  # what is cut is gone at once
        return prune(model, options["sparsity"], structure=structure)
    if structure == "channel":
        data = _labelled(bench) if options["criterion"] in GRADIENT_CRITERIA else None
        return prune(
            model, options["sparsity"], structure=structure, scope=options["scope"], criterion=options["criterion"],
            target=options["target"], multiple=options["multiple"], data=data,
            loss=None if data is None else bench.loss,
        )  # fmt: skip
    schedule = None
    if training is not None:
        steps = training["epochs"] * _steps_per_epoch(_need(bench))
        end = max(1, round(steps * PRUNING_SHARE))
        schedule = PolynomialDecay(end=end, frequency=max(1, end // 10))
    return prune(
        model, options["sparsity"], structure=structure, scope=options["scope"], criterion=options["criterion"],
        schedule=schedule,
    )  # fmt: skip


def _labelled(bench: Workbench) -> dict[str, Any]:
    """Return labelled samples for criteria that look at gradients."""
    split = _need(bench).take(SAMPLES)
    numbered = {f"x_train_{number}": array for number, array in enumerate(split.x)}
    return ({"x_train": split.x[0]} if len(split.x) == 1 else numbered) | {"y_train": split.y}


def _train(model: keras.Model, options: Mapping[str, Any], bench: Workbench) -> keras.Model:
    split = _need(bench)
    if model is bench.original:
        raise ConfigError(
            "a plan trains the model as it came; put a step such as `shrink`, `prune` or `quantize` before `train`"
        )
    learner, x = model, pack_inputs(model, split.x)
    if not 0 <= options["shift"] <= LARGEST_SHIFT:
        raise ConfigError(f"a plan has `shift: {options['shift']}`; it must be from 0 to {LARGEST_SHIFT}")
    moves = options["shift"] > 0
    if moves and not shifts(bench.original, split):
        raise ConfigError(
            f"a plan has `shift: {options['shift']}`, which is for models that take one image of at least {SMALLEST} x "
            f"{SMALLEST} and name its class, and for labels that are classes; leave it out"
        )
    if bench.distills:
        teacher: Any = bench.original
        if bench.folder is not None and not moves:  # of shifted images there is no record
            teacher = record(bench.original, x, bench.folder)
        learner = distill(model, teacher, temperature=options["temperature"], alpha=options["alpha"])
    steps = options["epochs"] * _steps_per_epoch(split)
    rate = keras.optimizers.schedules.CosineDecay(options["learning_rate"], decay_steps=max(1, steps))
    at_once = STEPS_AT_ONCE if keras.backend.backend() == "tensorflow" else 1  # PyTorch has no such loop
    learner.compile(keras.optimizers.Adam(rate), loss=bench.loss, steps_per_execution=at_once)
    given: dict[str, Any] = {"x": x, "y": split.y, "batch_size": BATCH_SIZE}
    if not bench.distills:  # else the coach sees to it
        given = fed(**given)
    if moves:
        moved = Shifted(split.x[0], np.asarray(split.y), options["shift"], BATCH_SIZE, int(np.random.randint(2**31)))
        given = {"x": moved, "shuffle": False}
    learner.fit(
        **given, epochs=options["epochs"], verbose=0,
        callbacks=[_Progress(bench.tell, options["epochs"]), StopTraining(bench.interruption)],
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

    def __init__(self, tell: Tell, epochs: int) -> None:
        super().__init__()
        self._tell = tell
        self._epochs = epochs

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Say how far it is."""
        loss = float((logs or {}).get("loss", float("nan")))
        text = f"epoch {epoch + 1}/{self._epochs}, loss {loss:.4f}"
        facts = {"epoch": epoch + 1, "epochs": self._epochs, "loss": loss}
        self._tell(Event(kind="progress", text=text, facts=facts))


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
