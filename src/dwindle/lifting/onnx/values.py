"""Tensors on their way through a graph, and where each axis of ONNX lies in Keras: most transposes cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.onnx.sizes import BATCH, Size, divides, product, size


@dataclass(eq=False)
class Moving:
    """A tensor that depends on the inputs.

    Attributes:
        make: Returns the Keras tensor; called once, so that a tensor nobody needs in this form is never made.
        axes: ``axes[k]`` is the ONNX axis that the Keras axis ``k`` holds.
        sizes: Length of each ONNX axis, known or not.
        dtype: NumPy type name.
        at_least_zero: Whether no entry can be negative.
        merged: The value before its axes from 1 on were merged into one, and the Keras tensor of that in its own order:
            a Dense layer that follows sorts its kernel rather than the tensor.
    """

    make: Callable[[], Any]
    axes: tuple[int, ...]
    sizes: tuple[Any, ...]
    dtype: str
    at_least_zero: bool = False
    merged: Moving | None = None
    _made: list[Any] = field(default_factory=list)
    _arranged: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @property
    def tensor(self) -> Any:
        """The Keras tensor."""
        if not self._made:
            self._made.append(self.make())
        return self._made[0]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @property
    def plain(self) -> bool:
        """Whether the axes lie in ONNX's order."""
        return self.axes == tuple(range(self.rank))

    def place(self, axis: int) -> int:
        """Return the Keras axis that holds an ONNX axis, which may count from the end."""
        if not -self.rank <= axis < self.rank:
            raise UnsupportedModelError(f"axis {axis} of a tensor with {self.rank} axes")
        return self.axes.index(axis % self.rank)


def of(tensor: Any, axes: Sequence[int] | None = None, *, unknown: str = "", at_least_zero: bool = False) -> Moving:
    """Return a value for a Keras tensor.

    Args:
        tensor: The tensor.
        axes: ONNX axis of each Keras axis; None for ONNX's own order.
        unknown: What lengths that are not known are called, but for the first axis, which holds samples.
        at_least_zero: See `Moving`.
    """
    if getattr(tensor, "sparse", False):
        # Keras takes the product with a number for a sparse tensor (as of 3.15), which layers can't be called with.
        tensor = keras.ops.cast(tensor, tensor.dtype)
    shape = list(tensor.shape)
    order = tuple(range(len(shape))) if axes is None else tuple(axes)
    lengths = [
        int(n) if n is not None else size(1, (BATCH if place == 0 else f"{unknown}.{order[place]}",))
        for place, n in enumerate(shape)
    ]
    sizes = tuple(lengths[order.index(axis)] for axis in range(len(order)))
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return Moving(lambda: tensor, order, sizes, dtype, at_least_zero)


def channels_last(rank: int) -> tuple[int, ...]:
    """Return the order of ONNX axes in which channels come last."""
    return (0, *range(2, rank), 1)


class Arranger:
    """Brings tensors into the order of axes that a layer wants, and counts what that costs.

    Attributes:
        transposes: How many tensors had to be transposed.
    """

    def __init__(self) -> None:
        self.transposes = 0

    def arranged(self, value: Moving, axes: Sequence[int]) -> Any:
        """Return the Keras tensor with its axes in an order of ONNX axes."""
        wanted = tuple(axes)
        if wanted == value.axes:
            return value.tensor
        if wanted not in value._arranged:
            value._arranged[wanted] = self._arrange(value, wanted)
        return value._arranged[wanted]

    def _arrange(self, value: Moving, wanted: tuple[int, ...]) -> Any:
        tensor = value.tensor
        if _long(value, value.axes) == _long(value, wanted):
            return reshaped(tensor, [value.sizes[axis] for axis in wanted])
        self.transposes += 1
        order = [value.axes.index(axis) for axis in wanted]
        if order[0] == 0 and isinstance(tensor, keras.KerasTensor):
            return keras.layers.Permute(order[1:])(tensor)
        return keras.ops.transpose(tensor, order)

    def plain(self, value: Moving) -> Any:
        """Return the Keras tensor with ONNX's order of axes."""
        return self.arranged(value, range(value.rank))

    def reshape(self, value: Moving, target: Sequence[Any]) -> Moving:
        """Return the value with other axes, moved as little as possible.

        Args:
            value: What is reshaped.
            target: Lengths of the new ONNX axes, without a -1.

        Raises:
            UnsupportedModelError: If more than one length stays open.
        """
        found = _groups(value.sizes, target)
        if found is None:
            return self._reshaped_plain(value, target)
        groups, new_axes = found
        order = [axis for axis in value.axes if value.sizes[axis] != 1]
        merged_behind = len(target) == 2 and len(groups) == 2 and len(groups[1][0]) > 1 and groups[0][0] == [0]
        if merged_behind and not _in_order(order, groups) and order[:1] == [0]:
            plain = [axis for group, _ in groups for axis in group]
            sizes = tuple(target)
            make = lambda: reshaped(self.arranged(value, _with_ones(value, plain)), sizes)  # noqa: E731
            result = Moving(make, (0, 1), sizes, value.dtype, value.at_least_zero, merged=value)
            return result
        for group, _ in groups:
            order = _gathered(order, group)
        tensor = self.arranged(value, _with_ones(value, order))
        axes: list[int] = []
        for axis in order:
            axes += next((new for group, new in groups if group[0] == axis), [])
        for one in new_axes:
            axes.insert(next((k for k, axis in enumerate(axes) if axis > one), len(axes)), one)
        lengths = [target[axis] for axis in axes]
        return Moving(
            lambda: reshaped(tensor, lengths), tuple(axes), tuple(target), value.dtype, value.at_least_zero
        )  # fmt: skip

    def _reshaped_plain(self, value: Moving, target: Sequence[Any]) -> Moving:
        return Moving(
            lambda: reshaped(self.plain(value), target), tuple(range(len(target))), tuple(target), value.dtype,
            value.at_least_zero,
        )  # fmt: skip


