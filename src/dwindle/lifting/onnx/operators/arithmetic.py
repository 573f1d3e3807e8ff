"""Operators that compute entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dwindle.lifting.constants import ConstantOperand, FixedOperand
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
from dwindle.lifting.onnx.values import Moving, constant_in

ops = keras.ops


def aligned(context: Context, values: Inputs) -> tuple[list[Any], tuple[int, ...]]:
    """Return operands that broadcast against each other as ONNX says, and the order of their axes.

    Moving operands become Keras tensors; constants, arrays.
    """
    rank = max(value.rank if isinstance(value, Moving) else value.ndim for value in values)
    full = [value for value in values if isinstance(value, Moving) and value.rank == rank]
    axes = next((value.axes for value in full if not value.plain), tuple(range(rank)))
    found = []
    for value in values:
        if is_constant(value):
            found.append(constant_in(value, rank, axes) if value.ndim else value)
        elif value.rank == rank:
            found.append(context.arranged(value, axes))
        else:
            longer = context.reshape(value, (*[1] * (rank - value.rank), *value.sizes))
            found.append(context.arranged(longer, axes))
    return found, axes


def added(a: Any, b: Any) -> Any:
    """Return a sum that broadcasts.

    Keras takes a right operand with one axis longer than 1 for a bias whenever that length is the last one of the left
    operand, wherever the axis lies (as of 3.15).
    """
    if not _looks_like_bias(b):
        return ops.add(a, b)
    return ops.add(b, a) if not _looks_like_bias(a) else ops.subtract(a, ops.negative(b))


def _looks_like_bias(value: Any) -> bool:
    shape = list(getattr(value, "shape", ()))
    long = [k for k, n in enumerate(shape) if n not in (1, None)]  # there may be one sample
    return len(long) == 1 and long[0] != len(shape) - 1


_MERGES: dict[str, type] = {
    "Add": keras.layers.Add, "Sub": keras.layers.Subtract, "Mul": keras.layers.Multiply,
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": added, "Sub": ops.subtract, "Mul": ops.multiply, "Div": ops.divide, "Pow": ops.power,
}  # fmt: skip


@operator("Add", "Sub", "Mul", "Div", "Pow")
def _binary(context: Context, node: Node, inputs: Inputs) -> Any:
    inputs = [_old_broadcast(node, inputs, k) for k in (0, 1)]
    (a, b), axes = aligned(context, inputs)
    constants = [value for value in inputs if is_constant(value)]
    integer = "int" in inputs[1 if is_constant(inputs[0]) else 0].dtype
    positive = _both_positive(node, inputs)
    if integer and node.kind == "Div":
        return context.value(_truncated(a, b), axes)
    if not constants:
        if node.kind in _MERGES and len(a.shape) > 1 and tuple(a.shape) == tuple(b.shape):
            return context.value(context.layer(_MERGES[node.kind], node)([a, b]), axes, at_least_zero=positive)
        return context.value(_cast_power(node, a, b), axes, at_least_zero=positive)
    constant, first = constants[0], is_constant(inputs[0])
    flat, tensor = (a, b) if first else (b, a)
    if constant.size == 1 and constant.ndim <= len(axes) and constant.dtype != object:
        scalar = constant.ravel()[0].item()
        return context.value(_cast_power(node, *((scalar, tensor) if first else (tensor, scalar))), axes,
                             at_least_zero=positive)  # fmt: skip
    kind = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow"}[node.kind]
    if constant.dtype not in (np.float32, np.float64, np.float16) or str(tensor.dtype) != str(constant.dtype):
        layer = context.layer(FixedOperand, node, kind=kind, value=flat.tolist(), dtype_name=str(flat.dtype),
                              constant_first=first) if integer and node.kind != "Div" else None  # fmt: skip
        return context.value(_cast_power(node, a, b) if layer is None else layer(tensor), axes)
    layer = context.layer(ConstantOperand, node, kind=kind, shape=flat.shape, constant_first=first,
                          dtype=str(flat.dtype))  # fmt: skip
    return context.value(context.filled(layer, tensor, value=flat), axes, at_least_zero=positive)


def _old_broadcast(node: Node, inputs: Inputs, place: int) -> Any:
    """Return an operand; before version 7, the right one stands at an axis of the left one."""
    value = inputs[place]
    if place == 0 or node.version >= 7 or not node.attributes.get("broadcast") or not is_constant(value):
        return value
    rank = inputs[0].rank if isinstance(inputs[0], Moving) else inputs[0].ndim
    axis = node.attributes.get("axis", rank - value.ndim)
    return value.reshape(*value.shape, *[1] * (rank - value.ndim - axis % max(rank, 1)))


def _both_positive(node: Node, inputs: Inputs) -> bool:
    if node.kind not in ("Add", "Mul"):
        return False
    return all(
        bool((value >= 0).all())
        if is_constant(value) and value.dtype != object
        else getattr(value, "at_least_zero", False)
        for value in inputs
    )


def _truncated(a: Any, b: Any) -> Any:
    """Return the quotient of integers, rounded towards zero as in C."""
    dtype = keras.backend.standardize_dtype(a.dtype if hasattr(a, "dtype") else b.dtype)
    if dtype.startswith("uint"):
        return ops.floor_divide(a, b)
    quotient = ops.floor_divide(ops.abs(a), ops.abs(b))
    return ops.cast(quotient * ops.sign(a) * ops.sign(b), dtype)


def _cast_power(node: Node, a: Any, b: Any) -> Any:
    if node.kind != "Pow":
        return _BINARY[node.kind](a, b)
    if isinstance(b, int | float):
        if b == 2:
            return ops.square(a)
        if b == 0.5:
            return ops.sqrt(a)
    if not hasattr(a, "dtype"):
        return ops.power(a, b)
    dtype = keras.backend.standardize_dtype(a.dtype)
    if hasattr(b, "dtype") and keras.backend.standardize_dtype(b.dtype) != dtype:
        if "float" in keras.backend.standardize_dtype(b.dtype) and "int" in dtype:
            return ops.cast(ops.power(ops.cast(a, "float32"), ops.cast(b, "float32")), dtype)
        b = ops.cast(b, dtype)
    return ops.power(a, b)


def _folded(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def compute(context: Context, node: Node, inputs: Inputs) -> Any:
        values, axes = aligned(context, inputs)
        total = values[0]
        for value in values[1:]:
            total = function(total, value)
        if node.kind == "Mean":
            total = ops.divide(total, float(len(values)))
        positive = all(getattr(value, "at_least_zero", False) for value in inputs)
        return context.value(
            ops.convert_to_tensor(total) if is_constant(total) else total, axes, at_least_zero=positive
        )

    return compute


operator("Max")(_folded(ops.maximum))
operator("Min")(_folded(ops.minimum))
operator("Sum", "Mean")(_folded(added))


@operator("Mod")
def _mod(context: Context, node: Node, inputs: Inputs) -> Any:
    (a, b), axes = aligned(context, inputs)
    if not node.attributes.get("fmod"):
        return context.value(ops.mod(a, b), axes)
    dtype = keras.backend.standardize_dtype(inputs[0].dtype)
    found = ops.mod(ops.abs(a), ops.abs(b)) * ops.cast(ops.sign(a), dtype)
    return context.value(ops.cast(found, dtype), axes)


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": ops.equal, "Greater": ops.greater, "GreaterOrEqual": ops.greater_equal, "Less": ops.less,
    "LessOrEqual": ops.less_equal, "And": ops.logical_and, "Or": ops.logical_or, "Xor": ops.logical_xor,
    "BitwiseAnd": ops.bitwise_and, "BitwiseOr": ops.bitwise_or, "BitwiseXor": ops.bitwise_xor,
}  # fmt: skip


@operator(*_COMPARISONS)
def _comparison(context: Context, node: Node, inputs: Inputs) -> Any:
    inputs = [_old_broadcast(node, inputs, k) for k in (0, 1)]
    (a, b), axes = aligned(context, inputs)
    return context.value(_COMPARISONS[node.kind](a, b), axes)


@operator("BitShift")
def _bit_shift(context: Context, node: Node, inputs: Inputs) -> Any:
    (a, b), axes = aligned(context, inputs)
    left = node.attributes["direction"] == "LEFT"
    return context.value((ops.left_shift if left else ops.right_shift)(a, b), axes)


@operator("Where")
def _where(context: Context, node: Node, inputs: Inputs) -> Any:
    del node
    values, axes = aligned(context, inputs)
    return context.value(ops.where(*values), axes)


_SIMPLE: dict[str, Callable[[Any], Any]] = {
    "Abs": ops.abs, "Neg": ops.negative, "Exp": ops.exp, "Log": ops.log, "Sqrt": ops.sqrt, "Reciprocal": ops.reciprocal,
    "Sin": ops.sin, "Cos": ops.cos, "Tan": ops.tan, "Asin": ops.arcsin, "Acos": ops.arccos, "Atan": ops.arctan,
    "Sinh": ops.sinh, "Cosh": ops.cosh, "Asinh": ops.arcsinh, "Acosh": ops.arccosh, "Atanh": ops.arctanh,
    "Floor": ops.floor, "Ceil": ops.ceil, "Round": ops.round, "Sign": ops.sign, "Not": ops.logical_not, "Erf": ops.erf,
    "IsNaN": ops.isnan, "BitwiseNot": ops.bitwise_not,
    "Mish": lambda x: ops.multiply(x, ops.tanh(ops.softplus(x))),
}  # fmt: skip


@operator(*_SIMPLE)
def _simple(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    return context.value(
        _SIMPLE[node.kind](value.tensor), value.axes, at_least_zero=node.kind in ("Abs", "Exp", "Sqrt")
    )


@operator("IsInf")
def _is_infinite(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    found = ops.isinf(value.tensor)
    for name, sign in (("detect_positive", ops.greater), ("detect_negative", ops.less)):
        if not node.attributes.get(name, 1):
            found = ops.logical_and(found, ops.logical_not(sign(value.tensor, 0)))
    return context.value(found, value.axes)


@operator("Identity", "Dropout", "Cast", "CastLike")
def _passed(context: Context, node: Node, inputs: Inputs) -> Any:
    from onnx import helper

    if node.kind == "CastLike" and is_constant(inputs[0]):
        return inputs[0].astype(moving(node, inputs[1]).dtype)
    value = moving(node, inputs[0])
    if node.kind in ("Identity", "Dropout"):
        training = optional(inputs, 2)
        if is_constant(training) and bool(training.ravel()[0]):
            raise unsupported(node, "drops entries outside training")
        if node.kind == "Dropout" and len(node.outputs) > 1 and node.outputs[1]:
            return [value, context.value(ops.ones_like(value.tensor, dtype="bool"), value.axes)]
        return value
    if node.kind == "Cast":
        name = np.dtype(helper.tensor_dtype_to_np_dtype(node.attributes["to"])).name
    else:
        name = inputs[1].dtype if isinstance(inputs[1], Moving) else inputs[1].dtype.name
    if name == value.dtype:
        return value
    if name in ("object", "str") or name.startswith(("float8", "float4", "int4", "uint4", "int2", "uint2", "complex")):
        raise unsupported(node, f"casts to {name}")
    return context.value(ops.cast(value.tensor, name), value.axes, at_least_zero=value.at_least_zero)


_ACTIVATIONS = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Softplus": "softplus", "Softsign": "softsign",
    "HardSwish": "hard_swish", "Swish": "silu",
}  # fmt: skip


@operator(*_ACTIVATIONS)
def _activation(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    if node.kind == "Swish" and node.attributes.get("alpha", 1.0) != 1.0:
        alpha = node.attributes["alpha"]
        return context.value(ops.multiply(value.tensor, ops.sigmoid(ops.multiply(value.tensor, alpha))), value.axes)
    if "float" not in value.dtype and node.kind == "Relu":
        return context.value(ops.maximum(value.tensor, 0), value.axes, at_least_zero=True)
    layer = context.layer(keras.layers.Activation, node, activation=_ACTIVATIONS[node.kind], dtype=value.dtype)
    return context.value(layer(value.tensor), value.axes, at_least_zero=node.kind in ("Relu", "Sigmoid", "Softplus"))


@operator("Gelu", "com.microsoft::Gelu", "com.microsoft::QuickGelu")
def _gelu(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    if node.kind.endswith("QuickGelu"):
        alpha = node.attributes.get("alpha", 1.702)
        return context.value(ops.multiply(value.tensor, ops.sigmoid(ops.multiply(value.tensor, alpha))), value.axes)
    if node.attributes.get("approximate", "none") == "tanh":
        return context.value(ops.gelu(value.tensor, approximate=True), value.axes)
    layer = context.layer(keras.layers.Activation, node, activation="gelu", dtype=value.dtype)
    return context.value(layer(value.tensor), value.axes)


@operator("LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "Shrink")
def _shaped(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    x, given = value.tensor, node.attributes
    zero = False
    if node.kind == "LeakyRelu":
        found = context.layer(keras.layers.LeakyReLU, node, negative_slope=given.get("alpha", 0.01), dtype=value.dtype)(
            x
        )
    elif node.kind == "Elu":
        found = context.layer(keras.layers.ELU, node, alpha=given.get("alpha", 1.0), dtype=value.dtype)(x)
    elif node.kind == "Selu":
        alpha, gamma = given.get("alpha", 1.67326319217681884765625), given.get("gamma", 1.05070102214813232421875)
        found = gamma * (ops.maximum(x, 0.0) + alpha * (ops.exp(ops.minimum(x, 0.0)) - 1.0))
    elif node.kind == "Celu":
        alpha = given.get("alpha", 1.0)
        found = ops.maximum(x, 0.0) + alpha * (ops.exp(ops.minimum(x, 0.0) / alpha) - 1.0)
    elif node.kind == "ThresholdedRelu":
        found, zero = ops.where(x > given.get("alpha", 1.0), x, ops.zeros_like(x)), True
    elif node.kind == "HardSigmoid":
        alpha, beta, zero = given.get("alpha", 0.2), given.get("beta", 0.5), True
        if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
            found = context.layer(keras.layers.Activation, node, activation="hard_sigmoid", dtype=value.dtype)(x)
        else:
            found = ops.clip(x * alpha + beta, 0.0, 1.0)
    else:
        bias, limit = given.get("bias", 0.0), given.get("lambd", 0.5)
        dtype = value.dtype
        below, above = ops.cast(x < -limit, dtype), ops.cast(x > limit, dtype)
        found = ops.cast(below * (x + bias) + above * (x - bias), dtype)
    return context.value(found, value.axes, at_least_zero=zero)


@operator("PRelu")
def _prelu(context: Context, node: Node, inputs: Inputs) -> Any:
    value, slope = moving(node, inputs[0]), inputs[1]
    if is_constant(slope) and slope.dtype == np.float32:
        flat = constant_in(slope, value.rank, value.axes)
        layer = context.layer(ConstantOperand, node, kind="prelu", shape=flat.shape)
        return context.value(context.filled(layer, value.tensor, value=flat), value.axes)
    (x, slope), axes = aligned(context, inputs)
    return context.value(ops.maximum(x, 0) + slope * ops.minimum(x, 0), axes)


@operator("Clip")
def _clip(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    if any(isinstance(optional(inputs, place), Moving) for place in (1, 2)):
        low, high = (context.plain(v) if v is not None else None for v in (optional(inputs, 1), optional(inputs, 2)))
        x = value.tensor
        x = x if low is None else ops.maximum(x, low)
        return context.value(x if high is None else ops.minimum(x, high), value.axes)
    low, high = (argument(node, inputs, place, name) for place, name in ((1, "min"), (2, "max")))
    low, high = (None if n is None or (is_constant(n) and n.size == 0) else np.ravel(n)[0].item() for n in (low, high))
    if low == 0 and high in (None, 6) and "float" in value.dtype:
        kind = "relu" if high is None else "relu6"
        layer = context.layer(keras.layers.Activation, node, activation=kind, dtype=value.dtype)
        return context.value(layer(value.tensor), value.axes, at_least_zero=True)
    x = value.tensor
    if low is not None and high is not None and low <= high:
        return context.value(ops.clip(x, low, high), value.axes, at_least_zero=low >= 0)
    x = x if low is None else ops.maximum(x, low)
    return context.value(x if high is None else ops.minimum(x, high), value.axes, at_least_zero=bool(low and low >= 0))


@operator("QuantizeLinear")
def _quantize(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    scale, zero, axes, dtype = _steps(context, node, inputs, value)
    steps = ops.round(ops.divide(value.tensor, scale)) + ops.cast(zero, "float32")
    info = np.iinfo(dtype)
    return context.value(ops.cast(ops.clip(steps, info.min, info.max), dtype), axes)


@operator("DequantizeLinear")
def _dequantize(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    scale, zero, axes, _ = _steps(context, node, inputs, value)
    steps = ops.cast(value.tensor, "float32") - ops.cast(zero, "float32")
    return context.value(ops.multiply(steps, scale), axes)


def _steps(context: Context, node: Node, inputs: Inputs, value: Moving) -> tuple[Any, Any, tuple[int, ...], str]:
    scale, zero = context.plain(inputs[1]), context.plain(optional(inputs, 2))
    dtype = "uint8" if zero is None else keras.backend.standardize_dtype(zero.dtype)
    if dtype not in ("uint8", "int8", "uint16", "int16", "int32"):
        raise unsupported(node, f"has the type {dtype}")
    zero = np.zeros(np.shape(scale), dtype) if zero is None else zero
    block = node.attributes.get("block_size", 0)
    if block:
        place = value.place(node.attributes.get("axis", 1))
        length = number(node, value.sizes[value.axes[place]])
        parts = [slice(None)] * value.rank
        parts[place] = slice(0, length)
        order = value.axes
        scale, zero = (
            ops.repeat(ops.transpose(given, order), block, axis=place)[tuple(parts)] for given in (scale, zero)
        )
    elif len(scale.shape) == 1 and scale.shape[0] != 1:
        place = value.place(node.attributes.get("axis", 1))
        shape = [1] * value.rank
        shape[place] = int(scale.shape[0])
        scale, zero = ops.reshape(scale, shape), ops.reshape(zero, shape)
    elif len(scale.shape):
        scale, zero = ops.reshape(scale, ()), ops.reshape(zero, ())
    return scale, zero, value.axes, dtype


@operator("DynamicQuantizeLinear")
def _dynamic_quantize(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    x = value.tensor
    low, high = ops.minimum(ops.min(x), 0.0), ops.maximum(ops.max(x), 0.0)
    scale = ops.divide(high - low, 255.0)
    zero = ops.clip(ops.round(ops.divide(0.0 - low, scale)), 0, 255)
    steps = ops.clip(ops.round(ops.divide(x, scale)) + zero, 0, 255)
    return [
        context.value(ops.cast(steps, "uint8"), value.axes),
        context.value(scale),
        context.value(ops.cast(zero, "uint8")),
    ]
