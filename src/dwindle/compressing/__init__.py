"""Compress: the user says what the file must reach; plans are tried and measured until it does.

The names below are imported when they are first used: checking goals, plans and schemes must not import Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.compressing.concluding import Result
    from dwindle.compressing.goals import Goals
    from dwindle.compressing.plans import Plan
    from dwindle.compressing.run import compress

_NAMES = {
    "Goals": "dwindle.compressing.goals",
    "Plan": "dwindle.compressing.plans",
    "Result": "dwindle.compressing.concluding",
    "compress": "dwindle.compressing.run",
}

__all__ = ["Goals", "Plan", "Result", "compress"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