def _long(value: Moving, axes: Sequence[int]) -> list[int]:
    return [axis for axis in axes if value.sizes[axis] != 1]


def _with_ones(value: Moving, order: Sequence[int]) -> list[int]:
    """Return an order of all axes in which those of length 1 stay behind the axis before them, if it can be."""
    found = list(order)
    for axis in range(value.rank):
        if value.sizes[axis] == 1:
            place = value.axes.index(axis)
            before = next((value.axes[k] for k in range(place - 1, -1, -1) if value.axes[k] in found), None)
            found.insert(0 if before is None else found.index(before) + 1, axis)
    return found


def _in_order(order: list[int], groups: list[tuple[list[int], list[int]]]) -> bool:
    return all(_gathered(order, group) == order for group, _ in groups)


def _gathered(order: list[int], group: list[int]) -> list[int]:
    """Return an order in which the axes of a group follow each other, at the place of the last of them."""
    place = max(order.index(axis) for axis in group)
    if order[place - len(group) + 1 : place + 1] == group:
        return order
    behind = order[place + 1 :]
    front = [axis for axis in order[: place + 1] if axis not in group]
    return [*front, *group, *(axis for axis in behind if axis not in group)]


def _groups(source: Sequence[Any], target: Sequence[Any]) -> tuple[list[tuple[list[int], list[int]]], list[int]] | None:
    """Return which source axes become which target axes, and the target axes of length 1; None if sizes don't fit."""
    left = [axis for axis, n in enumerate(source) if n != 1]
    right = [axis for axis, n in enumerate(target) if n != 1]
    if any(not isinstance(n, Size) and n <= 0 for n in (*source, *target)):
        return None
    groups, i, j = [], 0, 0
    while i < len(left) or j < len(right):
        if i == len(left) or j == len(right):
            return None
        a, b = source[left[i]], target[right[j]]
        first, second = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if divides(a, b) and i < len(left):
                a = product((a, source[left[i]]))
                first.append(left[i])
                i += 1
            elif divides(b, a) and j < len(right):
                b = product((b, target[right[j]]))
                second.append(right[j])
                j += 1
            elif _known_below(a, b) and i < len(left):
                a = product((a, source[left[i]]))
                first.append(left[i])
                i += 1
            elif j < len(right):
                b = product((b, target[right[j]]))
                second.append(right[j])
                j += 1
            else:
                return None
        groups.append((first, second))
    return groups, [axis for axis, n in enumerate(target) if n == 1]


def _known_below(a: Any, b: Any) -> bool:
    if isinstance(a, Size) or isinstance(b, Size):
        return isinstance(b, Size) and not isinstance(a, Size)
    return bool(a < b)


def reshaped(tensor: Any, lengths: Sequence[Any]) -> Any:
    """Return a Keras tensor with other lengths, of which one may be unknown, or those that it has already."""
    shape = tuple(tensor.shape)
    open_ = [k for k, n in enumerate(lengths) if isinstance(n, Size)]
    numbers = [-1 if isinstance(n, Size) else int(n) for n in lengths]
    if len(open_) <= 1:
        if shape and tuple(None if n == -1 else n for n in numbers) == shape:
            return tensor
        symbolic = isinstance(tensor, keras.KerasTensor)
        if symbolic and open_ == [0] and shape[0] is None and isinstance(lengths[0], Size) and lengths[0].factor == 1:
            return keras.layers.Reshape(numbers[1:])(tensor)
        return keras.ops.reshape(tensor, numbers)
    kept = [k for k, n in enumerate(shape) if n != 1]
    if [shape[k] for k in kept] != [None if n == -1 else n for n in numbers if n != 1]:
        names = ", ".join(str(lengths[k]) for k in open_)
        raise UnsupportedModelError(
            f"several lengths are open where the model reshapes ({names}); fix them with inputs={{name: shape}}"
        )
    for k in reversed(range(len(shape))):
        if shape[k] == 1:
            tensor = keras.ops.squeeze(tensor, axis=k)
    for k, n in enumerate(numbers):
        if n == 1:
            tensor = keras.ops.expand_dims(tensor, axis=k)
    return tensor


def constant_in(value: np.ndarray, rank: int, axes: Sequence[int]) -> np.ndarray:
    """Return a constant that broadcasts against a value, with that value's order of axes; leading ones cut off."""
    padded = value.reshape((1,) * (rank - value.ndim) + value.shape).transpose(axes)
    while padded.ndim > 1 and padded.shape[0] == 1:
        padded = padded[0]
    return np.ascontiguousarray(padded)
