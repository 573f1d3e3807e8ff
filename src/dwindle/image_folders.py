"""Folders of images, one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import DataError, MissingDependencyError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_PART_NAMES = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}


def read_images(folder: Path, image_size: tuple[int, int] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read a folder of images into arrays by the names of an ``.npz``.

    Args:
        folder: Holds one folder a class, or ``train``, ``val`` and ``test`` with one folder a class each. Classes are
            numbered in alphabetical order.
        image_size: ``(height, width)`` to resize to; None: all images must have one size.

    Returns:
        uint8 images ``(n, height, width, channels)`` with 1 channel if all are grey, else 3; int64 labels; class names.

    Raises:
        DataError: If there are no images, they differ in size, or one can't be read.
        MissingDependencyError: If Pillow is not installed.
    """
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    parts = {_PART_NAMES[path.name.lower()]: path for path in folders if path.name.lower() in _PART_NAMES}
    parts = parts or {"train": folder}
    names = sorted({path.name for part in parts.values() for path in part.iterdir() if path.is_dir()})
    listed = {
        part: [
            (file, names.index(file.parent.name))
            for name in names
            for file in sorted((root / name).glob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        for part, root in parts.items()
    }
    if not any(listed.values()):
        raise DataError(
            f"data `{folder}` has no images ({', '.join(SUFFIXES)}) in folders named after classes, such as "
            f"`{folder}/cat/1.png`"
        )
    images = {part: [_read(file, image_size) for file, _ in found] for part, found in listed.items()}
    grey = all(image.ndim == 2 for found in images.values() for image in found)
    arrays: dict[str, Any] = {}
    first: tuple[int, ...] | None = None
    for part, found in images.items():
        for image, (file, _) in zip(found, listed[part], strict=True):
            first = first or image.shape[:2]
            if image.shape[:2] != first:
                raise DataError(
                    f"data `{folder}`: `{file.name}` is {image.shape[0]}x{image.shape[1]} and others are "
                    f"{first[0]}x{first[1]}; resize them to one size"
                )
        if found:
            arrays[f"x_{part}"] = np.stack([_channels(image, grey) for image in found])
            arrays[f"y_{part}"] = np.array([label for _, label in listed[part]], dtype=np.int64)
    return arrays, tuple(names)


def _read(file: Path, image_size: tuple[int, int] | None) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError("reading images needs Pillow; install it with: pip install pillow") from None
    try:
        with Image.open(file) as image:
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
            if image_size is not None:
                image = image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"image `{file}` can't be read: {error}") from None


def _channels(image: np.ndarray, grey: bool) -> np.ndarray:
    if grey:
        return image[..., None]
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
