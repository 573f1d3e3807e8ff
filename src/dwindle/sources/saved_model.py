"""TensorFlow SavedModel folders, by way of a float LiteRT file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read(path: Path, trust: bool, inputs: Any = None) -> Any:
    """Convert the folder's ``serving_default`` signature, of inputs of the given shapes, and lift it."""
    del trust  # a SavedModel is a graph; no Python code in it runs
    from dwindle.exporting.convert import saved_model_file
    from dwindle.lifting import lift

    return lift(saved_model_file(path, inputs), name=path.name)
