"""Products of matrices."""

from __future__ import annotations

from typing import Any, cast

import keras
import numpy as np

from dwindle.lifting.constants import MatMul
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.registry import (
    OPERATORS,
    Context,
    Inputs,
    is_constant,
    moving,
    operator,
    optional,
    unsupported,
)
from dwindle.lifting.onnx.values import Moving

ops = keras.ops


def _dense(context: Context, node: Node, value: Moving, axis: int, kernel: np.ndarray, bias: np.ndarray | None,
           places: tuple[int, ...]) -> Any:  # fmt: skip
    """Return a product of an axis of a value with a kernel of shape ``(inputs, outputs)``."""
    axis %= value.rank
    if value.merged is not None and axis == 1:
        return _behind_flatten(context, node, value, kernel, bias, places)
    order = (*(a for a in value.axes if a != axis), axis)
    tensor = context.arranged(value, order)
    layer = context.shared(node, places, keras.layers.Dense, units=kernel.shape[1], use_bias=bias is not None)
    return context.value(context.filled(layer, tensor, kernel=kernel, bias=bias), order)


def _behind_flatten(context: Context, node: Node, value: Moving, kernel: np.ndarray, bias: np.ndarray | None,
                    places: tuple[int, ...]) -> Any:  # fmt: skip
    """Return the product with a flattened tensor, whose axes lie in another order: the kernel's rows are sorted."""
    source = cast(Moving, value.merged)
    lengths = [int(n) for n in source.sizes[1:]]
    rows = kernel.reshape(*lengths, kernel.shape[1]).transpose(*(axis - 1 for axis in source.axes[1:]), len(lengths))
    flat = keras.layers.Flatten()(source.tensor)
    layer = context.shared(node, places, keras.layers.Dense, units=kernel.shape[1], use_bias=bias is not None)
    return context.value(context.filled(layer, flat, kernel=rows.reshape(kernel.shape), bias=bias), (0, 1))


def _as_bias(constant: np.ndarray, units: int) -> np.ndarray | None:
    fits = constant.dtype == np.float32 and constant.size == units and constant.shape[-1:] == (units,)
    return constant.ravel() if fits else None


@operator("MatMul")
def _product(context: Context, node: Node, inputs: Inputs) -> Any:
    a, b = inputs
    if is_constant(b) and b.ndim == 2 and b.dtype == np.float32 and a.rank > 1:
        bias = context.added_behind(node, lambda constant: _as_bias(constant, b.shape[1]))
        return _dense(context, node, a, -1, b, bias, (1, 2))
    if is_constant(a) and a.ndim == 2 and a.dtype == np.float32 and b.rank > 1 and len(b.sizes) > 2:
        return _dense(context, node, b, -2, np.ascontiguousarray(a.T), None, (0,))
    if is_constant(a) or is_constant(b):
        return _with_constant(context, node, a, b)
    if min(a.rank, b.rank) < 2 or "float" not in a.dtype:
        return context.value(ops.matmul(context.plain(a), context.plain(b)))
    return _of_two(context, node, a, b)


def _with_constant(context: Context, node: Node, a: Any, b: Any) -> Any:
    constant, value = (a, b) if is_constant(a) else (b, a)
    if constant.dtype != np.float32 or constant.ndim < 2 or value.rank < 2:
        return context.value(ops.matmul(context.plain(a), context.plain(b)))
    first = is_constant(a)
    layer = context.layer(MatMul, node, constant=constant.shape, constant_first=first)
    return context.value(context.filled(layer, context.plain(value), kernel=constant))


def _of_two(context: Context, node: Node, a: Moving, b: Moving) -> Any:
    rank = max(a.rank, b.rank)
    turned, tensors = [], []
    for value in (a, b):
        if value.rank < rank:
            value = context.reshape(value, (*[1] * (rank - value.rank), *value.sizes))
        swapped = value.place(-1) < value.place(-2)
        turned.append(swapped)
        order = (*range(rank - 2), rank - 1, rank - 2) if swapped else tuple(range(rank))
        tensors.append(context.arranged(value, order))
    if not any(turned):
        return context.value(ops.matmul(*tensors))
    layer = context.layer(MatMul, node, transpose_a=turned[0], transpose_b=turned[1])
    return context.value(layer(tensors))


