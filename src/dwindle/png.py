"""PNG images from arrays, with nothing but the standard library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # channels: grey, RGB, RGBA (PNG specification, table 11.1)


def png_bytes(image: np.ndarray) -> bytes:
    """Return an image as a PNG file, 8 bits a channel.

    Args:
        image: uint8, shape ``(height, width)`` or ``(height, width, channels)`` with 1, 3 or 4 channels.

    Raises:
        ValueError: For another type or shape.

    References:
        Portable Network Graphics (PNG) Specification, W3C 2003, sections 5, 9 and 11.
    """
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in _COLOR_TYPES or 0 in pixels.shape:
        raise ValueError(f"`image` is {image.dtype} of shape {image.shape}; it must be uint8 with 1, 3 or 4 channels")
    height, width, channels = pixels.shape
    rows = np.ascontiguousarray(pixels).reshape(height, width * channels)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # every row with filter 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def data_uri(image: np.ndarray) -> str:
    """Return an image as a ``data:`` address of a PNG; see `png_bytes`."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
