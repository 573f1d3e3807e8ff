"""Samples for running a file: arrays from any form of data, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dwindle.data import Data, Split, read_data
from dwindle.errors import DataError
from dwindle.measuring.litert import TensorSpec


def arrays_of(data: Any, limit: int) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """Return at most ``limit`` samples, one array per input, and their labels where there are some."""
    if isinstance(data, np.ndarray):
        return (data[:limit],), None
    if isinstance(data, list) and all(isinstance(item, np.ndarray) for item in data):
        return tuple(item[:limit] for item in data), None
    split = data if isinstance(data, Split) else None
    if split is None:
        found = data if isinstance(data, Data) else read_data(data)
        split = found.evaluation()
    y = getattr(split, "y", None)
    return tuple(array[:limit] for array in split.x), None if y is None else np.asarray(y)[:limit]


def check_samples(x: Sequence[np.ndarray], inputs: Sequence[TensorSpec]) -> None:
    """Check that samples are what a file takes.

    Raises:
        DataError: If they are not.
    """
    if len(x) != len(inputs):
        raise DataError(f"the data has {len(x)} arrays and the file has {len(inputs)} inputs")
    if len({len(array) for array in x}) > 1 or len(x[0]) == 0:
        counts = ", ".join(f"{len(array):,}" for array in x)
        raise DataError(f"the data has {counts} samples; every input needs the same number, at least 1")
    for array, given in zip(x, inputs, strict=True):
        wanted = given.shape[1:]
        if array.ndim != len(given.shape) or any(
            want not in (-1, have) for have, want in zip(array.shape[1:], wanted, strict=True)
        ):
            raise DataError(
                f"the samples of input `{given.name}` have shape {array.shape[1:]} and the file takes {wanted}; pass "
                "them as the model takes them, with a leading sample axis"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError("the data has NaN or infinite values; remove those samples")
