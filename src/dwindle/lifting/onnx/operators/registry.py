"""The table itself, and what entries share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.values import Moving
from dwindle.lifting.tables import registrar


class Context(Protocol):
    """What an entry may ask of the lifting in progress."""

    def arranged(self, value: Moving, axes: Sequence[int]) -> Any:
        """Return a Keras tensor with its axes in an order of ONNX axes."""
        ...

    def plain(self, value: Any) -> Any:
        """Return a Keras tensor in ONNX's order of axes; a constant as an array."""
        ...

    def reshape(self, value: Moving, target: Sequence[Any]) -> Moving:
        """Return a value with other axes, moved as little as possible."""
        ...

    def layer(self, factory: Callable[..., Any], node: Node, **options: Any) -> Any:
        """Make a layer named after the node."""
        ...

    def filled(self, layer: Any, tensor: Any, **weights: np.ndarray | None) -> Any:
        """Call a layer and set its weights; where the same constants fill the same layer again, it is shared."""
        ...

    def shared(self, node: Node, places: Sequence[int], factory: Callable[..., Any], **options: Any) -> Any:
        """Return a layer for a node, the same one for nodes with the same options and constants."""
        ...

    def value(self, tensor: Any, axes: Sequence[int] | None = None, *, at_least_zero: bool = False) -> Moving:
        """Return a value for a Keras tensor."""
        ...

    def added_behind(self, node: Node, accept: Callable[[np.ndarray], np.ndarray | None]) -> np.ndarray | None:
        """Return the constant that only the next node adds to this one's result, and take that node in."""
        ...

    def note(self, text: str) -> None:
        """Write down what the user should know."""
        ...


Inputs = Sequence[Any]
Entry = Callable[[Context, Node, Inputs], Any]
OPERATORS: dict[str, Entry] = {}
operator = registrar(OPERATORS)


def unsupported(node: Node, what: str) -> UnsupportedModelError:
    """Return the error that says which use of an operator has no entry."""
    return UnsupportedModelError(f"{node.kind} `{node.name}` {what}, which has no entry")


def is_constant(value: Any) -> bool:
    """Return whether an input is an array that is there already."""
    return isinstance(value, np.ndarray)


def argument(node: Node, inputs: Inputs, place: int, name: str, default: Any = None) -> Any:
    """Return a setting that older operator sets have as an attribute and newer ones as a constant input.

    Raises:
        UnsupportedModelError: If the model computes it.
    """
    if place < len(inputs) and inputs[place] is not None:
        if not is_constant(inputs[place]):
            raise unsupported(node, f"computes its `{name}`")
        return inputs[place]
    return node.attributes.get(name, default)


def optional(inputs: Inputs, place: int) -> Any:
    """Return an input that may be left out."""
    return inputs[place] if place < len(inputs) else None


def moving(node: Node, value: Any) -> Moving:
    """Return an input that must depend on the model's inputs."""
    if not isinstance(value, Moving):
        raise unsupported(node, "works on a constant here")
    return value


def number(node: Node, n: Any) -> int:
    """Return a length that must be known."""
    if isinstance(n, int | np.integer):
        return int(n)
    raise UnsupportedModelError(
        f"{node.kind} `{node.name}` needs to know the length `{n}`; fix it with inputs={{name: shape}}"
    )
