"""Operators that make one entry of many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.exporting.onnx.operators.registry import Inputs, given, operator, shape_of
from dwindle.exporting.onnx.values import Value, channels_first, type_number, without
from dwindle.lifting.flatbuffer import Operation

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer

_REDUCTIONS = {"MEAN": "ReduceMean", "SUM": "ReduceSum", "REDUCE_MAX": "ReduceMax", "REDUCE_MIN": "ReduceMin",
               "REDUCE_PROD": "ReduceProd"}  # fmt: skip
# What runtimes have an own kernel for, also on integers: over the space of images with channels first.
_OVER_SPACE = {"MEAN": "GlobalAveragePool", "REDUCE_MAX": "GlobalMaxPool"}


@operator(*_REDUCTIONS)
def _reduce(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    axes = {int(axis) % value.rank for axis in np.ravel(given(operation, 1))}
    keep = bool(operation.options.get("keepDims"))
    floats = np.dtype(operation.outputs[0].dtype).kind == "f" or operation.outputs[0].is_quantized
    if operation.name in _OVER_SPACE and value.axes == channels_first(4) and axes == {1, 2} and floats:
        pooled = writer.node(_OVER_SPACE[operation.name], [value.name])
        if keep:
            return Value(pooled, value.axes)
        return Value(writer.node("Flatten", [pooled], axis=1), (0, 1))
    places = writer.numbers(sorted(value.place(axis) for axis in axes))
    name = writer.node(_REDUCTIONS[operation.name], [value.name, places], keepdims=int(keep))
    return Value(name, value.axes if keep else without(value, axes))


@operator("REDUCE_ANY", "REDUCE_ALL")
def _any_or_all(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    axes = {int(axis) % value.rank for axis in np.ravel(given(operation, 1))}
    keep = bool(operation.options.get("keepDims"))
    numbers = writer.node("Cast", [value.name], to=type_number(np.int32))
    kind = "ReduceMax" if operation.name == "REDUCE_ANY" else "ReduceMin"
    places = writer.numbers(sorted(value.place(axis) for axis in axes))
    found = writer.node("Cast", [writer.node(kind, [numbers, places], keepdims=int(keep))], to=type_number(np.bool_))
    return Value(found, value.axes if keep else without(value, axes))


@operator("ARG_MAX", "ARG_MIN")
def _place_of_extreme(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    axis = int(given(operation, 1).reshape(())) % len(shape_of(operation))
    kind = "ArgMax" if operation.name == "ARG_MAX" else "ArgMin"
    found = writer.node(kind, [value.name], axis=value.place(axis), keepdims=0)
    if operation.outputs[0].dtype != np.int64:
        found = writer.node("Cast", [found], to=type_number(operation.outputs[0].dtype))
    return Value(found, without(value, {axis}))
