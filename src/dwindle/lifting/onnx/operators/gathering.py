"""Operators that look entries up, and write some of them."""

from __future__ import annotations

from math import prod
from typing import Any

import keras
import numpy as np

from dwindle.lifting.constants import Gather
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.reductions import without
from dwindle.lifting.onnx.operators.registry import (
    Context,
    Inputs,
    is_constant,
    moving,
    number,
    operator,
    optional,
    unsupported,
)
from dwindle.lifting.onnx.sizes import Size
from dwindle.lifting.onnx.values import Moving

ops = keras.ops


def _from_front(indices: Any, length: Any) -> Any:
    """Return indices that count from the front."""
    if is_constant(indices):
        return np.where(indices < 0, indices + length, indices) if (indices < 0).any() else indices
    indices = ops.cast(indices, "int32")
    return indices if isinstance(length, Size) else ops.where(indices < 0, indices + int(length), indices)


@operator("Gather")
def _gather(context: Context, node: Node, inputs: Inputs) -> Any:
    data, indices = inputs[0], inputs[1]
    rank = data.rank if isinstance(data, Moving) else data.ndim
    axis = node.attributes.get("axis", 0) % rank
    if is_constant(data):
        return _looked_up(context, node, data, moving(node, indices), axis)
    if is_constant(indices):
        if isinstance(data.sizes[axis], Size) and (axis == 0 or (indices < 0).any()):
            if data.sizes[axis] != 1 and np.array_equal(np.ravel(indices), [0]) and indices.ndim == 1:
                raise unsupported(node, "takes one sample of all")
            number(node, data.sizes[axis])
        indices = np.asarray(_from_front(indices, data.sizes[axis]), np.int32)
        place = data.place(axis)
        if indices.ndim == 0:
            index = tuple(int(indices) if k == place else slice(None) for k in range(rank))
            return context.value(data.tensor[index], without(data, {axis}, keep=False),
                                 at_least_zero=data.at_least_zero)  # fmt: skip
        if indices.ndim == 1:
            return context.value(
                ops.take(data.tensor, indices, axis=place), data.axes, at_least_zero=data.at_least_zero
            )
    found = ops.take(context.plain(data), _from_front(context.plain(indices), data.sizes[axis]), axis=axis)
    return context.value(found, at_least_zero=data.at_least_zero)


def _looked_up(context: Context, node: Node, table: np.ndarray, indices: Moving, axis: int) -> Any:
    positive = bool((table >= 0).all()) if table.dtype != object else False
    if table.dtype == object:
        raise unsupported(node, "looks up text or open lengths")
    if "float" not in table.dtype.name or axis != 0:
        found = ops.take(table, _from_front(context.plain(indices), table.shape[axis]), axis=axis)
        return context.value(found, at_least_zero=positive)
    places = indices.tensor
    order = (*indices.axes, *range(indices.rank, indices.rank + table.ndim - 1))
    if table.ndim == 2 and indices.rank > 0:
        layer = context.shared(node, (0,), keras.layers.Embedding, input_dim=table.shape[0], output_dim=table.shape[1])
    else:
        layer = context.shared(node, (0,), Gather, rows=table.shape[0], width=table.shape[1:])
    return context.value(context.filled(layer, places, embeddings=table), order, at_least_zero=positive)


@operator("GatherElements")
def _gather_elements(context: Context, node: Node, inputs: Inputs) -> Any:
    data, indices = inputs[:2]
    rank = data.rank if isinstance(data, Moving) else data.ndim
    axis = node.attributes.get("axis", 0) % rank
    length = data.sizes[axis] if isinstance(data, Moving) else data.shape[axis]
    x, places = context.plain(data), _from_front(context.plain(indices), length)
    sizes = [list(v.sizes) if isinstance(v, Moving) else list(v.shape) for v in (data, indices)]
    for other in range(rank):
        if other != axis and sizes[0][other] != sizes[1][other]:
            x = x[tuple(slice(None) if k != other else slice(0, number(node, sizes[1][other])) for k in range(rank))]
    return context.value(ops.take_along_axis(x, ops.cast(places, "int32"), axis=axis))


@operator("GatherND")
def _gather_rows(context: Context, node: Node, inputs: Inputs) -> Any:
    data, indices = inputs[:2]
    batch = node.attributes.get("batch_dims", 0)
    lengths, shape = (
        [number(node, n) for n in (given.sizes if isinstance(given, Moving) else given.shape)]
        for given in (data, indices)
    )
    width, samples = shape[-1], prod(lengths[:batch])
    front = lengths[batch : batch + width]
    rest = lengths[batch + width :]
    steps = np.array([prod(front[k + 1 :]) for k in range(width)], np.int32)
    places = ops.reshape(ops.cast(context.plain(indices), "int32"), (samples, -1, width))
    places = ops.sum(ops.where(places < 0, places + np.array(front, np.int32), places) * steps, axis=-1)
    places = places + (np.arange(samples, dtype=np.int32) * prod(front))[:, None]
    flat = ops.reshape(context.plain(data), (samples * prod(front), *rest))
    return context.value(ops.reshape(ops.take(flat, places, axis=0), (*shape[:-1], *rest)))


