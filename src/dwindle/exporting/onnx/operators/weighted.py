"""Products of matrices, and look-ups in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.exporting.onnx.operators.registry import (
    Inputs,
    finish,
    given,
    operator,
    optional,
    shape_of,
    unsupported,
)
from dwindle.exporting.onnx.operators.shapes import flattened
from dwindle.exporting.onnx.values import Operand, Value, plain_axes
from dwindle.lifting.flatbuffer import Operation, Tensor

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer


@operator("FULLY_CONNECTED")
def _fully_connected(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    if operation.options.get("weightsFormat"):
        raise unsupported(operation, "has its weights shuffled")
    value, kernel, bias = writer.moving(inputs[0]), inputs[1], optional(inputs, 2)
    features = shape_of(operation, 1)[1]
    keeps = bool(operation.options.get("keepNumDims"))
    if (value.rank != 2 and not keeps) or shape_of(operation)[-1] != features:
        value = flattened(writer, value, shape_of(operation), (-1, features), sortable=isinstance(kernel, Tensor))
    packed = isinstance(kernel, Tensor) and (kernel.scale is not None or kernel.dtype == np.float16)
    if packed and value.rank > 2 and not (value.integers is not None and _bits(operation) == 8):
        # ONNX Runtime rounds the activations of a MatMul with packed weights to 8 bits; those of a Gemm it does not.
        value = Value(writer.node("Reshape", [writer.plain(value), writer.numbers([-1, features], "shape")]), (0, 1))
    if value.rank == 2:
        weights = _kernel(writer, kernel, (0, 1), value)
        names = [value.name if value.rows is not None else writer.plain(value), weights]
        if bias is not None:
            names.append(writer.plain(bias))
        made = writer.node("Gemm", names, transB=1)
    else:
        made = writer.node("MatMul", [writer.plain(value), _kernel(writer, kernel, (1, 0), value)])
        if bias is not None:
            made = writer.node("Add", [made, writer.plain(bias)])
    rank = len(operation.outputs[0].shape)
    made = finish(writer, operation, made)
    if value.rank != rank:
        made = writer.node("Reshape", [made, writer.numbers(writer.lengths(operation.outputs[0].shape), "shape")])
    return Value(made, plain_axes(rank))


def _bits(operation: Operation) -> int:
    tensor = operation.inputs[0]
    return 0 if tensor is None else tensor.bits


def _kernel(writer: Writer, kernel: Operand, order: tuple[int, int], value: Value) -> str:
    if isinstance(kernel, Tensor):
        return writer.constant(kernel, None if order == (0, 1) else order, columns=value.rows)
    return writer.ordered(kernel, order)


@operator("BATCH_MATMUL")
def _batch_matmul(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    names = []
    for position, option in enumerate(("adjX", "adjY")):
        order = list(range(len(shape_of(operation, position))))
        if operation.options.get(option):
            order[-2:] = order[:-3:-1]
        names.append(writer.ordered(inputs[position], order))
    made = writer.node("MatMul", names)
    return Value(finish(writer, operation, made), plain_axes(len(operation.outputs[0].shape)))


@operator("GATHER")
def _gather(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    if operation.options.get("batchDims"):
        raise unsupported(operation, "gathers within batches")
    axis = int(operation.options.get("axis", 0)) % max(len(shape_of(operation)), 1)
    value, places = inputs[0], writer.plain(inputs[1])
    if isinstance(value, Value) and len(shape_of(operation, 1)) == 1:
        return Value(writer.node("Gather", [value.name, places], axis=value.place(axis)), value.axes)
    made = writer.node("Gather", [writer.plain(value), places], axis=axis)
    return Value(made, plain_axes(len(operation.outputs[0].shape)))


@operator("EMBEDDING_LOOKUP")
def _embedding_lookup(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    made = writer.node("Gather", [writer.plain(inputs[1]), writer.plain(inputs[0])], axis=0)
    return Value(made, plain_axes(len(operation.outputs[0].shape)))


@operator("ONE_HOT")
def _one_hot(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    depth, on, off = (given(operation, place) for place in (1, 2, 3))
    ends = np.array([off.item(), on.item()], on.dtype)
    # ONNX Runtime has it for a depth of the indices' own type.
    indices = operation.inputs[0]
    count = writer.initializer(depth.reshape(()).astype(depth.dtype if indices is None else indices.dtype), "depth")
    names = [writer.plain(inputs[0]), count, writer.initializer(ends, "values")]
    made = writer.node("OneHot", names, axis=int(operation.options.get("axis", -1)))
    return Value(made, plain_axes(len(operation.outputs[0].shape)))
