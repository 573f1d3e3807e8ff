"""Samples as people see them: small PNG images where an input is an image, a few numbers otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dwindle.png import data_uri

LARGEST_SIDE = 64
SMALLEST_SIDE = 6
ALL_BYTES = 280_000
NUMBERS = 8


class Pictures:
    """Pictures of some samples of several inputs, in at most `ALL_BYTES` bytes of text.

    The first input that has the shape of an image, ``(height, width)``, ``(height, width, channels)`` or ``(channels,
    height, width)`` with 1, 3 or 4 channels, is shown: values in [0, 1], [-1, 1] or [0, 255] as they are meant, others
    stretched over all the samples' range. Images are averaged down to `LARGEST_SIDE` pixels a side.

    Args:
        x: One array per input, shape ``(n, ...)``.
        chosen: The samples that will be asked for.
    """

    def __init__(self, x: Sequence[np.ndarray], chosen: np.ndarray) -> None:
        self._x = x
        self._left = ALL_BYTES
        self._image = next((array for array in x if _is_image(array.shape[1:])), None)
        if self._image is not None and len(chosen):
            some = self._image[chosen]
            self._low, self._high = _ends(float(some.min()), float(some.max()))

    def of(self, number: int) -> dict[str, str]:
        """Return ``image``, a ``data:`` address, with ``shape``; else ``values``."""
        if self._image is not None:
            sample = _channels_last(np.asarray(self._image[number], np.float64))
            scaled = np.clip((sample - self._low) / (self._high - self._low), 0.0, 1.0)
            address = data_uri(np.rint(smaller(scaled) * 255).astype(np.uint8))
            if len(address) <= self._left:
                self._left -= len(address)
                return {"image": address, "shape": "×".join(map(str, self._image.shape[1:]))}
        told = []
        for array in self._x:
            flat = np.ravel(array[number])
            told.append(" ".join(f"{value:.4g}" for value in flat[:NUMBERS]) + (" …" if flat.size > NUMBERS else ""))
        return {"values": "; ".join(told)}


def _is_image(shape: tuple[int, ...]) -> bool:
    sizes = shape
    if len(shape) == 3:
        sizes = shape[:2] if shape[2] in (1, 3, 4) else shape[1:] if shape[0] in (1, 3, 4) else ()
    return len(sizes) == 2 and min(sizes) >= SMALLEST_SIDE and max(sizes) <= 20 * min(sizes)


def _channels_last(sample: np.ndarray) -> np.ndarray:
    if sample.ndim == 2:
        return sample[..., None]
    return sample if sample.shape[2] in (1, 3, 4) else np.moveaxis(sample, 0, -1)


def _ends(low: float, high: float) -> tuple[float, float]:
    for meant in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if meant[0] <= low and high <= meant[1]:
            return meant
    return low, high if high > low else low + 1.0


def smaller(image: np.ndarray) -> np.ndarray:
    """Return an image of floats ``(height, width, channels)`` averaged over blocks, no side above `LARGEST_SIDE`."""
    for axis in (0, 1):
        size = image.shape[axis]
        if size > LARGEST_SIDE:
            starts = np.linspace(0, size, LARGEST_SIDE, endpoint=False).astype(np.int64)
            counts = np.diff([*starts, size]).reshape([-1 if a == axis else 1 for a in range(3)])
            image = np.add.reduceat(image, starts, axis=axis) / counts
    return image
