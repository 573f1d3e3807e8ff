"""Lifting: a LiteRT file becomes a trainable Keras model, operator by operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.lifting.lifted import LiftedModel, lift

__all__ = ["LiftedModel", "lift"]


def __getattr__(name: str) -> Any:
    # Reading a file (`dwindle.lifting.flatbuffer`) must not import Keras, which takes seconds.
    if name in __all__:
        from dwindle.lifting import lifted

        return getattr(lifted, name)
    raise AttributeError(f"module 'dwindle.lifting' has no attribute {name!r}")
