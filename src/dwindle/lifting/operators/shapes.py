"""Operators that move, cut, join and reduce."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.constants import Pad, Slice
from dwindle.lifting.flatbuffer import Operation
from dwindle.lifting.operators.registry import (
    Context,
    constant,
    finish,
    keras_axis,
    operator,
    padding,
    rank_of,
    spatial,
    unsupported,
)
from dwindle.lifting.resizing import BilinearResize


@operator("MAX_POOL_2D", "AVERAGE_POOL_2D")
def _pool_2d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    cls = keras.layers.MaxPooling2D if operation.name == "MAX_POOL_2D" else keras.layers.AveragePooling2D
    layer = context.layer(
        cls,
        operation,
        pool_size=(operation.options["filterHeight"], operation.options["filterWidth"]),
        strides=(operation.options["strideH"], operation.options["strideW"]),
        padding=padding(operation),
    )
    return finish(context, operation, layer(inputs[0]))


@operator("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _reshape(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    shape = operation.outputs[0].shape
    after = shape if context.shift else shape[1:]
    before = inputs[0].shape[1:]
    if (not context.shift and shape[:1] != (1,)) or int(np.prod(before)) != int(np.prod(after)):
        raise unsupported(operation, f"moves values across the batch axis ({tuple(inputs[0].shape)} to {shape})")
    if len(after) == 1:  # says what it does whatever the width, so that a narrower twin fits together
        return context.layer(keras.layers.Flatten, operation)(inputs[0])
    return context.layer(keras.layers.Reshape, operation, target_shape=tuple(after))(inputs[0])


@operator("TRANSPOSE")
def _transpose(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    order = [int(axis) for axis in constant(operation, 1)]
    if context.shift:
        order = [0, *[axis + 1 for axis in order]]
    if order[0] != 0:
        raise unsupported(operation, f"moves the batch axis ({order})")
    return context.layer(keras.layers.Permute, operation, dims=tuple(order[1:]))(inputs[0])


@operator("CONCATENATION")
def _concatenation(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    axis = keras_axis(context, operation, operation.options["axis"], len(operation.outputs[0].shape))
    if any(value is None for value in inputs):
        raise unsupported(operation, "joins a constant")
    return finish(context, operation, context.layer(keras.layers.Concatenate, operation, axis=axis)(inputs))


@operator("PACK")
def _pack(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    axis = keras_axis(context, operation, operation.options["axis"], len(operation.outputs[0].shape))
    if any(value is None for value in inputs):
        raise unsupported(operation, "joins a constant")
    return keras.ops.stack(inputs, axis=axis)


@operator("UNPACK")
def _unpack(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    axis = keras_axis(context, operation, operation.options["axis"], rank_of(operation))
    return list(keras.ops.unstack(inputs[0], num=int(operation.options["num"]), axis=axis))


@operator("ONE_HOT")
def _one_hot(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    depth, on, off = (constant(operation, place).item() for place in (1, 2, 3))
    axis = int(operation.options.get("axis", -1))
    if axis not in (-1, rank_of(operation)):
        raise unsupported(operation, "puts the classes before the last axis")
    dtype = np.dtype(operation.outputs[0].dtype).name
    found = keras.ops.one_hot(keras.ops.cast(inputs[0], "int32"), depth, dtype=dtype)
    if on == 1 and off == 0:
        return found
    return keras.ops.add(keras.ops.multiply(found, on - off), off)


@operator("PAD", "PADV2", "MIRROR_PAD")
def _pad(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    paddings = np.asarray(constant(operation, 1)).tolist()
    if context.shift:
        paddings = [[0, 0], *paddings]
    if any(paddings[0]):
        raise unsupported(operation, "pads the batch axis")
    fill = float(constant(operation, 2).reshape(())) if operation.name == "PADV2" else 0.0
    mode = "constant"
    if operation.name == "MIRROR_PAD":
        reflected = operation.options.get("mode", 0) == schema.MirrorPadMode.REFLECT
        mode = "reflect" if reflected else "symmetric"
    return context.layer(Pad, operation, paddings=paddings, fill=fill, mode=mode)(inputs[0])


_REDUCTIONS = {
    "MEAN": keras.ops.mean, "SUM": keras.ops.sum, "REDUCE_MAX": keras.ops.max, "REDUCE_MIN": keras.ops.min,
    "REDUCE_PROD": keras.ops.prod, "REDUCE_ANY": keras.ops.any, "REDUCE_ALL": keras.ops.all,
}  # fmt: skip


@operator(*_REDUCTIONS)
def _reduce(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    rank = rank_of(operation)
    axes = sorted(keras_axis(context, operation, axis, rank) for axis in np.atleast_1d(constant(operation, 1)))
    keep = bool(operation.options.get("keepDims"))
    if operation.name in ("MEAN", "REDUCE_MAX") and len(inputs[0].shape) == 4 and axes == [1, 2]:
        cls = keras.layers.GlobalAveragePooling2D if operation.name == "MEAN" else keras.layers.GlobalMaxPooling2D
        return context.layer(cls, operation, keepdims=keep)(inputs[0])
    return _REDUCTIONS[operation.name](inputs[0], axis=tuple(axes), keepdims=keep)


@operator("ARG_MAX", "ARG_MIN")
def _arg(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    axis = keras_axis(context, operation, int(constant(operation, 1).reshape(())), rank_of(operation))
    function = keras.ops.argmax if operation.name == "ARG_MAX" else keras.ops.argmin
    return keras.ops.cast(function(inputs[0], axis=axis), np.dtype(operation.outputs[0].dtype).name)


@operator("CUMSUM")
def _cumsum(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    if operation.options.get("exclusive") or operation.options.get("reverse"):
        raise unsupported(operation, "sums backwards or without the last")
    axis = keras_axis(context, operation, int(constant(operation, 1).reshape(())), rank_of(operation))
    return keras.ops.cumsum(inputs[0], axis=axis)


@operator("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
def _resize(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    size = [int(v) for v in constant(operation, 1)]
    if operation.options.get("alignCorners") or not operation.options.get("halfPixelCenters"):
        before = [int(v) for v in inputs[0].shape[1:3]]
        whole = all(new % old == 0 for new, old in zip(size, before, strict=True))
        if operation.name == "RESIZE_BILINEAR" or not whole:
            raise unsupported(operation, "does not sample at half-pixel centres")
    if operation.name == "RESIZE_BILINEAR":
        layer = context.layer(
            BilinearResize, operation, height=size[0], width=size[1], scale=context.kept_scale(operation)
        )
    else:
        layer = context.layer(
            keras.layers.Resizing, operation, height=size[0], width=size[1], interpolation="nearest"
        )  # fmt: skip
    return layer(inputs[0])


@operator("SPLIT", "SPLIT_V")
def _split(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    first = operation.name == "SPLIT"
    value = inputs[1] if first else inputs[0]
    axis_value = int(constant(operation, 0 if first else 2).reshape(()))
    axis = keras_axis(context, operation, axis_value, rank_of(operation, 1 if first else 0))
    sizes = [tensor.shape[axis - context.shift] for tensor in operation.outputs]
    where = np.cumsum(sizes)[:-1].tolist()
    return list(keras.ops.split(value, where, axis=axis))


@operator("STRIDED_SLICE")
def _strided_slice(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    begin, end, step = (constant(operation, position) for position in (1, 2, 3))
    options = operation.options
    if options.get("ellipsisMask") or options.get("newAxisMask") or options.get("offset"):
        raise unsupported(operation, "has an ellipsis, a new axis or an offset")
    parts: list[list[Any]] = []
    for axis in range(len(begin)):
        low = None if options.get("beginMask", 0) >> axis & 1 else int(begin[axis])
        high = None if options.get("endMask", 0) >> axis & 1 else int(end[axis])
        single = options.get("shrinkAxisMask", 0) >> axis & 1
        parts.append([int(begin[axis]), None, 1] if single else [low, high, int(step[axis])])
    shrink = [axis for axis in range(len(begin)) if options.get("shrinkAxisMask", 0) >> axis & 1]
    if not context.shift:
        if parts and (0 in shrink or parts[0][:2] not in ([None, None], [0, None], [0, 1])):
            raise unsupported(operation, "cuts the batch axis")
        parts = parts[1:]
    shrink = [axis + context.shift for axis in shrink]
    return context.layer(Slice, operation, parts=parts, shrink=shrink)(inputs[0])


@operator("SLICE")
def _slice(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    begin, size = ([int(v) for v in constant(operation, position)] for position in (1, 2))
    parts = [[low, None if count < 0 else low + count, 1] for low, count in zip(begin, size, strict=True)]
    if not context.shift:
        if parts[0][:2] not in ([0, None], [0, 1]):
            raise unsupported(operation, "cuts the batch axis")
        parts = parts[1:]
    return context.layer(Slice, operation, parts=parts)(inputs[0])


@operator("BROADCAST_TO")
def _broadcast_to(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    before, after = rank_of(operation), operation.outputs[0].shape
    if not context.shift and (before != len(after) or after[0] != 1):
        raise unsupported(operation, "stretches the batch axis")
    value, target = inputs[0], tuple(after) if context.shift else tuple(after[1:])
    if len(value.shape) - 1 < len(target):
        value = keras.ops.reshape(value, (-1, *[1] * (len(target) - len(value.shape) + 1), *value.shape[1:]))
    repeats = [new // old for new, old in zip(target, value.shape[1:], strict=True)]
    return keras.ops.tile(value, (1, *repeats))


@operator("TILE")
def _tile(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    repeats = [int(v) for v in constant(operation, 1)]
    if context.shift:
        repeats = [1, *repeats]
    if repeats[0] != 1:
        raise unsupported(operation, "repeats the batch axis")
    return keras.ops.tile(inputs[0], tuple(repeats))


@operator("REVERSE_V2")
def _reverse(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    rank = rank_of(operation)
    axes = [keras_axis(context, operation, axis, rank) for axis in np.atleast_1d(constant(operation, 1))]
    return keras.ops.flip(inputs[0], axis=tuple(axes))


@operator("DEPTH_TO_SPACE", "SPACE_TO_DEPTH")
def _depth_and_space(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    block = int(operation.options["blockSize"])
    height, width, depth = (int(size) for size in inputs[0].shape[1:])
    if operation.name == "DEPTH_TO_SPACE":
        parts = keras.layers.Reshape((height, width, block, block, depth // block**2))(inputs[0])
        moved = keras.layers.Permute((1, 3, 2, 4, 5))(parts)
    else:
        parts = keras.layers.Reshape((height // block, block, width // block, block, depth))(inputs[0])
        moved = keras.layers.Permute((1, 3, 2, 4, 5))(parts)
    return context.layer(keras.layers.Reshape, operation, target_shape=operation.outputs[0].shape[1:])(moved)
