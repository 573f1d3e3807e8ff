"""Inputs for the models of `real_models.py`: bytes of files, printed text, photos with faces, tones.

Each function returns the same samples for the same seed (`file_bytes` on the same machine); another seed gives other
samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Inputs = Callable[[Path, int, int], list[np.ndarray]]
TEXT = (
    "the quick brown fox jumps over lazy dogs while seven bright stars shine above a quiet harbour; total 1,024.50 EUR "
    "Invoice No 88213 Date 2021-07-19 Page 3 of 12 Department of Physics Abstract Table Figure 4 Results are shown in "
    "section 2.3 and discussed below, where rates of change were measured again: 12% 37.5 kg (see appendix)"
)
WORDS = TEXT.split()
IMAGENET = (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32))
MOST_FILES_OF_A_KIND = 40


def file_bytes(folder: Path, count: int, seed: int) -> list[np.ndarray]:
    """Return the first and last 1,024 bytes of files of this Python and of the folder, as magika takes them.

    White space at the ends is left out; what is missing is 256. Files of a suffix are drawn alike, few of each. Even
    seeds draw from one half of the files, odd ones from the other.
    """
    kinds: dict[str, list[Path]] = {}
    for root in (Path(sys.prefix), Path(sys.base_prefix) / "lib", Path("/usr/share"), folder):
        for path in sorted(root.rglob("*.*")):
            if path.is_file() and not path.is_symlink() and path.stat().st_size >= 8:
                kinds.setdefault(path.suffix.lower(), []).append(path)
    generator = np.random.default_rng(seed)
    drawn: list[Path] = []
    for suffix in sorted(kinds):
        half = sorted(kinds[suffix])[seed % 2 :: 2]
        drawn += [half[i] for i in generator.permutation(len(half))[:MOST_FILES_OF_A_KIND]]
    chosen = [drawn[i] for i in generator.permutation(len(drawn))[:count]]
    return [np.array([_ends(path) for path in chosen], np.int32)]


def _ends(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        first = file.read(4096)
        file.seek(max(0, path.stat().st_size - 4096))
        last = file.read(4096)
    found = np.full(2048, 256, np.int32)
    first, last = first.lstrip()[:1024], last.rstrip()[-1024:]
    found[: len(first)] = np.frombuffer(first, np.uint8)
    found[2048 - len(last) :] = np.frombuffer(last, np.uint8)
    return found


def text_lines(height: int, width: int, *, turned: bool = False) -> Inputs:
    """Return what makes pictures of one line of print, in -1..1; with ``turned`` half of them upside down."""

    def make(folder: Path, count: int, seed: int) -> list[np.ndarray]:
        del folder
        generator = np.random.default_rng(seed)
        pictures = []
        for _ in range(count):
            ink, paper = _colours(generator)
            picture = Image.new("RGB", (width, height), paper)
            font = ImageFont.load_default(int(height * generator.uniform(0.45, 0.8)))
            text = " ".join(generator.choice(WORDS, generator.integers(1, 6)))
            ImageDraw.Draw(picture).text((generator.integers(1, 8), height // 2), text, ink, font, anchor="lm")
            picture = picture.rotate(180) if turned and generator.random() < 0.5 else picture
            pictures.append(_noisy(np.asarray(picture, np.float32), generator))
        return [np.stack(pictures) / 127.5 - 1]

    return make


def pages(height: int, width: int, scale: tuple[np.ndarray, np.ndarray] | None, *, turned: bool = False) -> Inputs:
    """Return what makes pages with headings, columns and pictures; ``scale`` is mean and deviation of 0..1.

    Without ``scale`` they are in -1..1. With ``turned`` each lies on one of its four sides.
    """

    def make(folder: Path, count: int, seed: int) -> list[np.ndarray]:
        generator = np.random.default_rng(seed)
        shots = photos(folder)
        found = []
        for _ in range(count):
            page = _page(height, width, shots, generator)
            page = page.rotate(90 * int(generator.integers(4)), expand=True) if turned else page
            array = _noisy(np.asarray(page.resize((width, height)), np.float32), generator)
            found.append(array / 127.5 - 1 if scale is None else (array / 255 - scale[0]) / scale[1])
        return [np.stack(found).astype(np.float32)]

    return make


def _page(height: int, width: int, shots: list[Image.Image], generator: np.random.Generator) -> Image.Image:
    ink, paper = _colours(generator)
    page = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(page)
    size = int(generator.integers(9, 22))
    columns = int(generator.integers(1, 3))
    for column in range(columns):
        left, y = 8 + column * width // columns, int(generator.integers(4, 30))
        space = width // columns - 16
        while y < height - size:
            kind = generator.random()
            if kind < 0.08:
                shot = shots[int(generator.integers(len(shots)))]
                tall = min(int(space * 0.6), height - y - 4)
                page.paste(shot.resize((space, max(tall, 1))), (left, y))
                y += tall + size
                continue
            font = ImageFont.load_default(size * 2 if kind < 0.15 else size)
            text = " ".join(generator.choice(WORDS, 12))
            while draw.textlength(text, font) > space and " " in text:
                text = text.rsplit(" ", 1)[0]
            draw.text((left, y), text, ink, font)
            y += int(size * (2.6 if kind < 0.15 else 1.4)) + (size if generator.random() < 0.12 else 0)
    return page


def _colours(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return ink and paper, dark on light or the reverse."""
    dark, light = generator.integers(0, 90, 3), generator.integers(170, 256, 3)
    ink, paper = (dark, light) if generator.random() < 0.8 else (light, dark)
    return tuple(int(c) for c in ink), tuple(int(c) for c in paper)


