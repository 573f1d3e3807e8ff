"""Operators with several operands: arithmetic, comparisons, choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.exporting.onnx.operators.registry import (
    Inputs,
    aligned,
    common_axes,
    finish,
    is_integer,
    operator,
    shape_of,
    unsupported,
)
from dwindle.exporting.onnx.values import Value
from dwindle.lifting.flatbuffer import Operation

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer


def _rank(operation: Operation) -> int:
    return len(operation.outputs[0].shape)


def _combined(writer: Writer, operation: Operation, inputs: Inputs, compute: Callable[[list[str]], str]) -> Value:
    axes = common_axes(inputs, _rank(operation))
    return Value(finish(writer, operation, compute(aligned(writer, inputs, _rank(operation), axes))), axes)


_PLAIN = {
    "ADD": "Add", "SUB": "Sub", "MUL": "Mul", "POW": "Pow", "MAXIMUM": "Max", "MINIMUM": "Min", "ADD_N": "Sum",
    "EQUAL": "Equal", "GREATER": "Greater", "GREATER_EQUAL": "GreaterOrEqual", "LESS": "Less",
    "LESS_EQUAL": "LessOrEqual", "LOGICAL_AND": "And", "LOGICAL_OR": "Or", "SELECT_V2": "Where",
}  # fmt: skip
#: Operators that broadcast.
COMBINING = frozenset({*_PLAIN, "DIV", "NOT_EQUAL", "SQUARED_DIFFERENCE", "FLOOR_DIV", "FLOOR_MOD"})


@operator(*_PLAIN)
def _plain(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    return _combined(writer, operation, inputs, lambda names: writer.node(_PLAIN[operation.name], names))


@operator("DIV")
def _divide(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    # ONNX and LiteRT both cut quotients of integers towards zero.
    return _combined(writer, operation, inputs, lambda names: writer.node("Div", names))


@operator("NOT_EQUAL")
def _not_equal(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    return _combined(writer, operation, inputs, lambda names: writer.node("Not", [writer.node("Equal", names)]))


@operator("SQUARED_DIFFERENCE")
def _squared_difference(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    def compute(names: list[str]) -> str:
        difference = writer.node("Sub", names)
        return writer.node("Mul", [difference, difference])

    return _combined(writer, operation, inputs, compute)


@operator("FLOOR_DIV")
def _floor_divide(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    def compute(names: list[str]) -> str:
        if is_integer(operation):
            rest = writer.node("Mod", names)  # has the divisor's sign
            return writer.node("Div", [writer.node("Sub", [names[0], rest]), names[1]])
        return writer.node("Floor", [writer.node("Div", names)])

    return _combined(writer, operation, inputs, compute)


@operator("FLOOR_MOD")
def _floor_rest(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    def compute(names: list[str]) -> str:
        if is_integer(operation):
            return writer.node("Mod", names)
        rest = writer.node("Mod", names, fmod=1)  # has the dividend's sign
        zero = writer.initializer(np.float32(0), "zero")
        unlike = writer.node("Less", [writer.node("Mul", [rest, names[1]]), zero])
        return writer.node("Where", [unlike, writer.node("Add", [rest, names[1]]), rest])

    return _combined(writer, operation, inputs, compute)


@operator("SELECT")
def _select(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    if shape_of(operation) not in (shape_of(operation, 1), ()):
        raise unsupported(operation, "chooses whole samples by a vector")
    return _combined(writer, operation, inputs, lambda names: writer.node("Where", names))


@operator("PRELU")
def _prelu(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    return _combined(writer, operation, inputs, lambda names: writer.node("PRelu", names))
