"""Latency of a file: a distribution, on a stated number of threads, after warm-up."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import ConfigError
from dwindle.measuring.runners import runner_of


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one inference of one sample.

    Attributes:
        p50_ms: Median.
        p90_ms: 90th percentile.
        mean_ms: Mean.
        min_ms: Smallest.
        runs: Number of timed runs.
        threads: Threads of the interpreter.
    """

    p50_ms: float
    p90_ms: float
    mean_ms: float
    min_ms: float
    runs: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def measure_latency(source: str | Path | bytes, *, threads: int = 1, seconds: float = 0.4, warmup: int = 20) -> Latency:
    """Time one file; see `compare_latency`."""
    return compare_latency([source], threads=threads, seconds=seconds, warmup=warmup)[0]


def compare_latency(
    sources: Sequence[str | Path | bytes], *, threads: int = 1, seconds: float = 0.4, warmup: int = 20
) -> list[Latency]:
    """Time several files in one go, in small blocks that take turns, so that the machine's drift hits all alike.

    One sample a run; only the interpreter's ``invoke`` is timed, with Python's garbage collection off.

    Args:
        sources: Paths of ``.tflite`` and ``.onnx`` files, or bytes of the former.
        threads: Threads of each interpreter.
        seconds: Time to spend on each file; at least 30 runs are made.
        warmup: Untimed runs before.

    Raises:
        ConfigError: If ``threads`` is below 1.
    """
    return [_latency(taken, threads) for taken in time_runs(sources, threads=threads, seconds=seconds, warmup=warmup)]


def time_runs(
    sources: Sequence[str | Path | bytes], *, threads: int = 1, seconds: float = 0.4, warmup: int = 20
) -> list[np.ndarray]:
    """Return the time of every single run of each file, in milliseconds, in the order in which they were made.

    See `compare_latency` for how they are timed, for the arguments and the error.
    """
    if threads < 1:
        raise ConfigError(f"`threads` is {threads}; it must be at least 1")
    runners = [runner_of(source, threads=threads) for source in sources]
    blocks = []
    for runner in runners:
        for _ in range(warmup):
            runner.invoke()
        begun = time.perf_counter_ns()
        runner.invoke()
        once = max(1, time.perf_counter_ns() - begun)
        # A block is about 10 ms; there are as many as the time allows.
        blocks.append(max(1, min(200, int(10e6 / once))))
    times: list[list[int]] = [[] for _ in runners]
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.monotonic() + seconds * len(runners)
        while time.monotonic() < end or min(map(len, times)) < 30:
            for runner, block, taken in zip(runners, blocks, times, strict=True):
                # The first run of a block finds the caches full of another file.
                runner.invoke()
                for _ in range(block):
                    begun = time.perf_counter_ns()
                    runner.invoke()
                    taken.append(time.perf_counter_ns() - begun)
    finally:
        if enabled:
            gc.enable()
    return [np.array(taken) / 1e6 for taken in times]


def _latency(taken_ms: np.ndarray, threads: int) -> Latency:
    return Latency(
        p50_ms=float(np.percentile(taken_ms, 50)), p90_ms=float(np.percentile(taken_ms, 90)),
        mean_ms=float(taken_ms.mean()), min_ms=float(taken_ms.min()), runs=len(taken_ms), threads=threads,
    )  # fmt: skip
