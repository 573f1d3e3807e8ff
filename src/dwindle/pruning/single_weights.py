"""Pruning that leaves shapes as they are: single weights, blocks and patterns become zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dwindle.attaching import attach, strip, weight_value
from dwindle.errors import ConfigError, UnsupportedModelError, check_choice
from dwindle.pruning.criteria import Criterion, Evidence, Key, criterion_of
from dwindle.pruning.masks import Mask, importance_mask, rate_units, removed_count
from dwindle.pruning.regularization import L1Penalty
from dwindle.pruning.schedules import Schedule, schedule_from_dict
from dwindle.pruning.selection import smallest
from dwindle.pruning.structures import Element, Pattern, structure_of
from dwindle.transformed_layers import resolve
from dwindle.weights import Slot, Transform, check_model, model_slots, select, walk_layers

SCOPES = ("layer", "global")


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """A weight that is going to be pruned.

    Attributes:
        value: The weight as the layer computes with it.
        gone: Boolean: where an earlier pruning has removed it.
        outputs: Axes that count outputs.
        units: Number of its units.
        removable: How many of them can go.
    """

    value: np.ndarray
    gone: np.ndarray
    outputs: tuple[int, ...]
    units: int
    removable: int


def prune_weights(
    model: keras.Model,
    sparsity: float | None = None,
    *,
    structure: Any = "element",
    criterion: Any = "magnitude",
    scope: str = "layer",
    schedule: Schedule | Mapping[str, Any] | None = None,
    layers: str | Sequence[str] | None = None,
    l1: float = 0.0,
    data: Any = None,
    loss: Any = None,
) -> keras.Model:
    """Return a twin of ``model`` with masks on its weights; `dwindle.prune` documents the arguments."""
    kind, judge = structure_of(structure), criterion_of(criterion)
    target = _target(sparsity, kind, structure)
    check_choice("scope", scope, SCOPES)
    regularizers = [*judge.transforms(), *([L1Penalty(strength=l1)] if l1 > 0 else [])]
    if not l1 >= 0:
        raise ConfigError(f"`l1` is {l1!r}; it must be 0 or above, such as 1e-4")
    if target == 0 and not regularizers:
        raise ConfigError("`sparsity` and `l1` are both 0, so there is nothing to do; pass one of them")
    if isinstance(schedule, Mapping):
        schedule = schedule_from_dict(schedule)
    _check_schedule(schedule, kind, judge)
    check_model(model)
    chosen = _chosen(model, layers, kind, structure)
    new: dict[Key, list[Transform]] = {key: list(regularizers) for key in chosen}
    if target > 0:
        masks = _masks(model, chosen, target, kind, judge, scope, schedule, data=data, loss=loss)
        new = {key: [mask, *new[key]] for key, mask in masks.items()}
    return attach(model, new)


def _target(sparsity: float | None, kind: Element, structure: Any) -> float:
    if isinstance(kind, Pattern):
        own = kind.zeros / kind.group
        if sparsity is not None and sparsity != own:
            raise ConfigError(
                f"`sparsity` is {sparsity!r}, but `structure` {structure!r} has {kind.zeros} zeros of {kind.group}, "
                f"which is {own:g}; leave `sparsity` out"
            )
        return own
    if sparsity is None:
        return 0.8
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ConfigError(f"`sparsity` is {sparsity!r}; it must be a fraction of zeros in [0, 1), such as 0.8")
    return float(sparsity)


def _check_schedule(schedule: Any, kind: Element, judge: Criterion) -> None:
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ConfigError(f"`schedule` is {schedule!r}; it must be a Constant, a PolynomialDecay or the dict of one")
    if schedule is None and judge.needs_schedule:
        raise ConfigError(
            f"`criterion` {type(judge).__name__.lower()} learns its scores in training, so it needs a `schedule`, such "
            "as PolynomialDecay(begin=100, end=1000)"
        )
    if schedule is not None and schedule.regrow and (isinstance(kind, Pattern) or judge.rating == "movement"):
        raise ConfigError("`regrow` of the schedule works with single weights and blocks, and not with movement")


def _chosen(
    model: keras.Model, layers: str | Sequence[str] | None, kind: Element, structure: Any
) -> dict[Key, _Chosen]:
    by_path = model_slots(model)
    picked = select(list(by_path), layers)
    slots = {(path, slot.key): slot for path in picked for slot in by_path[path] if slot.prunable or layers is not None}
    if not slots:
        raise UnsupportedModelError(
            f"`model` ({model.name}) has no dense, convolution or recurrent kernels to prune"
            + (f"; name these to prune them all the same: {', '.join(by_path)}" if by_path else "")
        )
    owners = dict(walk_layers(model))
    masks = _masked_away(model)
    found: dict[Key, _Chosen] = {}
    reasons = {}
    for key, slot in slots.items():
        outputs = output_axes(owners[key[0]], slot)
        reason = kind.misfit(slot.shape, outputs)
        if reason is not None:
            reasons["/".join(key)] = reason
            continue
        value = weight_value(model, *key)
        found[key] = _Chosen(
            value=value, gone=masks.get(key, np.zeros(value.shape, bool)), outputs=outputs,
            units=kind.units(slot.shape, outputs), removable=kind.removable(slot.shape, outputs),
        )  # fmt: skip
    if reasons and (layers is not None or not found):
        name, reason = next(iter(reasons.items()))
        raise ConfigError(
            f"`structure` {structure!r} does not fit `{name}`: {reason}; choose other `layers` or another structure"
        )
    return found


def output_axes(layer: Any, slot: Slot) -> tuple[int, ...]:
    """Return the axes of a weight that count outputs; all others count what it multiplies."""
    owner, _ = resolve(layer, slot.key)
    if isinstance(owner, keras.layers.EinsumDense):
        given, made = owner.equation.replace(" ", "").split("->")
        kernel = given.split(",")[1]
        return tuple(axis for axis, label in enumerate(kernel) if label in made) or slot.channel_axes
    return slot.channel_axes


def _masked_away(model: keras.Model) -> dict[Key, np.ndarray]:
    """Map each weight with a mask to where it is removed."""
    found: dict[Key, np.ndarray] = {}
    for path, layer in walk_layers(model):
        for key in layer.__dict__.get("_dwindle_transforms", {}):
            for transform, state in layer.transforms_and_states(key):
                if transform.kind in ("mask", "keep_zeros"):
                    gone = keras.ops.convert_to_numpy(state["mask"]) < 0.5
                    found[path, key] = found.get((path, key), np.zeros(gone.shape, bool)) | gone
    return found


def _masks(
    model: keras.Model,
    chosen: Mapping[Key, _Chosen],
    target: float,
    kind: Element,
    judge: Criterion,
    scope: str,
    schedule: Schedule | None,
    *,
    data: Any,
    loss: Any,
) -> dict[Key, Mask]:
    scores = _scores(model, chosen, judge, data, loss)
    before = {key: _gone_units(scores[key], one, kind) for key, one in chosen.items()}
    counts = _counts(scores, chosen, target, kind, scope)
    calls = _calls_per_step(model)
    masks = {}
    for key, one in chosen.items():
        removed = max(before[key], counts[key])
        masks[key] = Mask(
            removed=removed,
            structure=kind,
            outputs=one.outputs,
            schedule=schedule,
            removed_before=before[key],
            rating=judge.rating,
            calls_per_step=calls.get(key[0], 1),
            mask=importance_mask(scores[key], one.gone, removed, kind, one.outputs) if schedule is None else ~one.gone,
            scores=scores[key],
        )
    return masks


def _scores(
    model: keras.Model, chosen: Mapping[Key, _Chosen], judge: Criterion, data: Any, loss: Any
) -> dict[Key, np.ndarray]:
    values = {key: one.value for key, one in chosen.items()}
    outputs = {key: one.outputs for key, one in chosen.items()}
    if judge.needs_data:
        loss = getattr(model, "loss", None) if loss is None else loss
        evidence = Evidence(model=strip(model), values=values, outputs=outputs, data=data, loss=loss)
    else:
        evidence = Evidence(model=model, values=values, outputs=outputs)
    # A weight that is zero already can go whatever the criterion says of it.
    return {
        key: np.where(values[key] == 0, 0, score).astype(np.float32) for key, score in judge.scores(evidence).items()
    }


def _gone_units(scores: np.ndarray, one: _Chosen, kind: Element) -> int:
    rating = rate_units(np, scores, one.gone, kind, one.outputs)
    blocked = kind.blocked(np, rating, scores.shape, one.outputs)
    gone = rating < 0 if blocked is None else (rating < 0) & ~blocked
    return int(gone.sum())


def _counts(
    scores: Mapping[Key, np.ndarray], chosen: Mapping[Key, _Chosen], target: float, kind: Element, scope: str
) -> dict[Key, int]:
    """Return how many units of each weight go: the same share of all, or what one ranking over all of them says."""
    if isinstance(kind, Pattern):
        return {key: one.removable for key, one in chosen.items()}
    if scope == "layer":
        return {key: removed_count(one.units, one.removable, target) for key, one in chosen.items()}
    ratings = []
    for key, one in chosen.items():
        rating = rate_units(np, scores[key], one.gone, kind, one.outputs).copy()
        rating[np.argmax(rating)] = np.inf  # one unit of each weight stays
        ratings.append(rating)
    sizes = [one.units for one in chosen.values()]
    removable = sum(one.removable for one in chosen.values())
    gone = smallest(np.concatenate(ratings), removed_count(sum(sizes), removable, target))
    parts = np.split(gone, np.cumsum(sizes)[:-1])
    return {key: int(part.sum()) for key, part in zip(chosen, parts, strict=True)}


def _calls_per_step(model: keras.Model) -> dict[str, int]:
    """Return how often the model calls each of its layers, for layers that it shares."""
    config = model.get_config()
    entries = config.get("graph", config).get("layers", [])
    counts = {entry["config"].get("name"): max(1, len(entry.get("inbound_nodes", []) or [])) for entry in entries}
    return {path: counts.get(path, 1) for path, _ in walk_layers(model)}
