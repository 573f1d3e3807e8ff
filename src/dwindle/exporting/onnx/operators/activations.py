"""Operators with one operand whose entries they treat alike, or along the last axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.exporting.onnx.operators.registry import Inputs, clipped, finish, given, operator
from dwindle.exporting.onnx.values import Value, type_number
from dwindle.lifting.flatbuffer import Operation

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer

_PLAIN = {
    "RELU": "Relu", "LOGISTIC": "Sigmoid", "TANH": "Tanh", "ELU": "Elu", "HARD_SWISH": "HardSwish", "ABS": "Abs",
    "EXP": "Exp", "LOG": "Log", "SQRT": "Sqrt", "NEG": "Neg", "SIN": "Sin", "COS": "Cos", "FLOOR": "Floor",
    "CEIL": "Ceil", "SIGN": "Sign", "ROUND": "Round", "LOGICAL_NOT": "Not",
}  # fmt: skip


def _same_axes(value: Value, name: str) -> Value:
    return Value(name, value.axes, value.rows)


@operator(*_PLAIN)
def _plain(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    return _same_axes(value, writer.node(_PLAIN[operation.name], [value.name]))


_BOUNDS = {"RELU6": (0.0, 6.0), "RELU_0_TO_1": (0.0, 1.0), "RELU_N1_TO_1": (-1.0, 1.0)}


@operator(*_BOUNDS)
def _bounded(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    return _same_axes(value, clipped(writer, value.name, *_BOUNDS[operation.name]))


@operator("LEAKY_RELU")
def _leaky_relu(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    return _same_axes(value, writer.node("LeakyRelu", [value.name], alpha=float(operation.options["alpha"])))


@operator("GELU")
def _gelu(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    kind = "tanh" if operation.options.get("approximate") else "none"
    return _same_axes(value, writer.node("Gelu", [value.name], approximate=kind))


@operator("SQUARE")
def _square(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    del operation
    value = writer.moving(inputs[0])
    return _same_axes(value, writer.node("Mul", [value.name, value.name]))


@operator("RSQRT")
def _reciprocal_root(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    del operation
    value = writer.moving(inputs[0])
    return _same_axes(value, writer.node("Reciprocal", [writer.node("Sqrt", [value.name])]))


@operator("CAST")
def _cast(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    return _same_axes(value, writer.node("Cast", [value.name], to=type_number(operation.outputs[0].dtype)))


@operator("QUANTIZE")
def _quantize(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    del operation
    return writer.moving(inputs[0])  # the writer puts every quantized result on its grid


@operator("DEQUANTIZE", "DENSIFY")
def _dequantize(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    del writer, operation
    return inputs[0]  # a quantized result is read as floats already, and a constant stays with the one that reads it


@operator("SOFTMAX")
def _softmax(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    name, beta = value.name, float(operation.options.get("beta", 1.0))
    if beta != 1.0:
        name = writer.node("Mul", [name, writer.initializer(np.float32(beta), "beta")])
    return _same_axes(value, writer.node("Softmax", [name], axis=value.place(-1)))


@operator("LOG_SOFTMAX")
def _log_softmax(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    del operation
    value = writer.moving(inputs[0])
    return _same_axes(value, writer.node("LogSoftmax", [value.name], axis=value.place(-1)))


@operator("L2_NORMALIZATION")
def _l2_normalization(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    size = writer.node("ReduceL2", [value.name, writer.numbers([value.place(-1)])], keepdims=1)
    size = writer.node("Max", [size, writer.initializer(np.float32(1e-6), "least")])
    return _same_axes(value, finish(writer, operation, writer.node("Div", [value.name, size])))


@operator("CUMSUM")
def _running_sum(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    axis = writer.initializer(np.int64(value.place(int(given(operation, 1).reshape(())))), "axis")
    ways = {name: int(bool(operation.options.get(name))) for name in ("exclusive", "reverse")}
    return _same_axes(value, writer.node("CumSum", [value.name, axis], **ways))
