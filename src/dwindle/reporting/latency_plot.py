"""The distributions of two files' latencies, as an SVG draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.reporting.numbers import format_ms
from dwindle.reporting.plot import log_ticks

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 16, 48
TOLD = (10, 50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The share of a file's runs that took at most a time."""

    name: str
    points: str
    marks: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True, kw_only=True)
class LatencyPlot:
    """Everything that the template draws, in pixels, and the same in a table."""

    curves: tuple[Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    rows: tuple[tuple[str, ...], ...]
    runs: tuple[int, ...]
    threads: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def make_latency_plot(evidence: Mapping[str, Any]) -> LatencyPlot | None:
    """Return the plot of ``evidence["latency"]``, None without one."""
    told = evidence.get("latency") or {}
    percentiles: Mapping[str, Sequence[float]] = told.get("percentiles_ms") or {}
    if any(not percentiles.get(key) or min(percentiles[key]) <= 0 for key in ("before", "after")):
        return None
    shown = {name: percentiles[key] for name, key in (("original", "before"), ("chosen", "after"))}
    low = min(times[0] for times in shown.values())
    high = max(times[99] for times in shown.values()) * 1.02
    room = max(0.05, 0.04 * math.log(high / low))
    start, end = math.log(low) - room, math.log(high) + room

    def x_of(value: float) -> float:
        return LEFT + (math.log(value) - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    def y_of(share: float) -> float:
        return HEIGHT - BOTTOM - share / 100 * (HEIGHT - TOP - BOTTOM)

    curves = tuple(
        Curve(
            name=name,
            points=" ".join(f"{x_of(time):.1f},{y_of(share):.1f}" for share, time in enumerate(times) if time <= high),
            marks=tuple(
                (round(x_of(times[share]), 1), round(y_of(share), 1), f"{name}: p{share} {format_ms(times[share])}")
                for share in (50, 90)
            ),
        )
        for name, times in shown.items()
    )
    return LatencyPlot(
        curves=curves, runs=tuple(told.get("runs") or ()), threads=int(told.get("threads") or 1),
        x_ticks=tuple((round(x_of(tick), 1), format_ms(tick)) for tick in log_ticks(low, high)),
        y_ticks=tuple((round(y_of(share), 1), f"{share}%") for share in (0, 25, 50, 75, 100)),
        rows=tuple((name, *(format_ms(times[share]) for share in TOLD)) for name, times in shown.items()),
    )  # fmt: skip