def _noisy(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.clip(array + generator.normal(0, generator.uniform(0, 12), array.shape), 0, 255).astype(np.float32)


def photos(folder: Path) -> list[Image.Image]:
    """Return the photos that scikit-image ships."""
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "camera.png")
    (data,) = folder.glob("**/skimage/data")
    return [Image.open(data / name).convert("RGB") for name in names]


def faces(size: int, *, low: float, close: bool = False) -> Inputs:
    """Return what makes parts of photos with faces of scikit-image's ``lfw_subset`` in them, in ``low``..1.

    The faces are 25 pixels wide, grey, and are made larger and tinted. With ``close`` one face fills the picture.
    """

    def make(folder: Path, count: int, seed: int) -> list[np.ndarray]:
        generator = np.random.default_rng(seed)
        (path,) = folder.glob("**/skimage/data/lfw_subset.npy")
        people = np.load(path)[:100][seed % 2 :: 2]
        shots = photos(folder)
        found = []
        for _ in range(count):
            picture = _part(shots[int(generator.integers(len(shots)))], size, generator)
            for _ in range(1 if close else int(generator.integers(0, 3))):
                wide = int(size * (generator.uniform(0.85, 1.1) if close else generator.uniform(0.2, 0.6)))
                grey = people[int(generator.integers(len(people)))]
                tint = generator.uniform(0.75, 1.0, 3)
                face = Image.fromarray(np.clip(grey[..., None] * tint * 255, 0, 255).astype(np.uint8))
                corner = generator.integers(min(0, size - wide), max(1, size - wide + 1), 2)
                picture.paste(face.resize((wide, wide), Image.Resampling.BICUBIC), tuple(int(c) for c in corner))
            found.append(_noisy(np.asarray(picture, np.float32), generator) / 255 * (1 - low) + low)
        return [np.stack(found).astype(np.float32)]

    return make


def _part(photo: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """Return a square part of a photo, sometimes mirrored."""
    side = int(min(photo.size) * generator.uniform(0.4, 1.0))
    left, top = (int(generator.integers(0, n - side + 1)) for n in photo.size)
    part = photo.crop((left, top, left + side, top + side)).resize((size, size))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else part


def tones(length: int, rate: int) -> Inputs:
    """Return what makes notes with overtones that begin and end, and a little noise; shape ``(n, length, 1)``."""

    def make(folder: Path, count: int, seed: int) -> list[np.ndarray]:
        del folder
        generator = np.random.default_rng(seed)
        time = np.arange(length) / rate
        found = []
        for _ in range(count):
            sound = generator.normal(0, generator.uniform(0.0005, 0.01), length)
            for _ in range(int(generator.integers(3, 14))):
                pitch = 440 * 2 ** ((int(generator.integers(36, 84)) - 69) / 12)
                begun, held = generator.uniform(0, time[-1] * 0.9), generator.uniform(0.1, 0.8)
                after = time - begun
                shape = np.where((after > 0) & (after < held), np.exp(-3 * after) * np.minimum(after * 200, 1), 0)
                overtones = [np.sin(2 * np.pi * pitch * k * time) * generator.uniform(0.2, 1) / k for k in range(1, 6)]
                sound += generator.uniform(0.05, 0.3) * shape * np.sum(overtones, axis=0)
            found.append(sound)
        return [np.stack(found)[..., None].astype(np.float32)]

    return make
