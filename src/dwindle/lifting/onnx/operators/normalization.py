"""Normalizations, and what makes probabilities of numbers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.registry import (
    Context,
    Inputs,
    is_constant,
    moving,
    operator,
    optional,
    unsupported,
)
from dwindle.lifting.onnx.values import Moving, channels_last

ops = keras.ops


@operator("BatchNormalization")
def _batch(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    if node.attributes.get("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise unsupported(node, "normalizes with the statistics of a batch")
    order = channels_last(value.rank) if value.rank > 2 else tuple(range(value.rank))
    tensor = context.arranged(value, order)
    epsilon = node.attributes.get("epsilon", 1e-5)
    if all(is_constant(given) for given in inputs[1:5]) and value.rank > 1:
        layer = context.shared(
            node, (1, 2, 3, 4), keras.layers.BatchNormalization, axis=-1, epsilon=epsilon,
            momentum=node.attributes.get("momentum", 0.9),
        )  # fmt: skip
        gamma, beta, mean, variance = inputs[1:5]
        found = context.filled(layer, tensor, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance)
        return context.value(found, order)
    gamma, beta, mean, variance = (context.plain(given) for given in inputs[1:5])
    scale = ops.divide(gamma, ops.sqrt(ops.add(variance, epsilon)))
    return context.value((tensor - mean) * scale + beta, order)


def _over(node: Node, value: Moving) -> list[int]:
    axis = node.attributes.get("axis", -1) % value.rank
    return list(range(axis, value.rank))


@operator(
    "LayerNormalization",
    "RMSNormalization",
    "com.microsoft::SimplifiedLayerNormalization",
    "SimplifiedLayerNormalization",
)
def _layer(context: Context, node: Node, inputs: Inputs) -> Any:
    value, scale, bias = moving(node, inputs[0]), inputs[1], optional(inputs, 2)
    over = _over(node, value)
    epsilon = node.attributes.get("epsilon", 1e-5)
    front = [axis for axis in value.axes if axis not in over]
    order = (*front, *over)
    tensor = context.arranged(value, order)
    root = node.kind != "LayerNormalization"
    whole = is_constant(scale) and scale.shape == tuple(value.sizes[axis] for axis in over)
    whole = whole and (bias is None or (is_constant(bias) and bias.shape == scale.shape))
    axes = list(range(len(front), value.rank))
    if whole and len([name for name in node.outputs if name]) == 1 and (not root or len(axes) == 1) and front:
        if root:
            layer = context.shared(node, (1,), keras.layers.RMSNormalization, axis=-1, epsilon=epsilon)
            return context.value(context.filled(layer, tensor, scale=scale), order)
        layer = context.shared(
            node, (1, 2), keras.layers.LayerNormalization, axis=axes if len(axes) > 1 else -1, epsilon=epsilon,
            center=bias is not None,
        )  # fmt: skip
        return context.value(context.filled(layer, tensor, gamma=scale, beta=bias), order)
    mean = ops.mean(tensor, axis=axes, keepdims=True)
    centred = tensor if root else ops.subtract(tensor, mean)
    deviation = ops.rsqrt(ops.add(ops.mean(ops.square(centred), axis=axes, keepdims=True), epsilon))
    found = ops.multiply(ops.multiply(centred, deviation), context.plain(scale))
    found = found if bias is None else ops.add(found, context.plain(bias))
    return [context.value(t, order) for t in (found, mean, deviation)]


@operator("InstanceNormalization", "GroupNormalization")
def _group(context: Context, node: Node, inputs: Inputs) -> Any:
    value, scale, bias = moving(node, inputs[0]), inputs[1], inputs[2]
    order = channels_last(value.rank)
    tensor = context.arranged(value, order)
    channels = int(tensor.shape[-1])
    groups = channels if node.kind == "InstanceNormalization" else node.attributes["num_groups"]
    epsilon = node.attributes.get("epsilon", 1e-5)
    if is_constant(scale) and is_constant(bias):
        if scale.size != channels:  # version 18: one for each group
            scale, bias = np.repeat(scale, channels // groups), np.repeat(bias, channels // groups)
        layer = context.shared(node, (1, 2), keras.layers.GroupNormalization, groups=groups, axis=-1, epsilon=epsilon)
        return context.value(context.filled(layer, tensor, gamma=scale, beta=bias), order)
    scale, bias = context.plain(scale), context.plain(bias)
    if int(scale.shape[0]) != channels:
        scale, bias = (ops.repeat(given, channels // groups) for given in (scale, bias))
    lengths = [int(n) for n in tensor.shape[1:-1]]
    parted = ops.reshape(tensor, (-1, *lengths, groups, channels // groups))
    axes = (*range(1, len(lengths) + 1), len(lengths) + 2)
    mean = ops.mean(parted, axis=axes, keepdims=True)
    variance = ops.mean(ops.square(parted - mean), axis=axes, keepdims=True)
    found = ops.reshape((parted - mean) / ops.sqrt(variance + epsilon), (-1, *lengths, channels))
    return context.value(found * scale + bias, order)


@operator("MeanVarianceNormalization")
def _mean_variance(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    axes = tuple(value.place(axis) for axis in node.attributes.get("axes", (0, 2, 3)))
    centred = value.tensor - ops.mean(value.tensor, axis=axes, keepdims=True)
    deviation = ops.sqrt(ops.mean(ops.square(centred), axis=axes, keepdims=True))
    return context.value(centred / (deviation + 1e-9), value.axes)


@operator("LpNormalization")
def _norm(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    place = value.place(node.attributes.get("axis", -1))
    x = value.tensor
    if node.attributes.get("p", 2) == 1:
        size = ops.sum(ops.abs(x), axis=place, keepdims=True)
    else:
        size = ops.sqrt(ops.sum(ops.square(x), axis=place, keepdims=True))
    return context.value(ops.divide(x, ops.where(ops.equal(size, 0), ops.ones_like(size), size)), value.axes)


@operator("LRN")
def _local_response(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    order = channels_last(value.rank)
    x = context.arranged(value, order)
    given, size = node.attributes, node.attributes["size"]
    before, behind = (size - 1) // 2, size - 1 - (size - 1) // 2
    channels = int(x.shape[-1])
    # A band of ones sums the squares of neighbouring channels.
    band = np.zeros((channels, channels), np.float32)
    for k in range(channels):
        band[max(0, k - before) : k + behind + 1, k] = 1
    total = ops.matmul(ops.square(x), band)
    factor = given.get("alpha", 1e-4) / size
    return context.value(x / ops.power(given.get("bias", 1.0) + factor * total, given.get("beta", 0.75)), order)


@operator("Softmax", "LogSoftmax", "Hardmax")
def _softmax(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    functions = {"Softmax": ops.softmax, "LogSoftmax": ops.log_softmax}
    if node.version < 13 and node.attributes.get("axis", 1) % value.rank != value.rank - 1:
        return _flat(context, node, value)
    place = value.place(node.attributes.get("axis", 1 if node.version < 13 else -1))
    if node.kind == "Hardmax":
        return context.value(_hardmax(value.tensor, place), value.axes)
    if node.kind == "Softmax":
        last = place == value.rank - 1 and value.rank > 1
        layer = context.layer(keras.layers.Activation, node, activation="softmax", dtype=value.dtype) if last else None
        found = layer(value.tensor) if layer else ops.softmax(value.tensor, axis=place)
        return context.value(found, value.axes, at_least_zero=True)
    return context.value(functions[node.kind](value.tensor, axis=place), value.axes)


def _flat(context: Context, node: Node, value: Moving) -> Any:
    """Return what versions before 13 compute: over all axes from one on."""
    axis = node.attributes.get("axis", 1) % value.rank
    places = tuple(sorted(value.place(a) for a in range(axis, value.rank)))
    x = value.tensor
    if node.kind == "Hardmax":
        raise unsupported(node, "works on several axes")
    shifted = x - ops.max(x, axis=places, keepdims=True)
    total = ops.sum(ops.exp(shifted), axis=places, keepdims=True)
    if node.kind == "Softmax":
        return context.value(ops.exp(shifted) / total, value.axes, at_least_zero=True)
    return context.value(shifted - ops.log(total), value.axes)


def _hardmax(tensor: Any, place: int) -> Any:
    shape = [1] * len(tensor.shape)
    shape[place] = -1
    places = np.arange(int(tensor.shape[place]), dtype=np.int32).reshape(shape)
    first = ops.cast(ops.argmax(tensor, axis=place, keepdims=True), "int32")
    return ops.cast(ops.equal(first, places), keras.backend.standardize_dtype(tensor.dtype))
