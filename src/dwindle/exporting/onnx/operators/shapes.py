"""Operators that change shapes, join, and repeat."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.exporting.onnx.operators.arithmetic import COMBINING
from dwindle.exporting.onnx.operators.registry import (
    Inputs,
    aligned,
    common_axes,
    finish,
    given,
    operator,
    shape_of,
)
from dwindle.exporting.onnx.values import Value, plain_axes, renumbered, row_order, same_but_ones
from dwindle.lifting.flatbuffer import Operation

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer


@operator("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _reshape(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    before, after = shape_of(operation), operation.outputs[0].shape
    if writer.open_batch and after and value.rows is None:
        if (
            before[:1] == (1,)
            and before[1:] == after
            and writer.combined_only(operation.outputs[0], COMBINING, len(before))
        ):
            return Value(value.name, value.axes, None, value.integers)  # the samples' axis is put back by broadcasting
        old, new = writer.samples_axis(before), writer.samples_axis(after)
        if old or new:  # the samples' axis moves, which is a reshape for one sample only
            first = writer.ordered(value, (old, *(axis for axis in range(value.rank) if axis != old)))
            rest = [axis for axis in range(len(after)) if axis != new]
            shape = writer.numbers([-1, *(after[axis] for axis in rest)], "shape")
            return Value(writer.node("Reshape", [first, shape]), (new, *rest))
    origin = None if value.rows is not None or value.axes == plain_axes(value.rank) else same_but_ones(before, after)
    if origin is not None:  # only axes of length 1 come and go, and nothing has to be moved first
        order = renumbered(value, origin)
        lengths = writer.lengths(after)
        shape = writer.numbers([lengths[axis] for axis in order], "shape")
        return Value(writer.node("Reshape", [value.name, shape]), order)
    sortable = writer.feeds_only(operation.outputs[0], {"FULLY_CONNECTED"})
    return flattened(writer, value, before, after, sortable=sortable)


def flattened(writer: Writer, value: Value, before: Sequence[int], after: Sequence[int], *, sortable: bool) -> Value:
    """Return a value in another shape.

    Args:
        writer: The writer.
        value: The value.
        before: Its shape in the file.
        after: The new one.
        sortable: Whether a kernel's columns can take another order, so that nothing has to be moved.
    """
    shape = writer.numbers(writer.lengths(after), "shape")
    one = value.rows is None and len(after) == 2 and after[1] == prod(before[1:]) and len(before) > 1
    if sortable and one and value.axes[0] == 0 and value.axes != plain_axes(value.rank):
        return Value(writer.node("Reshape", [value.name, shape]), (0, 1), row_order(value, before))
    return Value(writer.node("Reshape", [writer.plain(value), shape]), plain_axes(len(after)))


@operator("TRANSPOSE")
def _transpose(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    order = [int(axis) for axis in given(operation, 1)]
    # Nothing moves: the ONNX axis that held the old axis order[k] holds the new axis k.
    return Value(value.name, tuple(order.index(axis) for axis in value.axes), None, value.integers)


@operator("CONCATENATION")
def _concatenation(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    rank = len(operation.outputs[0].shape)
    axes = common_axes(inputs, rank)
    place = axes.index(int(operation.options["axis"]) % rank)
    names = [writer.ordered(operand, axes) for operand in inputs]
    return Value(finish(writer, operation, writer.node("Concat", names, axis=place)), axes)


@operator("PACK")
def _pack(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    rank = len(operation.outputs[0].shape)
    axis = int(operation.options["axis"]) % rank
    where = writer.numbers([axis])
    parts = [writer.node("Unsqueeze", [writer.plain(operand), where]) for operand in inputs]
    return Value(writer.node("Concat", parts, axis=axis), plain_axes(rank))


@operator("BROADCAST_TO")
def _broadcast(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    rank = len(operation.outputs[0].shape)
    axes = common_axes(inputs, rank)
    (name,) = aligned(writer, inputs[:1], rank, axes)
    shape = [operation.outputs[0].shape[axis] for axis in axes]
    return Value(writer.node("Expand", [name, writer.numbers(shape, "shape")]), axes)


@operator("TILE")
def _tile(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    repeats = value.moved([int(n) for n in np.ravel(given(operation, 1))])
    return Value(writer.node("Tile", [value.name, writer.numbers(repeats, "repeats")]), value.axes)
