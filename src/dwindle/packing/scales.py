"""Vectors of scales that are another vector times one number, as a bias' scales are its kernel's times its input's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dwindle.errors import DataError
from dwindle.packing.engines import Engine

if TYPE_CHECKING:
    from dwindle.packing.frames import Segment

_RESIDUAL_FIELD = 15


def multiplied(values: np.ndarray, factor: int) -> np.ndarray:
    """Return float32 products, rounded to the nearest or even, in integer arithmetic on the numbers' 32 bits.

    Zeros, denormal numbers, infinities and what overflows or underflows give 0: only ordinary products count.

    Args:
        values: Bits of the numbers, uint32.
        factor: Bits of the other factor.
    """
    a, b = values.astype(np.int64), int(factor)
    exponent_a, exponent_b = a >> 23 & 255, b >> 23 & 255
    product = (a & 0x7FFFFF | 0x800000) * (b & 0x7FFFFF | 0x800000)
    shift = 23 + (product >> 47)
    rest = product & ((1 << shift) - 1)
    half = np.int64(1) << (shift - 1)
    kept = product >> shift
    kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    exponent = exponent_a + exponent_b - 127 + (shift - 23) + (kept >> 24)
    mantissa = np.where(kept >> 24 == 1, 0, kept & 0x7FFFFF)
    ordinary = (exponent_a > 0) & (exponent_a < 255) & (0 < exponent_b < 255) & (exponent > 0) & (exponent < 255)
    sign = (a ^ b) & 0x80000000
    return np.where(ordinary, sign | exponent << 23 | mantissa, 0).astype(np.uint32)


def code_scaled(engine: Engine, before: bytes, segment: Segment, piece: bytes | None) -> bytes:
    """Code a vector by how far each number lies from the product, in steps of the last place.

    Args:
        engine: The coder of the differences.
        before: The frame's bytes before the segment.
        segment: Its size, factor and distance.
        piece: Its bytes, for an encoder.

    Returns:
        Its bytes.

    Raises:
        DataError: If the other vector does not lie before it in the frame.
    """
    start = len(before) - segment.distance
    if segment.size % 4 or start < 0 or segment.distance < segment.size:
        raise DataError("a vector refers to one outside its frame")
    expected = multiplied(np.frombuffer(before, "<u4", segment.size // 4, start), segment.factor)
    actual = None if piece is None else np.frombuffer(piece, "<u4").astype(np.int64)
    result = np.empty(len(expected), np.int64)
    for place, value in enumerate(expected.astype(np.int64)):
        difference = 0 if actual is None else int(actual[place] - value + (1 << 31)) % (1 << 32) - (1 << 31)
        folded = engine.number(_RESIDUAL_FIELD, difference * 2 if difference >= 0 else -difference * 2 - 1)
        difference = folded // 2 if folded % 2 == 0 else -(folded + 1) // 2
        result[place] = (int(value) + difference) % (1 << 32)
    return result.astype("<u4").tobytes()
