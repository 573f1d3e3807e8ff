"""Where shared values begin: one function a method, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dwindle.clustering.kmeans import EXACT_BUDGET, kmeans
from dwindle.errors import ConfigError, check_choice


def linear(points: np.ndarray, clusters: int) -> np.ndarray:
    """Return values at equal distances from the smallest to the largest point."""
    found: np.ndarray = np.linspace(points.min(), points.max(), clusters, dtype=np.float32)
    return found


def quantile(points: np.ndarray, clusters: int) -> np.ndarray:
    """Return the medians of ``clusters`` parts that have as many points each."""
    return np.asarray(np.quantile(points, (np.arange(clusters) + 0.5) / clusters), np.float32)


def density(points: np.ndarray, clusters: int) -> np.ndarray:
    """Return values as dense as the cube root of the points' density, which is best where there are many.

    References:
        Panter and Dite 1951, Quantization distortion in pulse-count modulation, Proceedings of the IRE 39(1).
    """
    heights, edges = np.histogram(points, int(np.clip(len(points) // 8, 4, 256)))
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(heights))])
    return np.asarray(np.interp((np.arange(clusters) + 0.5) / clusters * mass[-1], mass, edges), np.float32)


#: Each takes the points, shape ``(n,)``, and the number of values.
INITS: dict[str, Callable[..., np.ndarray]] = {
    "kmeans": kmeans,
    "linear": linear,
    "density": density,
    "quantile": quantile,
}


def check_init(init: Any) -> Any:
    """Return the name, or the given values as an ascending array.

    Raises:
        ConfigError: If it is no known name and no list of different, finite numbers.
    """
    if isinstance(init, str):
        check_choice("init", init, INITS)
        return init
    values: np.ndarray
    try:
        values = np.asarray(init, np.float32)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ConfigError(
            f"`init` is {init!r}; it must be one of {', '.join(INITS)}, or a list of numbers: the values to share"
        )
    return np.sort(values)


def initial_values(groups: Sequence[np.ndarray], clusters: int, init: Any, *, keep_zero: bool) -> np.ndarray:
    """Return the values that the weights of each table begin with.

    Args:
        groups: The weights of each table, flat.
        clusters: How many values.
        init: What `check_init` returned.
        keep_zero: Whether one of them is 0 exactly.

    Returns:
        Shape ``(tables, clusters)``, ascending, float32. Fewer different weights repeat the last value.
    """
    rows = []
    for points in groups:
        row: np.ndarray
        if isinstance(init, str) and init == "kmeans":
            row = kmeans(points, clusters, keep_zero=keep_zero, budget=EXACT_BUDGET // len(groups))
        else:
            row = INITS[init](points, clusters) if isinstance(init, str) else init.copy()
            if keep_zero:
                row[np.abs(row).argmin()] = 0
        rows.append(padded(np.sort(row), clusters))
    return np.stack(rows)


def nearest(points: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each point the number of the value, of those in ascending order, that is nearest."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, points, side="left")


def padded(values: np.ndarray, clusters: int) -> np.ndarray:
    """Return values, ascending, filled up to ``clusters`` with the last."""
    return np.pad(np.asarray(values, np.float32), (0, clusters - len(values)), mode="edge")
