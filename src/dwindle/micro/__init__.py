"""Microcontrollers: full-integer files that TensorFlow Lite Micro runs, small, proved there, with C++ sources.

The names below are imported when they are first used: the process that runs a file must not import Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.micro.exporting import MicroExport, export_micro

_NAMES = {"MicroExport": "dwindle.micro.exporting", "export_micro": "dwindle.micro.exporting"}

__all__ = ["MicroExport", "export_micro"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
