"""Operators that cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.exporting.onnx.operators.registry import Inputs, given, operator, shape_of, unsupported
from dwindle.exporting.onnx.values import Value, without
from dwindle.lifting.flatbuffer import Operation

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer

_END = np.iinfo(np.int64).max
_START = np.iinfo(np.int64).min


def _cut(writer: Writer, value: Value, parts: Sequence[tuple[int, int, int, int]]) -> Value:
    """Return a value cut along some axes, each given as axis, start, end and step."""
    if not parts:
        return value
    columns = [[part[k] for part in parts] for k in range(4)]
    axes, starts, ends, steps = columns
    places = [value.place(axis) for axis in axes]
    names = [writer.numbers(starts, "starts"), writer.numbers(ends, "ends"), writer.numbers(places)]
    return Value(writer.node("Slice", [value.name, *names, writer.numbers(steps, "steps")]), value.axes)


def _squeezed(writer: Writer, value: Value, axes: Sequence[int]) -> Value:
    if not axes:
        return value
    places = writer.numbers(sorted(value.place(axis) for axis in axes))
    return Value(writer.node("Squeeze", [value.name, places]), without(value, set(axes)))


@operator("STRIDED_SLICE")
def _strided_slice(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    begin, end, step = (np.ravel(given(operation, position)) for position in (1, 2, 3))
    options = operation.options
    if options.get("ellipsisMask") or options.get("newAxisMask") or options.get("offset"):
        raise unsupported(operation, "has an ellipsis, a new axis or an offset")

    def masked(name: str, axis: int) -> bool:
        return bool(options.get(name, 0) >> axis & 1)

    parts, gone = [], []
    for axis in range(len(begin)):
        start, stop, by = int(begin[axis]), int(end[axis]), int(step[axis])
        if masked("shrinkAxisMask", axis):
            gone.append(axis)
            parts.append((axis, start, start + 1 if start != -1 else _END, 1))
            continue
        if masked("beginMask", axis):
            start = 0 if by > 0 else _END
        if masked("endMask", axis):
            stop = _END if by > 0 else _START
        if (start, stop, by) != (0, _END, 1):
            parts.append((axis, start, stop, by))
    value = writer.moving(inputs[0])
    return _squeezed(writer, _cut(writer, value, parts), gone)


@operator("SLICE")
def _slice(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    begin, size = (np.ravel(given(operation, position)) for position in (1, 2))
    parts = []
    for axis, (start, count) in enumerate(zip(begin.tolist(), size.tolist(), strict=True)):
        whole = start == 0 and (count < 0 or count == shape_of(operation)[axis])
        if not whole:
            parts.append((axis, start, _END if count < 0 else start + count, 1))
    return _cut(writer, writer.moving(inputs[0]), parts)


@operator("REVERSE_V2")
def _reverse(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    parts = [(int(axis) % value.rank, _END, _START, -1) for axis in np.ravel(given(operation, 1))]
    return _cut(writer, value, parts)


@operator("SPLIT", "SPLIT_V")
def _split(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    first = operation.name == "SPLIT"
    value = writer.moving(inputs[1 if first else 0])
    axis = int(given(operation, 0 if first else 2).reshape(())) % value.rank
    sizes = writer.numbers([tensor.shape[axis] for tensor in operation.outputs], "sizes")
    made = writer.several("Split", [value.name, sizes], len(operation.outputs), axis=value.place(axis))
    return [Value(name, value.axes) for name in made]


@operator("UNPACK")
def _unpack(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    axis = int(operation.options["axis"]) % value.rank
    sizes = writer.numbers([1] * len(operation.outputs), "sizes")
    made = writer.several("Split", [value.name, sizes], len(operation.outputs), axis=value.place(axis))
    return [_squeezed(writer, Value(name, value.axes), [axis]) for name in made]
