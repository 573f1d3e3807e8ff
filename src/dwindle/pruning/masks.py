"""Masks over single weights: which are removed, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.pruning.schedules import Schedule, schedule_from_dict
from dwindle.weights import Transform


def removed_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights are removed at a sparsity; one is always kept."""
    return min(round(size * sparsity), size - 1) if size else 0


def keep_largest(importance: np.ndarray, removed: int) -> np.ndarray:
    """Return a 0/1 mask that drops the ``removed`` least important entries.

    Ties are broken by position: of two equally important weights the earlier one goes.

    Args:
        importance: Any shape, any real dtype.
        removed: How many entries become 0.

    Returns:
        float32 mask of the same shape with exactly ``removed`` zeros.
    """
    order = np.argsort(importance, axis=None, kind="stable")
    mask = np.ones(importance.size, dtype=np.float32)
    mask[order[:removed]] = 0.0
    return mask.reshape(importance.shape)


class MagnitudeMask(Transform):
    """Multiply the weight with a 0/1 mask that keeps the largest magnitudes.

    The mask is made from the weight at the steps that the schedule names, and is the layer's own variable, so that
    it is saved, loaded and exported with it. What was removed stays removed: later masks only remove more.

    Args:
        sparsity: Target fraction of zeros, in [0, 1).
        schedule: When the target is reached; None keeps the mask as it was made.
        calls_per_step: How often one training step calls the layer (above 1 for a shared layer).
        mask: The mask to begin with, the weight's shape; not part of the config.
    """

    kind: ClassVar[str] = "mask"
    order: ClassVar[int] = 10

    def __init__(
        self,
        *,
        sparsity: float,
        schedule: Schedule | dict[str, Any] | None = None,
        calls_per_step: int = 1,
        mask: np.ndarray | None = None,
    ) -> None:
        self.sparsity = sparsity
        self.schedule = schedule_from_dict(schedule) if isinstance(schedule, dict) else schedule
        self.calls_per_step = calls_per_step
        self.mask = mask

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the mask, and the count of calls where a schedule needs it."""
        state: dict[str, np.ndarray] = {
            "mask": np.ones(shape, np.float32) if self.mask is None else np.asarray(self.mask, np.float32)
        }
        if self.schedule is not None:
            state["calls"] = np.zeros((), np.int32)
        return state

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the weight where the mask is 1, and 0 elsewhere."""
        del layer
        # Not a product: autograd would keep the mask itself, which a later call of a shared layer may change.
        return keras.ops.where(state["mask"] > 0.5, weight, keras.ops.zeros_like(weight))

    def update(self, weight: Any, state: Mapping[str, Any]) -> None:
        """Make the mask anew where the schedule says so."""
        if self.schedule is None:
            return
        ops = keras.ops
        mask, calls = state["mask"], state["calls"]
        step = ops.floor_divide(calls.value, self.calls_per_step)
        due = ops.logical_and(self.schedule.is_due(step), ops.equal(calls.value % self.calls_per_step, 0))
        size = int(np.prod(weight.shape))
        wanted = ops.round(self.schedule.fraction(step) * self.sparsity * size)
        final = removed_count(size, self.sparsity)
        removed = ops.where(step >= self.schedule.last_step, final, ops.minimum(ops.cast(wanted, "int32"), final))

        def made() -> Any:
            importance = ops.reshape(ops.abs(ops.cast(weight, "float32")) * mask.value, (-1,))
            # Weights that are gone already come first, whatever their index.
            importance = ops.where(ops.reshape(mask.value, (-1,)) > 0, importance, -1.0)
            # The value up to which weights go; of those that equal it the first ones, so that the count is exact.
            last = ops.take(ops.sort(importance), ops.maximum(removed - 1, 0))
            below = importance < last
            level = ops.equal(importance, last)
            left = removed - ops.sum(ops.cast(below, "int32"))
            gone = ops.logical_or(below, ops.logical_and(level, ops.cumsum(ops.cast(level, "int32")) <= left))
            return ops.reshape(1.0 - ops.cast(gone, "float32"), weight.shape)

        mask.assign(ops.cond(due, made, lambda: mask.value))
        calls.assign(calls.value + 1)

    def get_config(self) -> dict[str, Any]:
        """Return target and schedule."""
        return {
            "sparsity": self.sparsity,
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "calls_per_step": self.calls_per_step,
        }
