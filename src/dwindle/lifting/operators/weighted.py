"""Operators with trained weights: convolutions, fully connected ones, products and look-ups."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dwindle.lifting.constants import Gather, MatMul
from dwindle.lifting.flatbuffer import Operation
from dwindle.lifting.operators.registry import (
    Context,
    finish,
    fused_activation,
    operator,
    optional,
    padding,
    rank_of,
    spatial,
    unsupported,
    weight,
)


@operator("CONV_2D")
def _conv_2d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    kernel, bias = weight(operation, 1), optional(operation, 2)
    out_channels, height, width, in_channels = kernel.shape
    channels = int(inputs[0].shape[-1])
    strides = (operation.options["strideH"], operation.options["strideW"])
    dilation = (operation.options["dilationHFactor"], operation.options["dilationWFactor"])
    if max(strides) > 1 and max(dilation) > 1:
        raise unsupported(operation, "is strided and dilated at once")
    layer = context.layer(
        keras.layers.Conv2D, operation, filters=out_channels, kernel_size=(height, width), strides=strides,
        dilation_rate=dilation, padding=padding(operation), groups=channels // in_channels,
        use_bias=bias is not None, activation=fused_activation(operation),
    )  # fmt: skip
    context.weights(layer, kernel=(kernel, "conv2d"), bias=(bias, "plain"))
    return layer(inputs[0])


@operator("DEPTHWISE_CONV_2D")
def _depthwise_conv_2d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    kernel, bias = weight(operation, 1), optional(operation, 2)
    _, height, width, out_channels = kernel.shape
    strides = (operation.options["strideH"], operation.options["strideW"])
    dilation = (operation.options["dilationHFactor"], operation.options["dilationWFactor"])
    if strides[0] != strides[1] or (max(dilation) > 1 and max(strides) > 1):
        if max(dilation) > 1 and max(strides) > 1:
            raise unsupported(operation, "is strided and dilated at once")
        # Keras' depthwise layer takes one stride only; a grouped convolution computes the same.
        layer = context.layer(
            keras.layers.Conv2D, operation, filters=out_channels, kernel_size=(height, width), strides=strides,
            dilation_rate=dilation, padding=padding(operation), groups=int(inputs[0].shape[-1]),
            use_bias=bias is not None, activation=fused_activation(operation),
        )  # fmt: skip
        context.weights(layer, kernel=(kernel, "depthwise_as_conv2d"), bias=(bias, "plain"))
        return layer(inputs[0])
    layer = context.layer(
        keras.layers.DepthwiseConv2D, operation, kernel_size=(height, width), strides=strides,
        dilation_rate=dilation, padding=padding(operation), depth_multiplier=out_channels // int(inputs[0].shape[-1]),
        use_bias=bias is not None, activation=fused_activation(operation),
    )  # fmt: skip
    context.weights(layer, kernel=(kernel, "depthwise"), bias=(bias, "plain"))
    return layer(inputs[0])


@operator("TRANSPOSE_CONV")
def _transpose_conv(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    kernel, bias = weight(operation, 1), optional(operation, 3)
    out_channels, height, width, _ = kernel.shape
    strides = (operation.options["strideH"], operation.options["strideW"])
    before, after = inputs[2].shape[1:3], operation.outputs[0].shape[1:3]
    same = padding(operation) == "same"
    size = (height, width)
    # Output sizes that a forward convolution maps to the same input size differ by less than a stride.
    least = [(b - 1) * s + (k - 2 * (k // 2) if same else k)
             for b, s, k in zip(before, strides, size, strict=True)]  # fmt: skip
    usual = [b * s if same else b * s + max(k - s, 0) for b, s, k in zip(before, strides, size, strict=True)]
    extra = None if list(after) == usual else tuple(a - least_ for a, least_ in zip(after, least, strict=True))
    if extra is not None and any(not 0 <= e < s for e, s in zip(extra, strides, strict=True)):
        raise unsupported(operation, f"makes {tuple(after)} of {tuple(before)}")
    layer = context.layer(
        keras.layers.Conv2DTranspose, operation, filters=out_channels, kernel_size=size, strides=strides,
        padding=padding(operation), output_padding=extra, use_bias=bias is not None,
        activation=fused_activation(operation),
    )  # fmt: skip
    context.weights(layer, kernel=(kernel, "transpose_conv"), bias=(bias, "plain"))
    return layer(inputs[2])


@operator("CONV_3D")
def _conv_3d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    spatial(context, operation)
    kernel, bias = weight(operation, 1), optional(operation, 2)
    options = operation.options
    layer = context.layer(
        keras.layers.Conv3D, operation, filters=kernel.shape[4], kernel_size=tuple(kernel.shape[:3]),
        strides=(options["strideD"], options["strideH"], options["strideW"]),
        dilation_rate=(options["dilationDFactor"], options["dilationHFactor"], options["dilationWFactor"]),
        padding=padding(operation), use_bias=bias is not None, activation=fused_activation(operation),
    )  # fmt: skip
    context.weights(layer, kernel=(kernel, "plain"), bias=(bias, "plain"))
    return layer(inputs[0])


@operator("FULLY_CONNECTED")
def _fully_connected(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    kernel, bias = weight(operation, 1), optional(operation, 2)
    units, features = kernel.shape
    value = inputs[0]
    flat = rank_of(operation) > 2 and not operation.options.get("keepNumDims")
    if int(value.shape[-1]) != features or (flat and not context.shift):
        if context.shift:
            raise unsupported(operation, "regroups its input")
        value = context.layer(keras.layers.Flatten, operation)(value)
    layer = context.layer(
        keras.layers.Dense, operation, units=units, use_bias=bias is not None, activation=fused_activation(operation)
    )
    context.weights(layer, kernel=(kernel, "dense"), bias=(bias, "plain"))
    found = layer(value)
    wanted = operation.outputs[0].shape
    if context.shift and tuple(found.shape[1:]) != tuple(wanted):
        found = keras.layers.Reshape(wanted)(found)
    return found


@operator("BATCH_MATMUL")
def _batch_matmul(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    transposed = bool(operation.options.get("adjX")), bool(operation.options.get("adjY"))
    fixed = [position for position in (0, 1) if inputs[position] is None]
    if not fixed:
        ranks = {rank_of(operation, position) for position in (0, 1)}
        if len(ranks) > 1:
            raise unsupported(operation, "multiplies tensors of different ranks")
        layer = context.layer(
            MatMul, operation, transpose_a=transposed[0], transpose_b=transposed[1],
            scales=context.integer_scales(operation),
        )  # fmt: skip
        return finish(context, operation, layer([inputs[0], inputs[1]]))
    given = weight(operation, fixed[0])
    rank = rank_of(operation, 1 - fixed[0])
    if len(given.shape) == rank and not context.shift and given.shape[0] != 1:
        raise unsupported(operation, "multiplies samples with different constants")
    layer = context.layer(
        MatMul, operation, transpose_a=transposed[0], transpose_b=transposed[1], constant=given.shape,
        constant_first=fixed[0] == 0,
    )  # fmt: skip
    context.weights(layer, kernel=(given, "plain"))
    return finish(context, operation, layer(inputs[1 - fixed[0]]))


@operator("GATHER")
def _gather(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    axis = int(operation.options.get("axis", 0))
    if operation.options.get("batchDims"):
        raise unsupported(operation, "gathers within batches")
    if inputs[0] is None:
        table = weight(operation, 0)
        if axis % len(table.shape) != 0 or table.dtype != np.float32:
            raise unsupported(operation, "looks up along another axis than the first, or integers")
        layer = context.layer(Gather, operation, rows=table.shape[0], width=tuple(table.shape[1:]))
        context.weights(layer, embeddings=(table, "plain"))
        return layer(inputs[1])
    indices = operation.inputs[1]
    if indices is None or indices.value is None:
        raise unsupported(operation, "computes which entries of an activation it takes")
    found = axis % rank_of(operation) + context.shift
    if found == 0:
        raise unsupported(operation, "takes entries along the batch axis")
    return keras.ops.take(inputs[0], np.asarray(indices.value), axis=found)


@operator("EMBEDDING_LOOKUP")
def _embedding_lookup(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    table = weight(operation, 1)
    layer = context.layer(Gather, operation, rows=table.shape[0], width=tuple(table.shape[1:]))
    context.weights(layer, embeddings=(table, "plain"))
    return layer(inputs[0])