@operator("Gemm")
def _general(context: Context, node: Node, inputs: Inputs) -> Any:
    a, b, c = inputs[0], inputs[1], optional(inputs, 2)
    given = node.attributes
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    turn_a, turn_b = given.get("transA", 0), given.get("transB", 0)
    if isinstance(a, Moving) and is_constant(b) and b.dtype == np.float32 and not turn_a:
        kernel = np.ascontiguousarray(b.T if turn_b else b) * np.float32(alpha)
        bias = None
        if c is None:
            bias = context.added_behind(node, lambda constant: _as_bias(constant, kernel.shape[1]))
        elif is_constant(c):
            bias = _as_bias(np.broadcast_to(c, (kernel.shape[1],)) if c.size == 1 else c, kernel.shape[1])
            bias = None if bias is None else bias * np.float32(beta)
        if c is None or bias is not None:
            return _dense(context, node, a, -1, kernel, bias, (1, 2))
    left, right = context.plain(a), context.plain(b)
    left, right = ops.transpose(left) if turn_a else left, ops.transpose(right) if turn_b else right
    found = ops.matmul(left, right)
    found = found if alpha == 1 else ops.multiply(found, alpha)
    if c is None:
        return context.value(found)
    added = context.plain(c)
    return context.value(ops.add(found, added if beta == 1 else ops.multiply(added, beta)))


@operator("Einsum")
def _einsum(context: Context, node: Node, inputs: Inputs) -> Any:
    tensors = [context.plain(value) for value in inputs]
    tensors = [ops.convert_to_tensor(t) if is_constant(t) else t for t in tensors]
    equation = node.attributes["equation"].replace(" ", "")
    if "->" not in equation:
        letters = equation.replace(",", "").replace("...", "")
        equation += "->" + ("..." if "..." in equation else "")
        equation += "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return context.value(ops.einsum(equation, *tensors))


@operator("MatMulInteger")
def _of_integers(context: Context, node: Node, inputs: Inputs) -> Any:
    terms = []
    for place in (0, 1):
        x, zero = context.plain(inputs[place]), context.plain(optional(inputs, place + 2))
        x = x.astype(np.float32) if is_constant(x) else ops.cast(x, "float32")
        if zero is not None:
            zero = zero.astype(np.float32) if is_constant(zero) else ops.cast(zero, "float32")
            shape = (-1, 1) if place == 0 and len(zero.shape) == 1 and zero.shape[0] != 1 else tuple(zero.shape)
            x = ops.subtract(x, ops.reshape(zero, shape))
        terms.append(x)
    if terms[0].shape[-1] is not None and int(terms[0].shape[-1]) > 256:
        context.note(f"{node.kind} `{node.name}` adds more than float32 holds exactly; sums may be off by one step")
    return context.value(ops.cast(ops.round(ops.matmul(*terms)), "int32"))


@operator("QLinearMatMul")
def _quantized(context: Context, node: Node, inputs: Inputs) -> Any:
    def real(first: int, axis: int) -> Any:
        x, scale, zero = (context.plain(inputs[first + k]) for k in range(3))
        x, zero = (ops.cast(v, "float32") for v in (x, zero))
        if len(scale.shape) == 1 and scale.shape[0] != 1:
            shape = (-1, 1) if axis == 0 else (1, -1)
            scale, zero = ops.reshape(scale, shape), ops.reshape(zero, shape)
        return ops.multiply(ops.subtract(x, zero), scale)

    found = ops.matmul(real(0, 0), real(3, 1))
    return OPERATORS["QuantizeLinear"](context, node, [context.value(found), inputs[6], inputs[7]])


@operator("QLinearConv")
def _quantized_convolution(context: Context, node: Node, inputs: Inputs) -> Any:
    kernel, scale, zero = inputs[3:6]
    if not all(is_constant(value) for value in (kernel, scale, zero, *inputs[1:3])):
        raise unsupported(node, "computes its kernel or its steps")
    shape = (-1, *[1] * (kernel.ndim - 1))
    weight = (kernel.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    bias = optional(inputs, 8)
    bias = None if bias is None else bias.astype(np.float32) * (np.ravel(inputs[1])[0] * np.ravel(scale))
    source = OPERATORS["DequantizeLinear"](context, node, [moving(node, inputs[0]), *inputs[1:3]])
    found = OPERATORS["Conv"](context, node, [source, weight, bias])
    return OPERATORS["QuantizeLinear"](context, node, [found, inputs[6], inputs[7]])
