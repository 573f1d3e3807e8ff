"""The table itself, and what entries share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import Operation, Tensor
from dwindle.lifting.tables import registrar


class Context(Protocol):
    """What an entry may ask of the lifting in progress.

    Attributes:
        shift: 1 where the Keras tensors have a sample axis in front of the file's axes, 0 where they have it in place
            of the file's axis 0.
    """

    shift: int

    def layer(self, factory: Callable[..., Any], operation: Operation, **options: Any) -> Any:
        """Make a layer named after the operator's output."""
        ...

    def weights(self, layer: Any, **tensors: tuple[Tensor | None, str]) -> None:
        """Note which constants of the file fill which variables of a layer, and how they are laid out."""
        ...

    def integer_scales(self, operation: Operation) -> tuple[float, float, float] | None:
        """Return the scales of two operands and of the result where an 8-bit kernel computes on integers; else None."""
        ...

    def kept_scale(self, operation: Operation) -> float | None:
        """Return the scale that an 8-bit operator's input and output share; else None."""
        ...


Entry = Callable[[Context, Operation, list[Any]], Any]
OPERATORS: dict[str, Entry] = {}
operator = registrar(OPERATORS)


def unsupported(operation: Operation, what: str) -> UnsupportedModelError:
    """Return the error that says which use of an operator has no entry."""
    return UnsupportedModelError(f"{operation.name} `{operation.outputs[0].name}` {what}, which has no entry")


ACTIVATIONS: dict[int, Any] = {
    schema.ActivationFunctionType.NONE: None,
    schema.ActivationFunctionType.RELU: "relu",
    schema.ActivationFunctionType.RELU6: "relu6",
    schema.ActivationFunctionType.TANH: "tanh",
}


def fused_activation(operation: Operation) -> str | None:
    """Return the Keras name of the activation that the operator ends in."""
    code = operation.options.get("fusedActivationFunction", 0)
    if code not in ACTIVATIONS:
        raise unsupported(operation, f"ends in activation number {code}")
    name: str | None = ACTIVATIONS[code]
    return name


def finish(context: Context, operation: Operation, value: Any) -> Any:
    """Apply the fused activation of an operator whose layer has none."""
    activation = fused_activation(operation)
    if activation is None:
        return value
    return context.layer(keras.layers.Activation, operation, activation=activation)(value)


def padding(operation: Operation) -> str:
    """Return Keras' name of an operator's padding."""
    return "same" if operation.options["padding"] == schema.Padding.SAME else "valid"


def constant(operation: Operation, position: int) -> np.ndarray:
    """Return an input that must be a constant, such as a shape or axes."""
    tensor = operation.inputs[position] if position < len(operation.inputs) else None
    if tensor is None or tensor.value is None:
        raise unsupported(operation, f"computes its operand {position}")
    return tensor.value


def weight(operation: Operation, position: int) -> Tensor:
    """Return an input that must be a constant that is trained."""
    tensor = operation.inputs[position]
    if tensor is None or tensor.value is None:
        raise unsupported(operation, "computes its weights")
    return tensor


def optional(operation: Operation, position: int) -> Tensor | None:
    """Return an input that may be left out, such as a bias."""
    tensor = operation.inputs[position] if position < len(operation.inputs) else None
    if tensor is not None and tensor.value is None:
        raise unsupported(operation, "computes its bias")
    return tensor


def rank_of(operation: Operation, position: int = 0) -> int:
    """Return the number of axes that an input has in the file."""
    tensor = operation.inputs[position]
    return 0 if tensor is None else len(tensor.shape)


def keras_axis(context: Context, operation: Operation, axis: int, rank: int) -> int:
    """Return the Keras axis of a file's axis.

    Raises:
        UnsupportedModelError: If it is the sample axis.
    """
    found = int(axis) % rank + context.shift
    if found == 0:
        raise unsupported(operation, "works along the batch axis")
    return found


def spatial(context: Context, operation: Operation) -> None:
    """Refuse tensors whose file's axes stand behind a sample axis: Keras' spatial layers have one batch axis."""
    if context.shift:
        raise unsupported(operation, "works on more than one sample at once")
