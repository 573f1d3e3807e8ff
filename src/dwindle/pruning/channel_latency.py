"""Channels for a time: bisection in which every step writes the file and times it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from dwindle.errors import ConfigError
from dwindle.pruning.channel_groups import Groups
from dwindle.pruning.cutting import cut

if TYPE_CHECKING:
    from dwindle.pruning.channels import Block, ChannelOptions

#: A file between this share of the time allowed and all of it is good enough to stop at.
_NEAR = 0.95
_STEPS = 12


def file_of(model: keras.Model, scheme: Any, data: Any) -> bytes:
    """Return the bytes of the file that a model becomes in a scheme."""
    from dwindle.exporting import export, float_file

    if scheme == "float32":
        return float_file(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")
        export(model, path, scheme, data)
        return path.read_bytes()


def within_latency(
    model: keras.Model, found: Groups, blocks: list[Block], options: ChannelOptions, data: Any
) -> tuple[np.ndarray, tuple[float, float], list[str]]:
    """Find the largest model whose file is measured to take no more than the time allowed.

    Every model on the way is written as a file and timed beside the original's, in turns, so that a machine that
    speeds up or slows down meanwhile hits both; what counts is the ratio.

    Returns:
        The channels to remove, the medians before and after in ms, and notes.

    Raises:
        ConfigError: If even the smallest model takes longer.
    """
    from dwindle.measuring.latency import compare_latency
    from dwindle.pruning.channels import first

    original = file_of(model, options.scheme, data)
    before = compare_latency([original])[0].p50_ms
    limit = options.max_latency_ms or (1 - options.sparsity) * before
    if before <= limit:
        return first(blocks, 0), (before, before), [f"nothing was cut: the file takes {before:.3g} ms as it is"]

    def taken(count: int) -> float:
        small = file_of(cut(model, found.analysis, first(blocks, count)), options.scheme, data)
        base, now = compare_latency([original, small])
        return now.p50_ms / base.p50_ms * before

    count, time = _bisected(taken, len(blocks), limit)
    if count is None:
        raise ConfigError(
            f"`max_latency_ms` is {limit:.3g}; the smallest model that channels can be cut to takes {time:.3g} ms of "
            f"{before:.3g} ms"
        )
    return first(blocks, count), (before, time), []


def _bisected(taken: Callable[[int], float], most: int, limit: float) -> tuple[int | None, float]:
    """Return the least count whose time is within the limit, and its time; None if there is none."""
    low, high = 0, most
    best = taken(most)
    if best > limit:
        return None, best
    for _ in range(_STEPS):
        if high - low <= 1 or best >= _NEAR * limit:
            break
        middle = (low + high) // 2
        time = taken(middle)
        if time <= limit:
            high, best = middle, time
        else:
            low = middle
    return high, best
