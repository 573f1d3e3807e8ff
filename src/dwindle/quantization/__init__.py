"""Quantization: integers for weights and activations, after training and in training.

The names below are imported when they are first used: checking goals, plans and schemes must not import Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.quantization.calibration import calibrate
    from dwindle.quantization.schemes import IO_TYPES, SCHEMES, Scheme, resolve_scheme
    from dwindle.quantization.training import calibration_samples, input_shapes, quantize, simulate, with_lengths_in
    from dwindle.quantization.writing import write_quantized

_NAMES = {
    "IO_TYPES": "dwindle.quantization.schemes",
    "SCHEMES": "dwindle.quantization.schemes",
    "Scheme": "dwindle.quantization.schemes",
    "calibrate": "dwindle.quantization.calibration",
    "calibration_samples": "dwindle.quantization.training",
    "input_shapes": "dwindle.quantization.training",
    "quantize": "dwindle.quantization.training",
    "resolve_scheme": "dwindle.quantization.schemes",
    "simulate": "dwindle.quantization.training",
    "with_lengths_in": "dwindle.quantization.training",
    "write_quantized": "dwindle.quantization.writing",
}

__all__ = [
    "IO_TYPES",
    "SCHEMES",
    "Scheme",
    "calibrate",
    "calibration_samples",
    "input_shapes",
    "quantize",
    "resolve_scheme",
    "simulate",
    "with_lengths_in",
    "write_quantized",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
