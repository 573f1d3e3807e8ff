"""Selecting the smallest of many values, exactly and without sorting them all, in a training step of any backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Return which ``count`` values are the smallest; of equal ones the earlier go first.

    Args:
        values: Shape ``(n,)``.
        count: How many, at most ``n``.

    Returns:
        Boolean, ``(n,)``, with exactly ``count`` True.
    """
    chosen = np.zeros(values.shape, dtype=bool)
    chosen[np.argsort(values, kind="stable")[:count]] = True
    return chosen


def smallest_in_graph(values: Any, count: Any) -> Any:
    """Do what `smallest` does, on tensors, with ``count`` a tensor.

    Read as integers, the bits of floating-point numbers have the numbers' order. The value up to which values go is
    found by halving the range of integers 32 times, each time counting those below: no sort, any number of values, and
    exact. Equal values at the edge are told apart only where there are more of them than needed.
    """
    ops = keras.ops
    keys = _ordered_bits(values)
    count = ops.cast(count, "int32")

    def halve(low: Any, high: Any) -> tuple[Any, Any]:
        middle = _middle(low, high)
        enough = ops.sum(ops.cast(keys <= middle, "int32")) >= count
        return ops.where(enough, low, middle + 1), ops.where(enough, middle, high)

    low = ops.convert_to_tensor(-(2**31), "int32")
    high = ops.convert_to_tensor(2**31 - 1, "int32")
    last, _ = ops.while_loop(lambda low, high: low < high, halve, (low, high))
    below, level = keys < last, ops.equal(keys, last)
    left = count - ops.sum(ops.cast(below, "int32"))
    return ops.logical_or(
        below,
        ops.cond(
            ops.sum(ops.cast(level, "int32")) > left,
            lambda: ops.logical_and(level, ops.cumsum(ops.cast(level, "int32")) <= left),
            lambda: level,
        ),
    )


def first_in_order(values: Any, count: int) -> Any:
    """Return the indices of the ``count`` smallest of a tensor's values, smallest first, earlier ones first of equals.

    Args:
        values: Shape ``(n,)``.
        count: How many; a Python number, small against ``n``.
    """
    ops = keras.ops
    if keras.backend.backend() == "torch":  # whose top_k leaves the order of equal values open
        return ops.cast(ops.argsort(values)[:count], "int32")
    return ops.cast(ops.top_k(-values, count)[1], "int32")


def _ordered_bits(values: Any) -> Any:
    """Return integers in the order of the floating-point values."""
    ops = keras.ops
    values = ops.cast(values, "float32")
    bits = ops.view(ops.where(ops.equal(values, 0.0), ops.zeros_like(values), values), "int32")
    return ops.where(bits < 0, ops.bitwise_xor(bits, ops.convert_to_tensor(2**31 - 1, "int32")), bits)


def _middle(low: Any, high: Any) -> Any:
    """Return ``floor((low + high) / 2)`` without leaving 32 bits."""
    ops = keras.ops
    shared = ops.bitwise_and(low, high)
    return shared + ops.right_shift(ops.bitwise_xor(low, high), ops.convert_to_tensor(1, "int32"))
