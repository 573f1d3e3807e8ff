"""ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read(path: Path, inputs: Any, layout: str) -> Any:
    """Lift the file, and compare it with ONNX Runtime where that is installed."""
    from dwindle.lifting.onnx.reading import lift_onnx

    return lift_onnx(path, inputs=inputs, layout=layout, name=path.stem)
