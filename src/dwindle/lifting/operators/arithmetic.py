"""Operators that compute value by value: arithmetic, activations, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.lifting.constants import ConstantOperand, FixedOperand, Sum
from dwindle.lifting.flatbuffer import Operation
from dwindle.lifting.operators.registry import Context, finish, operator, rank_of, unsupported, weight

_MERGES: dict[str, type] = {
    "ADD": keras.layers.Add,
    "SUB": keras.layers.Subtract,
    "MUL": keras.layers.Multiply,
    "MAXIMUM": keras.layers.Maximum,
    "MINIMUM": keras.layers.Minimum,
}
_BINARY: dict[str, Any] = {
    "ADD": keras.ops.add, "SUB": keras.ops.subtract, "MUL": keras.ops.multiply, "DIV": keras.ops.divide,
    "POW": keras.ops.power, "MAXIMUM": keras.ops.maximum, "MINIMUM": keras.ops.minimum,
    "SQUARED_DIFFERENCE": lambda a, b: keras.ops.square(keras.ops.subtract(a, b)),
}  # fmt: skip


@operator(*_BINARY)
def _binary(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    fixed = [position for position in (0, 1) if inputs[position] is None]
    kind = operation.name.lower()
    if fixed:
        tensor = weight(operation, fixed[0])
        _check_broadcast(context, operation, len(tensor.shape), rank_of(operation, 1 - fixed[0]))
        other = operation.inputs[1 - fixed[0]]
        if tensor.dtype != np.float32 or other is None or other.dtype != np.float32:
            layer = context.layer(
                FixedOperand, operation, kind=kind, value=np.asarray(tensor.value).tolist(),
                dtype_name=np.dtype(tensor.dtype).name, constant_first=fixed[0] == 0,
            )  # fmt: skip
            return layer(inputs[1 - fixed[0]])
        scales = context.integer_scales(operation)
        layer = context.layer(
            ConstantOperand, operation, kind=kind, shape=tensor.shape, constant_first=fixed[0] == 0,
            scales=None if scales is None else (scales[1 - fixed[0]], scales[2]),
        )  # fmt: skip
        context.weights(layer, value=(tensor, "plain"))
        return finish(context, operation, layer(inputs[1 - fixed[0]]))
    first, second = _aligned(context, operation, inputs[:2])
    if (scales := context.integer_scales(operation)) is not None:
        layer = context.layer(Sum, operation, scales=scales, subtract=operation.name == "SUB")
        return finish(context, operation, layer([first, second]))
    if operation.name in _MERGES and len(first.shape) == len(second.shape):
        layer = context.layer(_MERGES[operation.name], operation)
        return finish(context, operation, layer([first, second]))
    return finish(context, operation, _BINARY[operation.name](first, second))


def _check_broadcast(context: Context, operation: Operation, fixed: int, moving: int) -> None:
    if fixed > moving or (fixed == moving and fixed and not context.shift and _leading(operation) != 1):
        raise unsupported(operation, "stretches the batch axis over a constant")


def _leading(operation: Operation) -> int:
    return next((t.shape[0] for t in operation.inputs if t is not None and t.value is not None and t.shape), 1)


def _aligned(context: Context, operation: Operation, values: Sequence[Any]) -> list[Any]:
    """Return tensors of equal rank: axes that broadcasting adds in front go behind the sample axis."""
    ranks = [len(value.shape) for value in values]
    if len(set(ranks)) == 1:
        return list(values)
    if not context.shift:
        raise unsupported(operation, "combines tensors of different ranks")
    highest = max(ranks)
    return [
        value if rank == highest else keras.ops.reshape(value, (-1, *[1] * (highest - rank), *value.shape[1:]))
        for value, rank in zip(values, ranks, strict=True)
    ]


@operator("ADD_N")
def _add_n(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    if any(value is None for value in inputs):
        raise unsupported(operation, "adds a constant")
    return context.layer(keras.layers.Add, operation)(inputs)


@operator("SOFTMAX")
def _softmax(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    value, beta = inputs[0], operation.options.get("beta", 1.0)
    if beta != 1.0:
        value = keras.ops.multiply(value, beta)
    return context.layer(keras.layers.Activation, operation, activation="softmax")(value)


_UNARY: dict[str, str] = {
    "RELU": "relu", "RELU6": "relu6", "LOGISTIC": "sigmoid", "TANH": "tanh", "ELU": "elu",
    "LOG_SOFTMAX": "log_softmax", "HARD_SWISH": "hard_swish",
}  # fmt: skip


@operator(*_UNARY)
def _activation(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    return context.layer(keras.layers.Activation, operation, activation=_UNARY[operation.name])(inputs[0])


@operator("GELU")
def _gelu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    return keras.ops.gelu(inputs[0], approximate=bool(operation.options.get("approximate")))


@operator("RELU_N1_TO_1", "RELU_0_TO_1")
def _bounded_relu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    return keras.ops.clip(inputs[0], -1.0 if operation.name == "RELU_N1_TO_1" else 0.0, 1.0)


@operator("LEAKY_RELU")
def _leaky_relu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    slope = float(operation.options["alpha"])
    return context.layer(keras.layers.LeakyReLU, operation, negative_slope=slope)(inputs[0])


@operator("PRELU")
def _prelu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    slope = weight(operation, 1)
    _check_broadcast(context, operation, len(slope.shape), rank_of(operation))
    layer = context.layer(ConstantOperand, operation, kind="prelu", shape=slope.shape)
    context.weights(layer, value=(slope, "plain"))
    return layer(inputs[0])


def _without_gradient_at_zero(function: Callable[[Any], Any], at_zero: float) -> Callable[[Any], Any]:
    """Return a function whose gradient is 0 instead of infinite at 0, where rounding puts many values.

    Args:
        function: The function.
        at_zero: Its value at 0.
    """

    def guarded(x: Any) -> Any:
        zero = keras.ops.equal(x, 0)
        elsewhere = function(keras.ops.where(zero, keras.ops.ones_like(x), x))
        return keras.ops.where(zero, keras.ops.full_like(x, at_zero), elsewhere)

    return guarded


_root = _without_gradient_at_zero(keras.ops.sqrt, 0.0)

_ELEMENTWISE = {
    "ABS": keras.ops.abs, "EXP": keras.ops.exp, "LOG": _without_gradient_at_zero(keras.ops.log, -math.inf),
    "SQRT": _root,
    "RSQRT": _without_gradient_at_zero(keras.ops.rsqrt, math.inf),
    "NEG": keras.ops.negative, "SQUARE": keras.ops.square, "SIN": keras.ops.sin, "COS": keras.ops.cos,
    "FLOOR": keras.ops.floor, "CEIL": keras.ops.ceil, "SIGN": keras.ops.sign, "ROUND": keras.ops.round,
    "LOGICAL_NOT": keras.ops.logical_not,
}  # fmt: skip


@operator(*_ELEMENTWISE)
def _elementwise(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    return _ELEMENTWISE[operation.name](inputs[0])


_COMPARISONS = {
    "EQUAL": keras.ops.equal, "NOT_EQUAL": keras.ops.not_equal, "GREATER": keras.ops.greater,
    "GREATER_EQUAL": keras.ops.greater_equal, "LESS": keras.ops.less, "LESS_EQUAL": keras.ops.less_equal,
    "LOGICAL_AND": keras.ops.logical_and, "LOGICAL_OR": keras.ops.logical_or, "FLOOR_DIV": keras.ops.floor_divide,
    "FLOOR_MOD": keras.ops.mod,
}  # fmt: skip


@operator(*_COMPARISONS)
def _comparison(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    values = _with_constants(context, operation, inputs[:2], range(2))
    return _COMPARISONS[operation.name](*_aligned_or_fixed(context, operation, values))


@operator("SELECT", "SELECT_V2")
def _select(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    values = _with_constants(context, operation, inputs, range(3))
    return keras.ops.where(*_aligned_or_fixed(context, operation, values))


def _with_constants(context: Context, operation: Operation, inputs: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """Return the operands, constants as arrays (they are not trained)."""
    highest = max(rank_of(operation, p) for p in places if inputs[p] is not None)
    found = []
    for place in places:
        if inputs[place] is not None:
            found.append(inputs[place])
            continue
        value = np.asarray(weight(operation, place).value)
        _check_rank(context, operation, value, highest)
        found.append(value)
    return found


def _check_rank(context: Context, operation: Operation, value: np.ndarray, highest: int) -> None:
    if value.ndim > highest or (value.ndim == highest and value.ndim and not context.shift and value.shape[0] != 1):
        raise unsupported(operation, "stretches the batch axis over a constant")


def _aligned_or_fixed(context: Context, operation: Operation, values: Sequence[Any]) -> list[Any]:
    moving = [value for value in values if not isinstance(value, np.ndarray)]
    aligned = iter(_aligned(context, operation, moving))
    return [value if isinstance(value, np.ndarray) else next(aligned) for value in values]


@operator("CAST")
def _cast(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    return keras.ops.cast(inputs[0], np.dtype(operation.outputs[0].dtype).name)


@operator("L2_NORMALIZATION")
def _l2_normalization(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    size = _root(keras.ops.sum(keras.ops.square(inputs[0]), axis=-1, keepdims=True))
    return finish(context, operation, keras.ops.divide(inputs[0], keras.ops.maximum(size, 1e-6)))