@operator("ScatterND")
def _scatter_rows(context: Context, node: Node, inputs: Inputs) -> Any:
    data, indices, updates = (context.plain(value) for value in inputs[:3])
    if node.attributes.get("reduction", "none") not in ("none", "add"):
        raise unsupported(node, f"writes with reduction {node.attributes['reduction']}")
    lengths = [number(node, n) for n in data.shape]
    width = int(indices.shape[-1])
    front = lengths[:width]
    steps = np.array([prod(front[k + 1 :]) for k in range(width)], np.int32)
    places = ops.cast(indices, "int32")
    places = ops.reshape(ops.where(places < 0, places + np.array(front, np.int32), places), (-1, width))
    flat = ops.reshape(data, (prod(front), prod(lengths[width:])))
    new = ops.reshape(updates, (-1, prod(lengths[width:])))
    return context.value(ops.reshape(_written(node, flat, ops.sum(places * steps, axis=-1), new), lengths))


def _written(node: Node, rows: Any, places: Any, new: Any) -> Any:
    """Return rows of which some were replaced, or added to."""
    dtype = keras.backend.standardize_dtype(rows.dtype)
    if node.attributes.get("reduction", "none") == "add":
        added = ops.segment_sum(new, places, num_segments=int(rows.shape[0]))
        return ops.add(rows, ops.cast(added, dtype))
    columns = int(rows.shape[1])
    places = ops.reshape(places, (-1, 1)) * columns + np.arange(columns, dtype=np.int32)
    flat = ops.scatter_update(ops.reshape(rows, (-1,)), ops.reshape(places, (-1, 1)), ops.reshape(new, (-1,)))
    return ops.reshape(flat, tuple(int(n) for n in rows.shape))


@operator("ScatterElements", "Scatter")
def _scatter_elements(context: Context, node: Node, inputs: Inputs) -> Any:
    data, indices, updates = (context.plain(value) for value in inputs[:3])
    if node.attributes.get("reduction", "none") not in ("none", "add"):
        raise unsupported(node, f"writes with reduction {node.attributes['reduction']}")
    lengths = [number(node, n) for n in data.shape]
    shape = [number(node, n) for n in indices.shape]
    axis = node.attributes.get("axis", 0) % len(lengths)
    steps = [prod(lengths[k + 1 :]) for k in range(len(lengths))]
    own = sum((np.arange(n).reshape([-1 if j == k else 1 for j in range(len(shape))]) * steps[k]
               for k, n in enumerate(shape) if k != axis), np.zeros(shape, np.int64))  # fmt: skip
    places = ops.cast(_from_front(indices, lengths[axis]), "int32") * steps[axis] + own.astype(np.int32)
    flat = _written(node, ops.reshape(data, (-1, 1)), ops.reshape(places, (-1,)), ops.reshape(updates, (-1, 1)))
    return context.value(ops.reshape(flat, lengths))


@operator("OneHot")
def _one_hot(context: Context, node: Node, inputs: Inputs) -> Any:
    indices, depth, values = inputs
    if not is_constant(depth) or not is_constant(values):
        raise unsupported(node, "computes its depth or its values")
    count = int(np.ravel(depth)[0])
    off, on = (value.item() for value in values)
    axis = node.attributes.get("axis", -1)
    places = ops.cast(context.plain(indices), "int32")
    places = ops.expand_dims(ops.where(places < 0, places + count, places), axis)
    shape = [1] * len(places.shape)
    shape[axis] = -1
    # Indices out of range give a row without a one, and those below zero count from the end.
    hot = ops.equal(places, np.arange(count, dtype=np.int32).reshape(shape))
    dtype = values.dtype.name
    return context.value(ops.where(hot, ops.cast(on, dtype), ops.cast(off, dtype)))


@operator("Compress")
def _compress(context: Context, node: Node, inputs: Inputs) -> Any:
    value, condition = moving(node, inputs[0]), optional(inputs, 1)
    if not is_constant(condition):
        raise unsupported(node, "decides by the data which entries stay")
    places = np.flatnonzero(condition).astype(np.int32)
    axis = node.attributes.get("axis")
    if axis is None:
        return context.value(ops.take(ops.reshape(context.plain(value), (-1,)), places, axis=0))
    return context.value(ops.take(value.tensor, places, axis=value.place(axis)), value.axes)
