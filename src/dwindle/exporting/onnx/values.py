"""What flows through an ONNX graph in the making: which axis of the file each of its axes holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dwindle.lifting.flatbuffer import Tensor


@dataclass(frozen=True, kw_only=True)
class Integers:
    """The integers that an activation is made from.

    Attributes:
        name: Of the integer tensor.
        scale: Of its scale.
        zero_point: Of its zero point.
    """

    name: str
    scale: str
    zero_point: str


@dataclass(frozen=True, eq=False)
class Value:
    """An activation.

    Attributes:
        name: Of the ONNX tensor.
        axes: ONNX axis ``k`` holds the file's axis ``axes[k]``; images are ``(0, 3, 1, 2)`` from their first
            convolution on, so that nothing has to be moved between two.
        rows: Where the last axis is flattened in another order than the file's: place ``j`` holds the file's entry
            ``rows[j]``.
        integers: What it was dequantized from, None for floats.
    """

    name: str
    axes: tuple[int, ...]
    rows: np.ndarray | None = None
    integers: Integers | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.axes)

    def place(self, axis: int) -> int:
        """Return the ONNX axis that holds an axis of the file, which may be counted from the end."""
        return self.axes.index(int(axis) % self.rank)

    def moved(self, per_axis: Sequence[int]) -> list[int]:
        """Return numbers, one for each axis of the file, in ONNX's order."""
        return [int(per_axis[axis]) for axis in self.axes]


# A constant is the file's own tensor.
Operand = Value | Tensor


def plain_axes(rank: int) -> tuple[int, ...]:
    """Return the file's own order."""
    return tuple(range(rank))


def channels_first(rank: int) -> tuple[int, ...]:
    """Return the order in which channels, the file's last axis, are the second."""
    return (0, rank - 1, *range(1, rank - 1))


def without(value: Value, gone: set[int]) -> tuple[int, ...]:
    """Return the order of axes after some are gone."""
    left = [axis for axis in value.axes if axis not in gone]
    ranked = sorted(left)
    return tuple(ranked.index(axis) for axis in left)


def same_but_ones(before: Sequence[int], after: Sequence[int]) -> list[int | None] | None:
    """Return, for each new axis, the old one that it is, None for one of length 1 that was put in.

    Returns:
        None if the shapes differ in more than axes of length 1, or in the first axis.
    """
    if not before or not after or before[0] != after[0]:
        return None
    found: list[int | None] = [0]
    old = 1
    for length in after[1:]:
        while old < len(before) and before[old] != length and before[old] == 1:
            old += 1
        if old < len(before) and before[old] == length:
            found.append(old)
            old += 1
        elif length == 1:
            found.append(None)
        else:
            return None
    return found if prod(before[old:]) == 1 else None


def renumbered(value: Value, origin: Sequence[int | None]) -> tuple[int, ...]:
    """Return the order of the new axes that moves the fewest: kept ones as they lie, new ones before their follower."""
    new = {old: axis for axis, old in enumerate(origin) if old is not None}
    order = [new[axis] for axis in value.axes if axis in new]
    for axis in reversed([axis for axis, old in enumerate(origin) if old is None]):
        order.insert(order.index(axis + 1) if axis + 1 in order else len(order), axis)
    return tuple(order)


def row_order(value: Value, shape: Sequence[int]) -> np.ndarray:
    """Return the order of the file's entries where all axes but the first are flattened as they lie in ONNX."""
    places = np.arange(prod(shape[1:])).reshape(shape[1:])
    return places.transpose([axis - 1 for axis in value.axes if axis]).reshape(-1)


def type_number(dtype: Any) -> int:
    """Return ONNX's number of a NumPy type."""
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
