"""Which runtime runs a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dwindle.measuring.litert import LiteRTRunner

if TYPE_CHECKING:
    from dwindle.measuring.onnx_runtime import OnnxRunner

    Runner = LiteRTRunner | OnnxRunner


def is_onnx(source: str | Path | bytes) -> bool:
    """Return whether a source is an ONNX file, by its suffix."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


def runner_of(source: str | Path | bytes, *, threads: int = 1) -> Runner:
    """Return the file in its own runtime: ONNX Runtime for ``.onnx``, LiteRT for everything else.

    Raises:
        DataError: If the file does not exist.
        UnsupportedModelError: If it is damaged, or its runtime can't run it.
        MissingDependencyError: If the runtime is not installed.
    """
    if is_onnx(source):
        from dwindle.measuring.onnx_runtime import OnnxRunner

        return OnnxRunner(source, threads=threads)
    return LiteRTRunner(source, threads=threads)
