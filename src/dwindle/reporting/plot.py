"""The plot of the report: size against metric, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.reporting.numbers import format_bytes, format_metric, format_ms

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 22, 52


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial on the plot."""

    x: float
    y: float
    label: str
    kind: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything that the template draws, in pixels."""

    points: tuple[Point, ...]
    front: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    size_limit: float | None
    metric_limit: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points that no other beats: none has both a smaller x and a larger or equal y.

    Args:
        points: ``(x, y)`` pairs; smaller x and larger y are better.
    """
    best, front = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def make_plot(report: Mapping[str, Any]) -> Plot | None:
    """Return the plot of a report's trials, None if fewer than two have figures."""
    metric = report.get("metric") or {"name": "accuracy", "higher_is_better": True}
    trials = [
        trial for trial in report.get("trials") or []
        if trial.get("status", "done") == "done" and trial.get("size_bytes") and trial.get("accuracy") is not None
    ]  # fmt: skip
    if len(trials) < 2:
        return None
    goals = report.get("goals") or {}
    sizes = [float(t["size_bytes"]) for t in trials]
    values = [float(t["accuracy"]) for t in trials]
    limit = goals.get("max_size_bytes")
    floor = None
    baseline = report.get("baseline") or trials[0]
    if goals.get("max_drop") is not None:
        start = baseline.get("validation_accuracy", baseline.get("accuracy"))
        floor = None if start is None else start - goals["max_drop"] * (1 if metric["higher_is_better"] else -1)
    x_of = _log_scale([*sizes, *([limit] if limit else [])])
    low, high = _range([*values, *([floor] if floor is not None else [])])

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    chosen = (report.get("result") or {}).get("id")
    points = tuple(
        Point(
            x=round(x_of(size), 1), y=round(y_of(value), 1), kind=_kind(trial, chosen), name=str(trial.get("name")),
            label=f"{trial.get('name')}: {format_bytes(size)}, {format_metric(value, metric['name'])}, "
            f"{format_ms((trial.get('latency_ms') or {}).get('p50'))}",
        )
        for trial, size, value in zip(trials, sizes, values, strict=True)
    )  # fmt: skip
    sign = 1 if metric["higher_is_better"] else -1
    front = pareto([(size, sign * value) for size, value in zip(sizes, values, strict=True)])
    return Plot(
        points=points,
        front=" ".join(f"{points[i].x},{points[i].y}" for i in front),
        x_ticks=tuple((round(x_of(tick), 1), format_bytes(tick)) for tick in _log_ticks(min(sizes), max(sizes))),
        y_ticks=tuple((round(y_of(tick), 1), format_metric(tick, metric["name"])) for tick in _ticks(low, high)),
        size_limit=round(x_of(limit), 1) if limit else None,
        metric_limit=round(y_of(floor), 1) if floor is not None else None,
    )


def _kind(trial: Mapping[str, Any], chosen: Any) -> str:
    if trial.get("id") == "000":
        return "original"
    if trial.get("id") == chosen:
        return "chosen"
    return "meets" if trial.get("meets") else "other"


def _log_scale(values: Sequence[float]) -> Any:
    low, high = math.log(min(values)), math.log(max(values))
    margin = max(0.1, (high - low) * 0.06)
    low, high = low - margin, high + margin
    return lambda value: LEFT + (math.log(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _range(values: Sequence[float]) -> tuple[float, float]:
    # One trial that failed badly must not press all the others into a line.
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    margin = max((high - low) * 0.08, 1e-4)
    return low - margin, high + margin


def _log_ticks(low: float, high: float) -> list[float]:
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    inside = [tick for tick in ticks if low * 0.95 <= tick <= high * 1.05]
    return inside if len(inside) <= 7 else [tick for tick in inside if f"{tick:e}"[0] == "1" or tick == inside[0]]


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
