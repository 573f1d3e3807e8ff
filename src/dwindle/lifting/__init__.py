"""Lifting: a LiteRT file becomes a trainable Keras model, operator by operator."""

from __future__ import annotations

from dwindle.lifting.lifted import LiftedModel, lift

__all__ = ["LiftedModel", "lift"]
