"""The plots of the report's trials: size or latency against the metric, in pixels for an SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.reporting.numbers import format_bytes, format_metric, format_ms

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 26, 52
# A file that loses this many times as much as the typical one is drawn at the edge, so as not to press all others
# into a line.
FAR = 20.0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a plot has from left to right.

    Attributes:
        key: Its name in the page.
        title: In words.
        limit_text: What lies beyond the goal.
        value: Reads it off a trial; None where it was not measured.
        limit: Reads the goal off a report and its original.
        written: Writes a value.
    """

    key: str
    title: str
    limit_text: str
    value: Callable[[Mapping[str, Any]], float | None]
    limit: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]
    written: Callable[[float | None], str]


def latency_key(report: Mapping[str, Any]) -> str:
    """Return which latency a report's goals are about: ``p50`` or ``p90``."""
    return "p90" if (report.get("goals") or {}).get("latency") == "p90" else "p50"


def latency_of(trial: Mapping[str, Any], key: str) -> float | None:
    """Return a trial's latency in milliseconds, ``p50`` or ``p90``."""
    value = (trial.get("latency_ms") or {}).get(key)
    return None if value is None else float(value)


def p50_of(trial: Mapping[str, Any]) -> float | None:
    """Return a trial's median latency in milliseconds."""
    return latency_of(trial, "p50")


def _size(trial: Mapping[str, Any]) -> float | None:
    return float(trial["size_bytes"]) if trial.get("size_bytes") else None


def _size_limit(goals: Mapping[str, Any], _original: Mapping[str, Any]) -> float | None:
    return float(goals["max_size_bytes"]) if goals.get("max_size_bytes") else None


def axes_of(report: Mapping[str, Any]) -> tuple[Axis, Axis]:
    """Return what a report's trials are plotted against: size, and the latency that its goals are about."""
    key = latency_key(report)

    def limit(goals: Mapping[str, Any], original: Mapping[str, Any]) -> float | None:
        if goals.get("max_latency_ms"):
            return float(goals["max_latency_ms"])
        start = latency_of(original, key)
        return float(goals["max_latency_factor"]) * start if goals.get("max_latency_factor") and start else None

    return (
        Axis(key="size", title="file size", limit_text="too large",
             value=_size, limit=_size_limit, written=format_bytes),
        Axis(key="latency", title=f"latency of one sample, {key}", limit_text="too slow",
             value=lambda trial: latency_of(trial, key), limit=limit, written=format_ms),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial on the plot.

    Attributes:
        x: From the left.
        y: From the top.
        label: All its figures in a line.
        figures: The same without its name.
        kind: ``original``, ``chosen``, ``meets`` or ``other``.
        name: What was done.
        trial: Its number.
        far: Whether it lies beyond the edge that it is drawn at.
    """

    x: float
    y: float
    label: str
    figures: str
    kind: str
    name: str
    trial: str
    far: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything that the template draws, in pixels; ``best`` has the trials on the Pareto front."""

    key: str
    title: str
    limit_text: str
    points: tuple[Point, ...]
    front: str
    best: tuple[str, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_limit: float | None
    metric_limit: float | None
    rising: bool
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


def make_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Return the plots of a report's trials: against size, and against latency; none with fewer than two files."""
    return [plot for axis in axes_of(report) if (plot := make_plot(report, axis)) is not None]


def make_plot(report: Mapping[str, Any], axis: Axis) -> Plot | None:
    """Return the plot of a report's trials along one of `axes_of`, None if fewer than two have figures."""
    metric = report.get("metric") or {"name": "accuracy", "higher_is_better": True}
    measured = [
        (trial, x, float(trial["accuracy"])) for trial in report.get("trials") or []
        if trial.get("status", "done") == "done" and (x := axis.value(trial)) and _is_finite(trial.get("accuracy"))
    ]  # fmt: skip
    if len(measured) < 2:
        return None
    goals, original = report.get("goals") or {}, measured[0][0]
    sign = 1 if metric["higher_is_better"] else -1
    limit, start = axis.limit(goals, original), float(original["accuracy"])
    asked = ((goals.get("max_drop"), 1.0), (goals.get("max_relative_drop"), abs(start)))
    drops = [drop * scale for drop, scale in asked if drop is not None]
    floor = start - min(drops) * sign if drops else None
    positions, values = [x for _, x, _ in measured], [value for _, _, value in measured]
    x_of = _log_scale([*positions, *([limit] if limit else [])])
    low, high = _range(values, floor, sign)

    def y_of(value: float) -> float:
        inside = min(max(value, low), high)
        return HEIGHT - BOTTOM - (inside - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    chosen = (report.get("result") or {}).get("id")
    points = []
    for trial, x, value in measured:
        figures = _figures(trial, metric["name"])
        points.append(
            Point(
                x=round(x_of(x), 1), y=round(y_of(value), 1), kind=_kind(trial, chosen), name=str(trial.get("name")),
                figures=figures, label=f"{trial.get('name')}: {figures}", trial=str(trial.get("id")),
                far=not low <= value <= high,
            )
        )  # fmt: skip
    front = pareto([(x, sign * value) for x, value in zip(positions, values, strict=True)])
    ends = (min(positions), max(positions))
    return Plot(
        key=axis.key, title=axis.title, limit_text=axis.limit_text, points=tuple(points), rising=sign > 0,
        front=" ".join(f"{points[i].x},{points[i].y}" for i in front), best=tuple(points[i].trial for i in front),
        x_ticks=tuple((round(x_of(tick), 1), axis.written(tick)) for tick in log_ticks(*ends)),
        y_ticks=tuple((round(y_of(tick), 1), format_metric(tick, metric["name"])) for tick in _ticks(low, high)),
        x_limit=round(x_of(limit), 1) if limit else None,
        metric_limit=round(y_of(floor), 1) if floor is not None and low <= floor <= high else None,
    )  # fmt: skip


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _figures(trial: Mapping[str, Any], metric: str) -> str:
    parts = [format_bytes(trial.get("size_bytes")), format_metric(trial.get("accuracy"), metric),
             format_ms(p50_of(trial))]  # fmt: skip
    return ", ".join(parts)


def _kind(trial: Mapping[str, Any], chosen: Any) -> str:
    if trial.get("id") == "000":
        return "original"
    if trial.get("id") == chosen:
        return "chosen"
    return "meets" if trial.get("meets") else "other"


def _log_scale(values: Sequence[float]) -> Callable[[float], float]:
    low, high = math.log(min(values)), math.log(max(values))
    margin = max(0.1, (high - low) * 0.06)
    low, high = low - margin, high + margin
    return lambda value: LEFT + (math.log(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _range(values: Sequence[float], floor: float | None, sign: int) -> tuple[float, float]:
    """Return the ends of the metric's axis; a file that is far worse than most lies beyond."""
    best = max(values, key=lambda value: sign * value)
    losses = sorted(sign * (best - value) for value in values)
    typical = losses[len(losses) // 2]
    asked = 0.0 if floor is None else sign * (best - floor)
    edge = max(FAR * typical, FAR / 2 * asked)
    kept = [value for value in values if edge <= 0 or sign * (best - value) <= edge]
    shown = [*kept, *([floor] if floor is not None else [])]
    low, high = min(shown), max(shown)
    margin = max((high - low) * 0.08, 1e-4)
    return low - margin, high + margin


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis: 1, 2 and 5 times powers of ten, or powers alone."""
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
