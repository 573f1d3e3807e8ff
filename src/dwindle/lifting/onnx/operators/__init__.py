"""The table of ONNX operators; a new one costs one entry."""

from dwindle.lifting.onnx.operators import (  # noqa: F401
    arithmetic,
    contractions,
    convolution,
    gathering,
    normalization,
    recurrent,
    reductions,
    resizing,
    shapes,
)
from dwindle.lifting.onnx.operators.registry import OPERATORS

__all__ = ["OPERATORS"]
