"""Operators that make one number of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from dwindle.lifting.onnx.composites import SOFTMAX, VARIANCE, WRITTEN
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.registry import (
    OPERATORS,
    Context,
    Inputs,
    argument,
    moving,
    number,
    operator,
    unsupported,
)
from dwindle.lifting.onnx.values import Moving

ops = keras.ops

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": ops.mean, "ReduceSum": ops.sum, "ReduceMax": ops.max, "ReduceMin": ops.min, "ReduceProd": ops.prod,
    "ReduceL1": lambda x, **o: ops.sum(ops.abs(x), **o),
    "ReduceL2": lambda x, **o: ops.sqrt(ops.sum(ops.square(x), **o)),
    "ReduceLogSum": lambda x, **o: ops.log(ops.sum(x, **o)), "ReduceLogSumExp": ops.logsumexp,
    "ReduceSumSquare": lambda x, **o: ops.sum(ops.square(x), **o),
}  # fmt: skip


def without(value: Moving, gone: set[int], *, keep: bool) -> tuple[int, ...]:
    """Return the order of axes after some went, or stayed with length 1."""
    if keep:
        return value.axes
    left = [axis for axis in value.axes if axis not in gone]
    ranked = sorted(left)
    return tuple(ranked.index(axis) for axis in left)


@operator(*_REDUCTIONS)
def _reduce(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axes = argument(node, inputs, 1, "axes")
    if axes is None or np.size(axes) == 0:
        if node.attributes.get("noop_with_empty_axes", 0):
            plain = {"ReduceL1": ops.abs, "ReduceL2": ops.abs, "ReduceSumSquare": ops.square, "ReduceLogSum": ops.log}
            return context.value(plain.get(node.kind, lambda x: x)(value.tensor), value.axes)
        axes = range(value.rank)
    gone = {int(axis) % value.rank for axis in np.ravel(axes)}
    keep = bool(node.attributes.get("keepdims", 1))
    places = tuple(sorted(value.place(axis) for axis in gone))
    found = _REDUCTIONS[node.kind](value.tensor, axis=places, keepdims=keep)
    if keras.backend.standardize_dtype(found.dtype) != value.dtype:
        found = ops.cast(found, value.dtype)
    zero = value.at_least_zero and node.kind in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
    return context.value(found, without(value, gone, keep=keep), at_least_zero=zero)


def _as_written(context: Context, node: Node, inputs: Inputs) -> Any:
    kind = WRITTEN[node.kind]
    return OPERATORS[kind](context, replace(node, kind=kind), inputs[:2])


@operator(SOFTMAX)
def _softmax(context: Context, node: Node, inputs: Inputs) -> Any:
    """Return the softmax, or what the file says where the sums are not spread back to the axis that they go over."""
    value, axis = moving(node, inputs[2]), node.attributes["axis"]
    shapes = [shape for shape in inputs[3:] if isinstance(shape, np.ndarray) and shape.size == value.rank]
    if len(shapes) < len(inputs[3:]) or any(shape[axis] != 1 for shape in shapes):
        return _as_written(context, node, inputs)
    # A version of its own: before 13, Softmax went over all axes from one on.
    return OPERATORS["Softmax"](context, replace(node, kind="Softmax", version=13), [value])


@operator(VARIANCE)
def _variance(context: Context, node: Node, inputs: Inputs) -> Any:
    """Return the mean of squared differences from the mean, or what the file says where that is no variance."""
    value = moving(node, inputs[2])
    gone = {int(axis) % value.rank for axis in node.attributes["axes"]}
    counts = [value.sizes[axis] for axis in gone]
    factor = node.attributes.get("factor")
    known = all(isinstance(n, int | np.integer) for n in counts)
    if factor is not None and not (known and np.isclose(factor * np.prod(counts, dtype=float), 1.0, rtol=1e-6)):
        return _as_written(context, node, inputs)
    keep = bool(node.attributes["keepdims"])
    places = tuple(sorted(value.place(axis) for axis in gone))
    far = ops.square(ops.subtract(value.tensor, ops.mean(value.tensor, axis=places, keepdims=True)))
    found = ops.mean(far, axis=places, keepdims=keep)
    return context.value(found, without(value, gone, keep=keep), at_least_zero=True)


@operator("ArgMax", "ArgMin")
def _place_of(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axis = node.attributes.get("axis", 0) % value.rank
    keep = bool(node.attributes.get("keepdims", 1))
    place, x = value.place(axis), value.tensor
    function = ops.argmax if node.kind == "ArgMax" else ops.argmin
    if node.attributes.get("select_last_index", 0):
        count = number(node, value.sizes[axis])
        found = count - 1 - ops.cast(function(ops.flip(x, axis=place), axis=place, keepdims=keep), "int64")
    else:
        found = ops.cast(function(x, axis=place, keepdims=keep), "int64")
    return context.value(found, without(value, {axis}, keep=keep))


@operator("CumSum")
def _running_sum(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    place = value.place(int(np.ravel(argument(node, inputs, 1, "axis"))[0]))
    x = ops.flip(value.tensor, axis=place) if node.attributes.get("reverse", 0) else value.tensor
    found = ops.cumsum(x, axis=place)
    if node.attributes.get("exclusive", 0):
        found = ops.subtract(found, x)
    found = ops.flip(found, axis=place) if node.attributes.get("reverse", 0) else found
    return context.value(ops.cast(found, value.dtype), value.axes)


@operator("TopK")
def _largest(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    count = int(np.ravel(argument(node, inputs, 1, "k"))[0])
    axis = node.attributes.get("axis", -1) % value.rank
    order = (*(a for a in value.axes if a != axis), axis)
    x = context.arranged(value, order)
    if "float" not in value.dtype and not node.attributes.get("largest", 1):
        raise unsupported(node, "looks for the smallest integers")
    smallest = not node.attributes.get("largest", 1)
    values, places = ops.top_k(ops.negative(x) if smallest else x, count, sorted=True)
    values = ops.negative(values) if smallest else values
    return [context.value(values, order), context.value(ops.cast(places, "int64"), order)]
