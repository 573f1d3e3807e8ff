"""Masks: which weights are removed, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.pruning.schedules import Schedule, schedule_from_dict
from dwindle.pruning.selection import first_in_order, smallest, smallest_in_graph
from dwindle.pruning.structures import Element, structure_from_dict
from dwindle.weights import Transform

#: Weights of up to this many units are ranked at every change of the mask. Larger ones share a ranking among changes
#: of 8 steps, and one more for every so many units, but of at most `LONGEST_WINDOW` steps: those next in rank go.
RANKED_AT_ONCE, LONGEST_WINDOW = 4096, 128

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
    stays: np.ndarray = structure.spread(np, keep, importance.shape, outputs) & ~gone
    return stays


def rate_units(xp: Any, importance: Any, gone: Any, structure: Element, outputs: Sequence[int]) -> Any:
    """Return the importance of each unit, -1 for units that are gone wholly."""
    if structure.single:
        return xp.where(xp.reshape(gone, (-1,)), -1.0, structure.rate(xp, importance, outputs))
    kept = xp.where(gone, 0.0, importance)
    rating = structure.rate(xp, kept, outputs)
    alive = structure.rate(xp, xp.where(gone, 0.0, xp.ones_like(kept)), outputs)
    return xp.where(alive > 0, rating, -1.0)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the changes of one weight's mask are made: all by a selection of their own, or from rankings.

    Attributes:
        window: Changes that share a ranking; 0 where none do.
        lead: 1 where the first change is made by a selection of its own.
        most: Units that the largest change from a ranking removes.
        length: Units that the changes of a window remove at most.
    """

    window: int = 0
    lead: int = 0
    most: int = 0
    length: int = 0


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
    def _changes(self) -> tuple[np.ndarray, np.ndarray]:
        """The call at which each change of the mask is made, and the units removed after it.

        Where removed units stay removed, changes that remove nothing are left out.
        """
        if self.schedule is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        steps = self.schedule.steps()
        counts = np.minimum(np.round(self.schedule.share(steps) * self.removed), self.removed).astype(np.int32)
        counts[-1] = self.removed
        counts = np.maximum(counts, self.removed_before)
        if self.rating != "movement" and not self._regrows:
            real = np.diff(counts, prepend=self.removed_before) > 0
            steps, counts = steps[real], counts[real]
        return (steps * self.calls_per_step).astype(np.int32), counts

    def _plan(self, units: int) -> _Plan:
        """Say how the changes of a weight of so many units are made."""
        changes = np.diff(self._changes[1], prepend=self.removed_before)
        if self.schedule is None or self.rating == "movement" or self._regrows or not len(changes):
            return _Plan()
        steps = 1 if units <= RANKED_AT_ONCE else min(LONGEST_WINDOW, 8 + units // RANKED_AT_ONCE)
        window = max(1, min(len(changes), -(-steps // self.schedule.beat)))
        # A first change much larger than the others is made by itself.
        lead = int(len(changes) > 1 and changes[0] > 4 * changes[1:].max())
        rest = changes[lead:]
        length = max(int(rest[begin : begin + window].sum()) for begin in range(0, len(rest), window))
        ranked = window > 1 or length <= units // 64
        return _Plan(window=window, lead=lead, most=int(rest.max()), length=length) if ranked else _Plan()

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the mask, and what the schedule and the rating need."""
        mask = np.ones(shape, bool) if self.mask is None else np.asarray(self.mask, bool)
        state: dict[str, np.ndarray] = {"mask": mask}
        if self.schedule is not None:
            state["calls"] = np.zeros((1,), np.int32)
            state["changes"] = np.zeros((1,), np.int32)
            plan = self._plan(self.structure.units(shape, self.outputs))
            if plan.window > 1:
                state["queue"] = np.zeros((plan.window, plan.most), np.int32)
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
        calls, changes = state["calls"], state["changes"].value
        due_at = ops.convert_to_tensor(np.append(self._changes[0], np.int32(-1)))
        due = ops.reshape(ops.equal(calls.value, ops.slice(due_at, changes, (1,))), ())
        names = [name for name in ("mask", "changes", "queue", "offset") if name in state]
        weight = ops.stop_gradient(ops.convert_to_tensor(weight))
        before = {name: ops.convert_to_tensor(state[name].value) for name in names}

        def change() -> list[Any]:
            changed = {**before, **self._changed(weight, state, before), "changes": before["changes"] + 1}
            return [changed[name] for name in names]

        if keras.backend.backend() == "tensorflow":
            _assign_where_due(due, change, [state[name] for name in names])
        else:
            after = ops.cond(due, change, lambda: [before[name] for name in names])
            for name, value in zip(names, after, strict=True):
                state[name].assign(value)
        calls.assign(calls.value + 1)

    def _changed(self, weight: Any, state: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the new values of the variables that a change of the mask sets."""
        if self._regrows:
            return self._regrown(weight, state, before)
        ops = keras.ops
        shape = tuple(int(size) for size in weight.shape)
        plan = self._plan(self.structure.units(shape, self.outputs))
        if not plan.window:
            return {"mask": self._selected(weight, state, before, shape)}
        if not plan.lead:
            return self._next_in_rank(weight, state, before, shape, plan)
        names = ["mask", "queue"] if plan.window > 1 else ["mask"]

        def first() -> list[Any]:
            made = {**before, "mask": self._selected(weight, state, before, shape)}
            return [made[name] for name in names]

        def later() -> list[Any]:
            made = self._next_in_rank(weight, state, before, shape, plan)
            return [made[name] for name in names]

        is_first = ops.reshape(ops.equal(before["changes"], 0), ())
        return dict(zip(names, ops.cond(is_first, first, later), strict=True))

    def _selected(
        self, weight: Any, state: Mapping[str, Any], before: Mapping[str, Any], shape: tuple[int, ...]
    ) -> Any:
        """Return the mask without the least important units."""
        ops = keras.ops
        wanted = ops.reshape(ops.slice(ops.convert_to_tensor(self._changes[1]), before["changes"], (1,)), ())
        gone = smallest_in_graph(self._rated(weight, state, before["mask"], shape), wanted)
        keep = self.structure.spread(ops, ops.logical_not(gone), shape, self.outputs)
        return keep if self.rating == "movement" else ops.logical_and(keep, before["mask"])

    def _next_in_rank(
        self,
        weight: Any,
        state: Mapping[str, Any],
        before: Mapping[str, Any],
        shape: tuple[int, ...],
        plan: _Plan,
    ) -> dict[str, Any]:
        """Remove the units next in rank; rank anew where a window begins.

        The queue has a row for each change of a window: the units that it removes, filled up with its first.
        """
        ops = keras.ops
        changes = before["changes"]
        counts = np.concatenate([[self.removed_before], self._changes[1], np.full(plan.window, self.removed)])

        def rank() -> Any:
            rating = self._rated(weight, state, before["mask"], shape)
            order = first_in_order(ops.where(rating < 0, float("inf"), rating), plan.length)
            ends = ops.slice(ops.convert_to_tensor(counts.astype(np.int32)), changes, (plan.window + 1,))
            begins, places = ops.reshape(ends[:-1] - ends[:1], (-1, 1)), ops.arange(plan.most, dtype="int32")
            places = ops.where(places < ops.reshape(ends[1:] - ends[:-1], (-1, 1)), begins + places, begins)
            return ops.take(order, ops.minimum(places, plan.length - 1))

        new: dict[str, Any] = {}
        if plan.window == 1:
            due = rank()
        else:
            place = (changes - plan.lead) % plan.window
            queue = new["queue"] = ops.cond(ops.reshape(ops.equal(place, 0), ()), rank, lambda: before["queue"])
            due = ops.slice(queue, ops.pad(place, ((0, 1),)), (1, plan.most))
        members = self.structure.members(shape, self.outputs)
        if members is not None:
            due = ops.take(ops.convert_to_tensor(members), due, axis=0)
        due = ops.reshape(due, (-1, 1))
        flat = ops.scatter_update(ops.reshape(before["mask"], (-1,)), due, ops.zeros((due.shape[0],), "bool"))
        new["mask"] = ops.reshape(flat, shape)
        return new

    def _regrown(self, weight: Any, state: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """Drop more units than are due, and bring those with the largest gradient back, as zeros."""
        ops = keras.ops
        shape = tuple(int(size) for size in weight.shape)
        units = self.structure.units(shape, self.outputs)
        share = self.schedule.swapped()  # type: ignore[union-attr]
        counts = self._changes[1]
        swapped = np.minimum(np.round(share * (units - counts)), units - 1 - counts).astype(np.int32)
        wanted = ops.reshape(ops.slice(ops.convert_to_tensor(counts), before["changes"], (1,)), ())
        back = ops.reshape(ops.slice(ops.convert_to_tensor(swapped), before["changes"], (1,)), ())
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


def _assign_where_due(due: Any, change: Callable[[], list[Any]], variables: Sequence[Any]) -> None:
    """Assign what ``change`` returns inside of the branch, so that a step in which nothing is due writes nothing."""
    import tensorflow as tf

    def assign() -> Any:
        for variable, value in zip(variables, change(), strict=True):
            variable.assign(value)
        return tf.constant(0)

    tf.cond(due, assign, lambda: tf.constant(0))


def _read(value: Any) -> Any:
    """Return a tensor even where TensorFlow passes its variable on, whose gradient would be asked for by name."""
    return keras.ops.reshape(value, value.shape)


def _upstream(args: tuple[Any, ...], upstream: Any) -> Any:
    return args[0] if upstream is None else upstream


def _masked(weight: Any, mask: Any) -> Any:
    """Return ``m w`` with gradient 1 by ``w``; a product takes TensorFlow half the time of a choice."""

    def masked(weight: Any) -> tuple[Any, Any]:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            return _upstream(args, upstream)

        return weight * keras.ops.cast(mask, weight.dtype), gradient

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
