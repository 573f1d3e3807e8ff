"""The table itself, and what entries share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.exporting.onnx.values import Operand, Value, plain_axes
from dwindle.lifting.flatbuffer import Operation, Tensor
from dwindle.lifting.tables import registrar

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer

Inputs = Sequence[Any]
# The value that an operator makes, or a list of them; an operand where nothing is computed.
Entry = Callable[["Writer", Operation, Inputs], "Operand | list[Value]"]
OPERATORS: dict[str, Entry] = {}
operator = registrar(OPERATORS)

_FUSED = schema.ActivationFunctionType


def unsupported(operation: Operation, what: str) -> UnsupportedModelError:
    """Return the error that says which use of an operator can't be written."""
    return UnsupportedModelError(
        f"{operation.name} `{operation.outputs[0].name}` {what}, which is not written as ONNX; export a .tflite, or "
        "replace the layer"
    )


def finish(writer: Writer, operation: Operation, name: str) -> str:
    """Apply the activation that an operator ends in, and return the name of its result."""
    code = operation.options.get("fusedActivationFunction", _FUSED.NONE)
    if code == _FUSED.NONE:
        return name
    if code == _FUSED.RELU:
        return writer.node("Relu", [name])
    if code == _FUSED.TANH:
        return writer.node("Tanh", [name])
    if code in (_FUSED.RELU6, _FUSED.RELU_N1_TO_1):
        return clipped(writer, name, *((0.0, 6.0) if code == _FUSED.RELU6 else (-1.0, 1.0)))
    raise unsupported(operation, f"ends in activation number {code}")


def clipped(writer: Writer, name: str, low: float, high: float) -> str:
    """Return the name of a value between two bounds."""
    ends = [writer.initializer(np.float32(end), hint) for end, hint in ((low, "low"), (high, "high"))]
    return writer.node("Clip", [name, *ends])


def given(operation: Operation, position: int) -> np.ndarray:
    """Return an input that must be a constant, such as a shape or axes."""
    tensor = operation.inputs[position] if position < len(operation.inputs) else None
    if tensor is None or tensor.value is None:
        raise unsupported(operation, f"computes its operand {position}")
    return tensor.value


def optional(inputs: Inputs, position: int) -> Any:
    """Return an input that may be left out."""
    return inputs[position] if position < len(inputs) else None


def shape_of(operation: Operation, position: int = 0) -> tuple[int, ...]:
    """Return the shape of an input in the file, of one sample where the first axis is open."""
    tensor = operation.inputs[position]
    return () if tensor is None else tensor.shape


def is_integer(operation: Operation, position: int = 0) -> bool:
    """Return whether an input holds whole numbers, rather than floats or integers with a scale."""
    tensor = operation.inputs[position]
    return tensor is not None and np.dtype(tensor.dtype).kind in "iu" and not tensor.is_quantized


def common_axes(inputs: Inputs, rank: int) -> tuple[int, ...]:
    """Return the order of axes in which operands are combined: that of the largest one that has all of them."""
    full = [value for value in inputs if isinstance(value, Value) and value.rank == rank and value.rows is None]
    moved = [value for value in full if value.axes != plain_axes(rank)]
    return moved[0].axes if moved else plain_axes(rank)


def aligned(writer: Writer, inputs: Inputs, rank: int, axes: tuple[int, ...]) -> list[str]:
    """Return the names of operands that broadcast against each other, their axes in one order."""
    full = any(isinstance(operand, Value) and operand.rank == rank for operand in inputs)
    return [_aligned(writer, operand, rank, axes, full=full) for operand in inputs]


def _aligned(writer: Writer, operand: Operand, rank: int, axes: tuple[int, ...], *, full: bool) -> str:
    if isinstance(operand, Tensor):
        if full and prod(operand.shape) == 1:
            return writer.scalar(operand)
        plain = axes == plain_axes(rank)
        return writer.constant(operand) if plain else writer.constant(operand, axes, rank=rank)
    if operand.rank == rank or axes == plain_axes(rank) or operand.rank == 0:
        return writer.ordered(operand, axes if operand.rank == rank else plain_axes(operand.rank))
    more = rank - operand.rank
    widened = writer.node("Unsqueeze", [writer.plain(operand), writer.numbers(range(more))])
    return writer.ordered(Value(widened, plain_axes(rank)), axes)
