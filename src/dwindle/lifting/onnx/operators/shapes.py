"""Operators that move entries and change axes, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.constants import Pad, Repeated, Slice
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.registry import (
    Context,
    Inputs,
    argument,
    is_constant,
    moving,
    number,
    operator,
    optional,
    unsupported,
)
from dwindle.lifting.onnx.sizes import Size, filled_in, has_sizes, product
from dwindle.lifting.onnx.values import Moving, channels_last

ops = keras.ops


@operator("Reshape")
def _reshape(context: Context, node: Node, inputs: Inputs) -> Any:
    target = argument(node, inputs, 1, "shape")
    zero = not node.attributes.get("allowzero", 0)
    if is_constant(inputs[0]):
        # A constant that stands for the same thing in every sample.
        return inputs[0].reshape([1 if isinstance(n, Size) else int(n) for n in np.ravel(target)])
    value = moving(node, inputs[0])
    return context.reshape(value, filled_in(list(np.ravel(target)), value.sizes, zero_copies=zero))


@operator("Flatten")
def _flatten(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axis = node.attributes.get("axis", 1)
    axis = axis + value.rank if axis < 0 else axis
    return context.reshape(value, [product(value.sizes[:axis]), product(value.sizes[axis:])])


@operator("Transpose")
def _transpose(context: Context, node: Node, inputs: Inputs) -> Any:
    del context
    value = moving(node, inputs[0])
    order = list(node.attributes.get("perm") or reversed(range(value.rank)))
    if sorted(order) != list(range(value.rank)):
        raise unsupported(node, f"has the order {order} for {value.rank} axes")
    # Only the names of the axes change; the tensor stays where it is.
    axes = tuple(order.index(axis) for axis in value.axes)
    sizes = tuple(value.sizes[axis] for axis in order)
    return Moving(lambda: value.tensor, axes, sizes, value.dtype, value.at_least_zero)


@operator("Squeeze")
def _squeeze(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axes = argument(node, inputs, 1, "axes")
    if axes is None:
        gone = {axis for axis, n in enumerate(value.sizes) if n == 1}
    else:
        gone = {int(axis) % value.rank for axis in np.ravel(axes)}
    if any(number(node, value.sizes[axis]) != 1 for axis in gone):
        raise unsupported(node, f"drops axes {sorted(gone)} of {value.sizes}")
    return context.reshape(value, [n for axis, n in enumerate(value.sizes) if axis not in gone])


@operator("Unsqueeze")
def _unsqueeze(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axes = np.ravel(argument(node, inputs, 1, "axes"))
    rank = value.rank + len(axes)
    new = {int(axis) % rank for axis in axes}
    left = iter(value.sizes)
    return context.reshape(value, [1 if axis in new else next(left) for axis in range(rank)])


def _common_order(values: Sequence[Any]) -> tuple[int, ...]:
    return next((value.axes for value in values if isinstance(value, Moving) and not value.plain),
                tuple(range(next(value for value in values if isinstance(value, Moving)).rank)))  # fmt: skip


@operator("Concat")
def _concat(context: Context, node: Node, inputs: Inputs) -> Any:
    values = [value for value in inputs if value is not None and not _empty(value)]
    if not any(isinstance(value, Moving) for value in values):
        raise unsupported(node, "joins nothing that moves")
    if len(values) == 1:
        return values[0]
    order = _common_order(values)
    first = next(value for value in values if isinstance(value, Moving))
    rank = first.rank
    axis = node.attributes.get("axis", 1) % rank
    place = order.index(axis)
    like = context.arranged(first, order)
    tensors = []
    for value in values:
        if isinstance(value, Moving):
            tensors.append(context.arranged(value, order))
            continue
        constant = np.ascontiguousarray(value.transpose(order))
        for axis_, n in enumerate(first.sizes):
            if axis_ != axis and not isinstance(n, Size) and value.shape[axis_] not in (n,):
                constant = np.repeat(constant, n, axis=order.index(axis_)) if value.shape[axis_] == 1 else constant
        tensors.append(_repeated(context, node, constant, like))
    positive = all(value.at_least_zero if isinstance(value, Moving) else bool((value >= 0).all()) for value in values)
    joined = context.layer(keras.layers.Concatenate, node, axis=place)(tensors) if place else (
        ops.concatenate(tensors, axis=0)
    )  # fmt: skip
    return context.value(joined, order, at_least_zero=positive)


def _empty(value: Any) -> bool:
    sizes = value.sizes if isinstance(value, Moving) else value.shape
    return len(sizes) == 1 and sizes[0] == 0


def _repeated(context: Context, node: Node, constant: np.ndarray, like: Any) -> Any:
    """Return a constant, once for every sample of a tensor."""
    if constant.shape[0] == 1 and like.shape[0] != 1:
        layer = context.layer(Repeated, node, shape=constant.shape[1:], dtype=constant.dtype.name)
        return context.filled(layer, like, value=constant[0])
    layer = context.layer(Repeated, node, shape=constant.shape, samples=False, dtype=constant.dtype.name)
    return context.filled(layer, like, value=constant)


@operator("Split")
def _split(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axis = node.attributes.get("axis", 0) % value.rank
    length = number(node, value.sizes[axis])
    parts = argument(node, inputs, 1, "split")
    count = node.attributes.get("num_outputs", len(node.outputs))
    if parts is None:
        size = -(-length // count)
        parts = [min(size, length - k * size) for k in range(count)]
    return _parts(context, node, value, axis, np.ravel(parts))


def _parts(context: Context, node: Node, value: Moving, axis: int, lengths: Any) -> list[Moving]:
    ends = [int(n) for n in np.cumsum(lengths)]
    pairs = zip([0, *ends[:-1]], ends, strict=True)
    return [_cut(context, node, value, {axis: (start, end, 1)}) for start, end in pairs]


@operator("SplitToSequence")
def _split_to_sequence(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axis = node.attributes.get("axis", 0) % value.rank
    length = number(node, value.sizes[axis])
    split = optional(inputs, 1)
    if split is None or not is_constant(split):
        raise unsupported(node, "drops the axis, or computes the lengths")
    if split.ndim == 0:
        step = int(split)
        split = [min(step, length - k) for k in range(0, length, step)]
    # A sequence is a tuple; it is one result, not several.
    return [tuple(_parts(context, node, value, axis, split))]


@operator("SequenceAt")
def _one_of_sequence(context: Context, node: Node, inputs: Inputs) -> Any:
    del context
    if not isinstance(inputs[0], tuple) or not is_constant(inputs[1]):
        raise unsupported(node, "computes the place, or what it takes from")
    return inputs[0][int(inputs[1])]


def _cut(context: Context, node: Node, value: Moving, parts: dict[int, tuple[int, int, int]]) -> Moving:
    """Return a value with ``(start, end, step)`` of some ONNX axes, all within bounds, steps above zero."""
    parts = {a: part for a, part in parts.items() if part != (0, value.sizes[a], 1)}
    if not parts:
        return value
    lengths = list(value.sizes)
    for axis, (start, end, step) in parts.items():
        lengths[axis] = max(0, -(-(end - start) // step))
    if all(value.place(axis) for axis in parts):
        by_place = {value.place(axis): part for axis, part in parts.items()}
        listed = [list(by_place.get(place, (None, None, None))) for place in range(1, value.rank)]
        found = context.layer(Slice, node, parts=listed)(value.tensor)
    else:
        found = value.tensor[tuple(slice(*parts[axis]) if axis in parts else slice(None) for axis in value.axes)]
    return context.value(found, value.axes, at_least_zero=value.at_least_zero)


@operator("Slice")
def _slice(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    starts, ends = (np.ravel(argument(node, inputs, place, name)) for place, name in ((1, "starts"), (2, "ends")))
    axes = argument(node, inputs, 3, "axes")
    axes = range(len(starts)) if axes is None else np.ravel(axes)
    steps = optional(inputs, 4)
    if isinstance(steps, Moving):
        raise unsupported(node, "computes its `steps`")
    steps = [1] * len(starts) if steps is None else np.ravel(steps)
    parts: dict[int, tuple[int, int, int]] = {}
    flipped = []
    for start, end, given, step in zip(starts, ends, axes, steps, strict=True):
        axis, step = int(given) % value.rank, int(step)
        length = value.sizes[axis]
        if step == 1 and not isinstance(start, Size) and start == 0 and _reaches(end, length):
            continue
        length = number(node, length)
        first, last, _ = slice(number(node, start), number(node, end), step).indices(length)
        if step < 0:
            flipped.append(value.place(axis))
            first, last, step = length - 1 - first, length - 1 - last, -step
        parts[axis] = (first, max(first, last), step)
    if flipped:
        value = context.value(
            ops.flip(value.tensor, axis=tuple(flipped)), value.axes, at_least_zero=value.at_least_zero
        )
    return _cut(context, node, value, parts)


def _reaches(end: Any, length: Any) -> bool:
    if isinstance(end, Size) or isinstance(length, Size):
        # Exporters write "to the end" as some large number.
        return bool(end == length) or (not isinstance(end, Size) and end >= 2**29)
    return bool(end >= length)


@operator("Pad")
def _pad(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    flat = [number(node, n) for n in np.ravel(argument(node, inputs, 1, "pads", node.attributes.get("paddings")))]
    axes = optional(inputs, 3)
    chosen = range(value.rank) if axes is None else [int(axis) % value.rank for axis in np.ravel(axes)]
    pairs = dict(zip(chosen, zip(flat[: len(flat) // 2], flat[len(flat) // 2 :], strict=True), strict=True))
    cuts = {axis: (max(0, -before), number(node, value.sizes[axis]) - max(0, -behind), 1)
            for axis, (before, behind) in pairs.items() if before < 0 or behind < 0}  # fmt: skip
    value = _cut(context, node, value, cuts)
    pads = [(max(0, before), max(0, behind)) for before, behind in (pairs.get(axis, (0, 0)) for axis in value.axes)]
    if not any(any(pair) for pair in pads):
        return value
    mode = node.attributes.get("mode", "constant")
    if mode == "constant":
        fill = optional(inputs, 2)
        fill = node.attributes.get("value", 0.0) if fill is None else fill
        if isinstance(fill, Moving):
            raise unsupported(node, "computes what it pads with")
        fill = np.ravel(fill)[0].item() if np.size(fill) else 0
        return _padded(context, node, value, pads, fill)
    if mode == "reflect":
        found = context.layer(Pad, node, paddings=[list(pair) for pair in pads], mode="reflect")(value.tensor)
        return context.value(found, value.axes, at_least_zero=value.at_least_zero)
    found = value.tensor
    for place, (before, behind) in enumerate(pads):
        if before or behind:
            length = number(node, value.sizes[value.axes[place]])
            indices = np.arange(-before, length + behind)
            indices = indices % length if mode == "wrap" else np.clip(indices, 0, length - 1)
            found = ops.take(found, indices.astype(np.int32), axis=place)
    return context.value(found, value.axes, at_least_zero=value.at_least_zero)


def _padded(context: Context, node: Node, value: Moving, pads: list[tuple[int, int]], fill: Any) -> Moving:
    zero = value.at_least_zero and fill >= 0
    spatial = value.rank == 4 and fill == 0 and pads[0] == pads[3] == (0, 0) and "float" in value.dtype
    if spatial and value.axes == channels_last(4):
        found = context.layer(keras.layers.ZeroPadding2D, node, padding=tuple(pads[1:3]))(value.tensor)
    elif pads[0] == (0, 0):
        found = context.layer(Pad, node, paddings=[list(pair) for pair in pads], fill=fill)(value.tensor)
    else:
        found = ops.pad(value.tensor, pads, constant_values=fill)
    return context.value(found, value.axes, at_least_zero=zero)


@operator("Tile")
def _tile(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    repeats = [number(node, n) for n in np.ravel(argument(node, inputs, 1, "repeats"))]
    if all(n == 1 for n in repeats):
        return value
    return context.value(ops.tile(value.tensor, [repeats[axis] for axis in value.axes]), value.axes,
                         at_least_zero=value.at_least_zero)  # fmt: skip


@operator("Expand")
def _expand(context: Context, node: Node, inputs: Inputs) -> Any:
    target = list(np.ravel(argument(node, inputs, 1, "shape")))
    if is_constant(inputs[0]):
        # Open lengths stay 1: the constant is the same for every sample, and broadcasts where it is used.
        return np.broadcast_to(inputs[0], np.broadcast_shapes(
            inputs[0].shape, tuple(1 if isinstance(n, Size) else int(n) for n in target)))  # fmt: skip
    value = moving(node, inputs[0])
    rank = max(value.rank, len(target))
    value = context.reshape(value, [1] * (rank - value.rank) + list(value.sizes)) if rank > value.rank else value
    target = [1] * (rank - len(target)) + target
    repeats = []
    for axis in value.axes:
        have, want = value.sizes[axis], target[axis]
        if have != 1 or want == 1:
            repeats.append(1)
        else:
            repeats.append(number(node, want))
    if all(n == 1 for n in repeats):
        return value
    return context.value(ops.tile(value.tensor, repeats), value.axes, at_least_zero=value.at_least_zero)


@operator("ConstantOfShape")
def _filled(context: Context, node: Node, inputs: Inputs) -> Any:
    del context
    if not has_sizes(inputs[0]):
        raise unsupported(node, "computes its shape")
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return np.full([1 if isinstance(n, Size) else int(n) for n in np.ravel(inputs[0])], value.ravel()[0], value.dtype)


@operator("DepthToSpace", "SpaceToDepth")
def _blocks(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    size = node.attributes["blocksize"]
    channels, height, width = (number(node, n) for n in value.sizes[1:])
    order = channels_last(4)
    x = context.arranged(value, order)
    if node.kind == "SpaceToDepth":
        x = ops.reshape(x, (-1, height // size, size, width // size, size, channels))
        crd = node.attributes.get("mode", "DCR") == "CRD"
        x = ops.transpose(x, (0, 1, 3, 5, 2, 4) if crd else (0, 1, 3, 2, 4, 5))
        x = ops.reshape(x, (-1, height // size, width // size, size * size * channels))
        return context.value(x, order, at_least_zero=value.at_least_zero)
    left = channels // size**2
    if node.attributes.get("mode", "DCR") == "DCR":
        x = ops.transpose(ops.reshape(x, (-1, height, width, size, size, left)), (0, 1, 3, 2, 4, 5))
    else:
        x = ops.transpose(ops.reshape(x, (-1, height, width, left, size, size)), (0, 1, 4, 2, 5, 3))
    x = ops.reshape(x, (-1, height * size, width * size, left))
    return context.value(x, order, at_least_zero=value.at_least_zero)


@operator("Trilu")
def _triangle(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    shift = optional(inputs, 1)
    shift = 0 if shift is None else int(np.ravel(argument(node, inputs, 1, "k"))[0])
    rows, columns = (number(node, n) for n in value.sizes[-2:])
    upper = node.attributes.get("upper", 1)
    mask = np.triu(np.ones((rows, columns), bool), shift) if upper else np.tril(np.ones((rows, columns), bool), shift)
    x = context.plain(value)
    return context.value(ops.where(mask, x, ops.zeros_like(x)))


@operator("ReverseSequence")
def _reverse(context: Context, node: Node, inputs: Inputs) -> Any:
    value, lengths = moving(node, inputs[0]), context.plain(inputs[1])
    time, batch = node.attributes.get("time_axis", 0), node.attributes.get("batch_axis", 1)
    order = (batch, time, *(axis for axis in value.axes if axis not in (batch, time)))
    x = context.arranged(value, order)
    count = number(node, value.sizes[time])
    steps = ops.arange(count, dtype="int32")[None, :]
    ends = ops.expand_dims(ops.cast(lengths, "int32"), 1)
    places = ops.where(steps < ends, ends - 1 - steps, steps)
    places = ops.reshape(places, (-1, count, *[1] * (value.rank - 2)))
    return context.value(ops.take_along_axis(x, ops.broadcast_to(places, ops.shape(x)), axis=1), order)


@operator("Range")
def _range(context: Context, node: Node, inputs: Inputs) -> Any:
    del context, inputs
    raise UnsupportedModelError(
        f"{node.kind} `{node.name}` counts to a length that is not known; fix it with inputs={{name: shape}}"
    )
