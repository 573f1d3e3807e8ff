"""Folders of images, one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import DataError, MissingDependencyError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_PART_NAMES = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
_DEEP_MODES = ("I", "F")  # more than 8 bits a pixel; "I;16" and its like begin the same way


def read_images(
    folder: Path, image_size: tuple[int, int] | None = None, color: str | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read a folder of images into arrays by the names of an ``.npz``.

    Files of other kinds, and folders whose names begin with a dot or ``__``, are left alone. Transparency is dropped,
    of animations the first frame is taken.

    Args:
        folder: Holds one folder a class (training images), or ``train``, ``val`` and ``test`` with one folder a class
            each. Classes are numbered in alphabetical order over all parts.
        image_size: ``(height, width)`` to resize to, bilinearly; None: all images must have one size.
        color: ``"rgb"`` (3 channels), ``"grayscale"`` (1), or None: grayscale if every file is, else RGB.

    Returns:
        uint8 images ``(n, height, width, channels)`` and int64 labels ``(n,)``, ordered by class and file name; class
        names.

    Raises:
        DataError: If there are no images, they differ in size, one can't be read or has more than 8 bits, or folders
            of parts and of classes lie side by side.
        MissingDependencyError: If Pillow is not installed.
    """
    parts = _parts(folder)
    names = sorted({path.name for root in parts.values() for path in _folders(root)})
    arrays: dict[str, Any] = {}
    images: dict[str, list[np.ndarray]] = {}
    first: tuple[int, ...] | None = None
    for part, root in parts.items():
        listed = [(file, number) for number, name in enumerate(names) for file in _images(root / name)]
        if not listed:
            raise DataError(
                f"data `{root}` has no images ({', '.join(SUFFIXES)}) in folders named after classes; expected files "
                f"such as `{root}/cat/1.png`"
            )
        images[part] = []
        for file, _ in listed:
            image = _read(file, image_size, color)
            first = first or image.shape[:2]
            if image.shape[:2] != first:
                raise DataError(
                    f"data `{folder}`: `{file.name}` is {image.shape[0]}x{image.shape[1]} and others are "
                    f"{first[0]}x{first[1]} (height x width); resize them to one size, or pass `image_size`"
                )
            images[part].append(image)
        arrays[f"y_{part}"] = np.array([number for _, number in listed], dtype=np.int64)
    gray = all(image.ndim == 2 for found in images.values() for image in found)
    for part, found in images.items():
        arrays[f"x_{part}"] = np.stack([_channels(image, gray) for image in found])
    return arrays, tuple(names)


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted(found)


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folder of each part: those that are there, or the folder itself as training images."""
    folders = _folders(folder)
    named = [path for path in folders if path.name.lower() in _PART_NAMES]
    # A class may be called "train": a part has folders of classes below it, a class has images.
    named = [path for path in named if not _images(path)]
    if not named:
        return {"train": folder}
    others = [path.name for path in folders if path not in named]
    if others:
        raise DataError(
            f"data `{folder}` has `{named[0].name}` and `{others[0]}` side by side; it must have folders of parts "
            "(train, val, test) or folders of classes, not both: move one of them"
        )
    parts: dict[str, Path] = {}
    for path in named:
        part = _PART_NAMES[path.name.lower()]
        if part in parts:
            raise DataError(f"data `{folder}` has `{parts[part].name}` and `{path.name}`; keep one of them")
        parts[part] = path
    return parts


def _read(file: Path, image_size: tuple[int, int] | None, color: str | None) -> np.ndarray:
    """Return one image, ``(height, width)`` where it is grayscale, else ``(height, width, 3)``."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("reading images needs Pillow; install it with: pip install pillow") from None
    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(_DEEP_MODES):
                raise DataError(f"image `{file}` has mode {opened.mode}; expected 8 bits a channel: convert it first")
            gray = opened.mode in ("1", "L") if color is None else color == "grayscale"
            image = opened.convert("RGBA") if opened.mode == "P" else opened
            image = image.convert("L" if gray else "RGB")
            if image_size is not None:
                image = image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"image `{file}` can't be read ({error}); replace or remove it") from None


def _channels(image: np.ndarray, gray: bool) -> np.ndarray:
    if gray:
        return image[..., None]
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
