"""Choose the digits that ship with dwindle from the full MNIST.

    python scripts/make_mnist_subset.py [mnist.npz] [out.npz]

Takes 12,000 training and 2,000 validation images from MNIST's training part and 3,000 test images from its test part,
the same number of each digit, by a fixed seed. Pixels are unchanged. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

TRAIN, VALIDATION, TEST = 1200, 200, 300  # of each digit
SEED = 20_240_601
LARGEST_BYTES = 3_000_000


def choose(labels: np.ndarray, counts: list[int], generator: np.random.Generator) -> list[np.ndarray]:
    """Return disjoint index sets with ``counts`` samples of each digit, each set in random order."""
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for digit in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == digit))
        start = 0
        for part, count in zip(parts, counts, strict=True):
            part.append(shuffled[start : start + count])
            start += count
    return [generator.permutation(np.concatenate(part)) for part in parts]


def subset(full: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of the subset."""
    generator = np.random.default_rng(SEED)
    train, validation = choose(full["y_train"], [TRAIN, VALIDATION], generator)
    (test,) = choose(full["y_test"], [TEST], generator)
    return {
        "x_train": full["x_train"][train],
        "y_train": full["y_train"][train],
        "x_val": full["x_train"][validation],
        "y_val": full["y_train"][validation],
        "x_test": full["x_test"][test],
        "y_test": full["y_test"][test],
    }


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> int:
    """Write a compressed ``.npz`` whose bytes depend on the arrays alone; return its size."""
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content.getvalue(), compresslevel=9)
    os.replace(temporary, path)
    return path.stat().st_size


def main(arguments: list[str]) -> int:
    """Write the subset; return the exit status."""
    root = Path(__file__).resolve().parent.parent
    source = Path(arguments[0]) if arguments else Path.home() / ".keras" / "datasets" / "mnist.npz"
    target = Path(arguments[1]) if len(arguments) > 1 else root / "src" / "dwindle" / "demo_data" / "mnist.npz"
    if not source.exists():
        print(f"`{source}` does not exist; pass the full MNIST as .npz in Keras' layout", file=sys.stderr)
        return 2
    with np.load(source, allow_pickle=False) as file:
        arrays = subset({name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")})
    size = write_npz(target, arrays)
    print(f"{target}: {size:,} bytes")
    return 0 if size <= LARGEST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
