"""The table from LiteRT operators to ONNX nodes; a new operator is one entry in one of these modules."""

from __future__ import annotations

from dwindle.exporting.onnx.operators import (  # noqa: F401
    activations,
    arithmetic,
    reductions,
    shapes,
    slicing,
    weighted,
    windows,
)
from dwindle.exporting.onnx.operators.registry import OPERATORS

__all__ = ["OPERATORS"]
