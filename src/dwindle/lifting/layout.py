"""How constants are laid out in a LiteRT file and in Keras, both ways."""

from __future__ import annotations

import numpy as np


def to_keras(value: np.ndarray, layout: str) -> np.ndarray:
    """Return a file's constant with Keras' axes.

    Args:
        value: As in the file.
        layout: ``plain`` (the same), ``dense`` ``(out, in)``, ``conv2d`` ``(out, h, w, in)``, ``depthwise``
            ``(1, h, w, in * multiplier)``, ``depthwise_as_conv2d``, that for a grouped convolution, or
            ``transpose_conv`` ``(out, h, w, in)`` of a transposed one.
    """
    if layout == "plain":
        return value
    if layout == "dense":
        return value.T
    if layout == "conv2d":
        return value.transpose(1, 2, 3, 0)
    if layout == "transpose_conv":
        return value.transpose(1, 2, 0, 3)
    if layout in ("depthwise", "depthwise_as_conv2d"):
        kernel: np.ndarray = value[0]
        return kernel[..., None, :] if layout == "depthwise_as_conv2d" else kernel
    raise ValueError(layout)


def to_file(value: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a Keras weight with the file's axes and shape; the inverse of `to_keras`."""
    if layout == "dense":
        value = value.T
    elif layout == "conv2d":
        value = value.transpose(3, 0, 1, 2)
    elif layout == "transpose_conv":
        value = value.transpose(2, 0, 1, 3)
    return np.ascontiguousarray(value).reshape(shape)


def channel_axis(layout: str, value: np.ndarray) -> int:
    """Return the axis of a file's constant along which its output channels lie."""
    return value.ndim - 1 if layout.startswith("depthwise") else 0
