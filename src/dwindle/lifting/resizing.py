"""Bilinear resizing as LiteRT's 8-bit kernel does it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


@keras.saving.register_keras_serializable("dwindle")
class BilinearResize(keras.layers.Resizing):
    """Resize images bilinearly at half-pixel centres; on integers outside training where the file has 8 bits.

    The kernel interpolates with weights of 11 bits, first along the width: ``t = 2^11 a + w_x (b - a)``; then along
    the height, and rounds halves up: ``(2^11 t + w_y (t' - t) + 2^21) >> 22``.

    Args:
        scale: Step of the grid on which input and output lie; None for float images.
    """

    def __init__(self, *, scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the images, shape ``(n, height, width, channels)``."""
        if self.scale is None or training:
            return super().call(inputs)
        ops = keras.ops
        steps = ops.cast(ops.round(inputs / self.scale), "float64")
        for axis, size in ((2, self.width), (1, self.height)):
            first, second, weights = _neighbours(int(inputs.shape[axis]), size)
            shape = [-1 if a == axis else 1 for a in range(4)]
            a, b = (ops.take(steps, places, axis=axis) for places in (first, second))
            steps = a * 2.0**11 + (b - a) * ops.convert_to_tensor(weights.reshape(shape), "float64")
        return ops.cast(ops.floor(steps / 2.0**22 + 0.5), "float32") * self.scale

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        return {**super().get_config(), "scale": self.scale}


def _neighbours(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each new place, the two old ones that it lies between, and the second's weight in 1/2048."""
    ratio = np.float32(before) / np.float32(after)
    places = np.arange(after, dtype=np.float32) * ratio + (np.float32(0.5) * ratio - np.float32(0.5))
    places = np.clip(places, np.float32(0), np.float32(before - 1))
    first = places.astype(np.int32)
    return first, np.minimum(first + 1, before - 1), np.rint((places - first) * 2.0**11)
