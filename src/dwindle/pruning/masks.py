"""Masks: which weights are removed, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.pruning.schedules import Schedule, schedule_from_dict
from dwindle.pruning.selection import first_in_order, smallest, smallest_in_graph
from dwindle.pruning.structures import Element, structure_from_dict
from dwindle.weights import Transform

#: Weights of up to this many units are ranked at every change of the mask; larger ones once in ``units / this`` steps,
#: and no less often than every `LONGEST_WINDOW` steps. In between, those next in rank go.
UNITS_PER_RANKING_STEP, LONGEST_WINDOW = 4096, 128

RATINGS = ("magnitude", "given", "movement")


def removed_count(units: int, removable: int, sparsity: float) -> int:
    """Return how many of ``units`` are removed at a sparsity: the nearest whole number, if so many can go."""
    return min(round(units * sparsity), removable)


def importance_mask(
    importance: np.ndarray, gone: np.ndarray, removed: int, structure: Element, outputs: Sequence[int]
) -> np.ndarray:
    """Return the mask that drops the least important units.

    Args:
        importance: Importance of each weight, not negative.
        gone: Boolean, the same shape: weights removed already, which come first.
        removed: How many units go, those gone already included.
        structure: What a unit is.
        outputs: Axes of the weight that count outputs.

    Returns:
        Boolean, the same shape: True where a weight stays.
    """
    rating = rate_units(np, importance, gone, structure, outputs)
    blocked = structure.blocked(np, rating, importance.shape, outputs)
    if blocked is not None:
        rating = np.where(blocked, np.inf, rating)
    keep = ~smallest(rating, removed)
    return np.asarray(structure.spread(np, keep, importance.shape, outputs)) & ~gone


def rate_units(xp: Any, importance: Any, gone: Any, structure: Element, outputs: Sequence[int]) -> Any:
    """Return the importance of each unit, -1 for units that are gone wholly."""
    kept = xp.where(gone, 0.0, importance)
    rating = structure.rate(xp, kept, outputs)
    alive = structure.rate(xp, xp.where(gone, 0.0, xp.ones_like(kept)), outputs)
    return xp.where(alive > 0, rating, -1.0)


class Mask(Transform):
    """Set removed weights to zero: ``weight = m w`` with ``m`` 0 or 1.

    The mask changes at the steps that the schedule names, and is the layer's own variable, so that it is saved, loaded
    and exported with it. The gradient passes the mask unchanged: it moves removed raw values, which nothing reads, and
    a training step is spared a pass over the weight. Gradient clipping by norm counts it.

    Args:
        removed: Units that are removed in the end.
        structure: What a unit is.
        outputs: Axes of the weight that count outputs.
        schedule: When they go; None keeps the mask as it was made.
        removed_before: Units that are removed from the start.
        rating: ``"magnitude"``: ``|w|`` at each change; ``"given"``: the scores passed, as they are;
            ``"movement"``: scores that training learns.
        calls_per_step: How often one training step calls the layer (above 1 for a shared layer).
        mask: The mask to begin with, the weight's shape; not part of the config.
        scores: Importance of each weight, for ``"given"``; not part of the config.

    References:
        Sanh et al. 2020, Movement Pruning, arXiv 2005.07683, equations 2 and 3: ``dL/dS = dL/d(m w) w``. Evci et al.
        2020, arXiv 1911.11134, for regrowth.
    """

    kind: ClassVar[str] = "mask"
    order: ClassVar[int] = 10

    def __init__(
        self,
        *,
        removed: int,
        structure: Element | dict[str, Any] | None = None,
        outputs: Sequence[int] = (-1,),
        schedule: Schedule | dict[str, Any] | None = None,
        removed_before: int = 0,
        rating: str = "magnitude",
        calls_per_step: int = 1,
        mask: np.ndarray | None = None,
        scores: np.ndarray | None = None,
    ) -> None:
        self.removed = removed
        self.structure = structure_from_dict(structure) if isinstance(structure, dict) else structure or Element()
        self.outputs = tuple(outputs)
        self.schedule = schedule_from_dict(schedule) if isinstance(schedule, dict) else schedule
        self.removed_before = removed_before
        self.rating = rating
        self.calls_per_step = calls_per_step
        self.mask = mask
        self.scores = scores
        if rating == "movement":
            self.trained = ("scores",)
        elif self._regrows:
            self.trained = ("gradient",)

    @property
    def _regrows(self) -> bool:
        return self.schedule is not None and self.schedule.regrow > 0

    @cached_property
    def _counts(self) -> np.ndarray:
        """Units removed after each change of the mask; movement may bring units back, so its counts start anew."""
        if self.schedule is None:
            return np.zeros(0, np.int32)
        shares = self.schedule.share(self.schedule.steps())
        counts = np.minimum(np.round(shares * self.removed), self.removed).astype(np.int32)
        counts[-1] = self.removed
        return np.maximum(counts, self.removed_before)

    def _window(self, units: int) -> int:
        """Return how many changes of the mask share one ranking."""
        if self.schedule is None or self.rating == "movement" or self._regrows:
            return 1
        steps = min(LONGEST_WINDOW, -(-units // UNITS_PER_RANKING_STEP))
        return max(1, min(len(self._counts), -(-steps // self.schedule.beat)))

    def _most(self, changes: int) -> int:
        """Return the most units that go in ``changes`` changes that share a ranking."""
        before = np.concatenate([[self.removed_before], self._counts])
        starts = np.arange(0, len(self._counts), changes)
        ends = np.minimum(starts + changes, len(self._counts))
        return int((before[ends] - before[starts]).max())

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the mask, and what the schedule and the rating need."""
        mask = np.ones(shape, bool) if self.mask is None else np.asarray(self.mask, bool)
        state: dict[str, np.ndarray] = {"mask": mask}
        if self.schedule is not None:
            state["calls"] = np.zeros((), np.int32)
            units = self.structure.units(shape, self.outputs)
            window = self._window(units)
            if window > 1:
                state["queue"] = np.zeros((max(1, self._most(window)),), np.int32)
        if self.rating == "given" and self.schedule is not None:
            state["scores"] = (
                np.zeros(shape, np.float32) if self.scores is None else np.asarray(self.scores, np.float32)
            )
        if self.rating == "movement":
            state["scores"] = np.zeros(shape, np.float32)
        if self._regrows:
            state["gradient"] = np.zeros(shape, np.float32)
            state["offset"] = np.zeros(shape, np.float32)
        return state

    def prepare(self, raw: Any, state: Mapping[str, Any]) -> None:
        """Have optimizers write the gradient that regrowth needs, instead of stepping along it."""
        del raw
        if self._regrows:
            state["gradient"].overwrite_with_gradient = True

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the weight where the mask is True, and 0 elsewhere."""
        del layer
        mask = keras.ops.convert_to_tensor(state["mask"])
        if self.rating == "movement":
            return _masked_moving(weight, mask, keras.ops.convert_to_tensor(state["scores"]))
        if self._regrows:
            weight = weight - keras.ops.cast(keras.ops.convert_to_tensor(state["offset"]), weight.dtype)
            return _masked_watched(weight, mask, keras.ops.convert_to_tensor(state["gradient"]))
        return _masked(weight, mask)

    def update(self, weight: Any, state: Mapping[str, Any]) -> None:
        """Change the mask where the schedule says so."""
        if self.schedule is None:
            return
        ops = keras.ops
        calls = state["calls"]
        step = calls.value
        if self.calls_per_step > 1:
            step = ops.floor_divide(calls.value, self.calls_per_step)
        due = self.schedule.is_due(step)
        if self.calls_per_step > 1:
            due = ops.logical_and(due, ops.equal(calls.value % self.calls_per_step, 0))
        names = [name for name in ("mask", "queue", "offset") if name in state]
        weight = ops.stop_gradient(ops.convert_to_tensor(weight))
        before = {name: ops.convert_to_tensor(state[name].value) for name in names}

        def change() -> list[Any]:
            changed = {**before, **self._changed(weight, state, before, self.schedule.number(step))}  # type: ignore[union-attr]
            return [changed[name] for name in names]

        after = ops.cond(due, change, lambda: [before[name] for name in names])
        for name, value in zip(names, after, strict=True):
            state[name].assign(value)
        calls.assign(calls.value + 1)

    def _changed(self, weight: Any, state: Mapping[str, Any], before: Mapping[str, Any], number: Any) -> dict[str, Any]:
        """Return the new values of the variables that a change of the mask sets."""
        if self._regrows:
            return self._regrown(weight, state, before, number)
        shape = tuple(int(size) for size in weight.shape)
        units = self.structure.units(shape, self.outputs)
        window = self._window(units)
        if window == 1 and (self.rating == "movement" or self._most(1) > units // 64):
            wanted = keras.ops.take(keras.ops.convert_to_tensor(self._counts), number)
            gone = smallest_in_graph(self._rated(weight, state, before["mask"], shape), wanted)
            keep = self.structure.spread(keras.ops, keras.ops.logical_not(gone), shape, self.outputs)
            if self.rating != "movement":
                keep = keras.ops.logical_and(keep, before["mask"])
            return {"mask": keep}
        return self._next_in_rank(weight, state, before, number, window)

    def _next_in_rank(
        self, weight: Any, state: Mapping[str, Any], before: Mapping[str, Any], number: Any, window: int
    ) -> dict[str, Any]:
        """Remove the units next in rank; rank anew where a window begins."""
        ops = keras.ops
        shape = tuple(int(size) for size in weight.shape)
        length, most = max(1, self._most(window)), max(1, self._most(1))
        counts = ops.convert_to_tensor(np.concatenate([[self.removed_before], self._counts]).astype(np.int32))
        done, wanted = ops.take(counts, number), ops.take(counts, number + 1)

        def rank() -> Any:
            rating = self._rated(weight, state, before["mask"], shape)
            return first_in_order(ops.where(rating < 0, float("inf"), rating), length)

        new: dict[str, Any] = {}
        if window == 1:
            queue, begin = rank(), done
        else:
            place = number % window
            queue = new["queue"] = ops.cond(ops.equal(place, 0), rank, lambda: before["queue"])
            begin = ops.take(counts, number - place)
        # As many as the largest change takes; what this change does not take stands for its first once more.
        due = ops.slice(ops.pad(queue, ((0, most),)), ops.reshape(done - begin, (1,)), (most,))
        due = ops.where(ops.arange(most, dtype="int32") < wanted - done, due, due[:1])
        members = self.structure.members(shape, self.outputs)
        if members is not None:
            due = ops.reshape(ops.take(ops.convert_to_tensor(members), due, axis=0), (-1,))
        flat = ops.reshape(before["mask"], (-1,))
        stays = ops.logical_and(ops.take(flat, due), ops.equal(wanted, done))
        new["mask"] = ops.reshape(ops.scatter_update(flat, ops.expand_dims(due, 1), stays), shape)
        return new

    def _regrown(self, weight: Any, state: Mapping[str, Any], before: Mapping[str, Any], number: Any) -> dict[str, Any]:
        """Drop more units than are due, and bring those with the largest gradient back, as zeros."""
        ops = keras.ops
        shape = tuple(int(size) for size in weight.shape)
        units = self.structure.units(shape, self.outputs)
        share = self.schedule.swapped()  # type: ignore[union-attr]
        swapped = np.minimum(np.round(share * (units - self._counts)), units - 1 - self._counts).astype(np.int32)
        wanted = ops.take(ops.convert_to_tensor(self._counts), number)
        back = ops.take(ops.convert_to_tensor(swapped), number)
        weight = weight - ops.convert_to_tensor(before["offset"])
        gone = smallest_in_graph(self._rated(weight, state, before["mask"], shape), wanted + back)
        slope = self.structure.rate(ops, ops.abs(ops.convert_to_tensor(state["gradient"].value)), self.outputs)
        grown = smallest_in_graph(ops.where(gone, -slope, float("inf")), back)
        keep = self.structure.spread(ops, ops.logical_or(ops.logical_not(gone), grown), shape, self.outputs)
        new = ops.logical_and(keep, ops.logical_not(before["mask"]))
        return {"mask": keep, "offset": ops.where(new, before["offset"] + weight, before["offset"])}

    def _rated(self, weight: Any, state: Mapping[str, Any], mask: Any, shape: tuple[int, ...]) -> Any:
        """Return what units are ranked by; infinity for those that have to stay."""
        ops = keras.ops
        if self.rating == "movement":
            scores = ops.stop_gradient(ops.cast(ops.convert_to_tensor(state["scores"].value), "float32"))
            rating = self.structure.rate(ops, scores, self.outputs)
        else:
            source = state["scores"].value if self.rating == "given" else ops.abs(ops.cast(weight, "float32"))
            rating = rate_units(ops, ops.convert_to_tensor(source), ops.logical_not(mask), self.structure, self.outputs)
        blocked = self.structure.blocked(ops, rating, shape, self.outputs)
        return rating if blocked is None else ops.where(blocked, float("inf"), rating)

    def get_config(self) -> dict[str, Any]:
        """Return target, structure and schedule."""
        return {
            "removed": self.removed,
            "structure": self.structure.to_dict(),
            "outputs": list(self.outputs),
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "removed_before": self.removed_before,
            "rating": self.rating,
            "calls_per_step": self.calls_per_step,
        }


def _read(value: Any) -> Any:
    """Return a tensor even where TensorFlow passes its variable on, whose gradient would be asked for by name."""
    return keras.ops.reshape(value, value.shape)


def _upstream(args: tuple[Any, ...], upstream: Any) -> Any:
    return args[0] if upstream is None else upstream


def _masked(weight: Any, mask: Any) -> Any:
    """Return ``m w`` with gradient 1 by ``w``."""

    def masked(weight: Any) -> tuple[Any, Any]:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            return _upstream(args, upstream)

        return keras.ops.where(mask, weight, keras.ops.cast(0, weight.dtype)), gradient

    return keras.ops.custom_gradient(masked)(_read(weight))


def _masked_watched(weight: Any, mask: Any, watcher: Any) -> Any:
    """Return ``m w`` with gradient 1 by ``w``, which is the watcher's as well."""

    def masked(weight: Any, watcher: Any) -> tuple[Any, Any]:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            slope = _upstream(args, upstream)
            return slope, keras.ops.cast(slope, watcher.dtype)

        return keras.ops.where(mask, weight, keras.ops.cast(0, weight.dtype)), gradient

    return keras.ops.custom_gradient(masked)(_read(weight), _read(watcher))


def _masked_moving(weight: Any, mask: Any, scores: Any) -> Any:
    """Return ``m w`` with gradient ``m`` by ``w`` and ``w`` by the scores."""

    def masked(weight: Any, scores: Any) -> tuple[Any, Any]:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            slope = _upstream(args, upstream)
            zero = keras.ops.cast(0, slope.dtype)
            return keras.ops.where(mask, slope, zero), keras.ops.cast(slope * weight, scores.dtype)

        return keras.ops.where(mask, weight, keras.ops.cast(0, weight.dtype)), gradient

    return keras.ops.custom_gradient(masked)(_read(weight), _read(scores))
