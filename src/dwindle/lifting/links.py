"""Which variable of a lifted model is which constant of its file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """Which constant of the float file fills which variable.

    Attributes:
        layer: Layer name.
        variable: Variable name in the layer, such as ``kernel``.
        tensor: Tensor name in the file.
        layout: How the axes differ; a key of `dwindle.lifting.layout`.
    """

    layer: str
    variable: str
    tensor: str
    layout: str
