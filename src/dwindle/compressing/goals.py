"""Goals: what the user needs of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dwindle.errors import ConfigError, did_you_mean
from dwindle.units import number_in, parse_drop, parse_size


def parse_latency(value: str | float, name: str = "max_latency") -> tuple[float | None, float | None]:
    """Return ``(milliseconds, factor)``, one of them None, from ``2``, ``"2ms"``, ``"500us"`` or ``"0.5x"``.

    Raises:
        ConfigError: If it is no time or factor above 0.
    """
    given = value
    unit = "ms"
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(ms|us|s|x)?\s*", value)
        number = number_in(found.group(1)) if found else None
        if found is None or number is None:
            raise ConfigError(f"`{name}` is {given!r}; it must be a time such as 2ms, or a factor such as 0.5x")
        value, unit = number, found.group(2) or "ms"
    if not value > 0 or value == float("inf"):
        raise ConfigError(f"`{name}` is {given!r}; it must be above 0, such as 2ms or 0.5x")
    if unit == "x":
        return None, float(value)
    return float(value) * {"ms": 1.0, "us": 1e-3, "s": 1e3}[unit], None


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What a file must reach; what is None is not asked for.

    Args:
        max_drop: Largest accepted loss of the metric against the original, absolute: 0.005 or ``"0.5%"``.
        max_size: Largest size of the file: bytes or ``"45KB"`` (1 KB = 1000 bytes).
        max_latency: Largest median latency: milliseconds, ``"2ms"``, or a factor of the original's, ``"0.5x"``.
        max_ram: Largest RAM while it runs: bytes or ``"64KB"``.

    Raises:
        ConfigError: For a value that can't be met by any file, or when nothing is asked for.
    """

    max_drop: float | str | None = None
    max_size: int | str | None = None
    max_latency: float | str | None = None
    max_ram: int | str | None = None

    def __post_init__(self) -> None:
        """Check every value, and turn it into plain numbers."""
        if all(value is None for value in (self.max_drop, self.max_size, self.max_latency, self.max_ram)):
            raise ConfigError("no goal is given; pass at least one of `max_drop`, `max_size`, `max_latency`, `max_ram`")
        if self.max_drop is not None:
            object.__setattr__(self, "max_drop", parse_drop(self.max_drop))
        for name in ("max_size", "max_ram"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_size(getattr(self, name), name))
        if self.max_latency is not None:
            parse_latency(self.max_latency)

    def on(self, *, max_size: int | None, max_ram: int | None) -> Goals:
        """Return the goals with a device's sizes where the user sets none."""
        return replace(self, max_size=self.max_size or max_size, max_ram=self.max_ram or max_ram)

    @property
    def max_latency_ms(self) -> float | None:
        """The latency goal in milliseconds, if it is one."""
        return None if self.max_latency is None else parse_latency(self.max_latency)[0]

    @property
    def max_latency_factor(self) -> float | None:
        """The latency goal as a factor of the original's, if it is one."""
        return None if self.max_latency is None else parse_latency(self.max_latency)[1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` makes an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Goals:
        """Make goals from `to_dict`.

        Raises:
            ConfigError: For an unknown key.
        """
        known = list(cls.__dataclass_fields__)
        for key in data:
            if key not in known:
                raise ConfigError(f"goal `{key}` is not known; known are {', '.join(known)}{did_you_mean(key, known)}")
        return cls(**data)

    def judge(
        self,
        baseline: Mapping[str, Any],
        trial: Mapping[str, Any],
        higher_is_better: bool,
        upper_drop: float | None = None,
    ) -> list[Verdict]:
        """Compare a trial's measured figures with each goal.

        Args:
            baseline: The original's figures: ``accuracy``, ``latency_ms`` ...
            trial: The same of the file in question.
            higher_is_better: Whether the metric is better when higher.
            upper_drop: What the loss is at most with 95% confidence, where that is known.
        """
        verdicts = []
        if self.max_drop is not None and trial.get("accuracy") is not None and baseline.get("accuracy") is not None:
            drop = baseline["accuracy"] - trial["accuracy"]
            drop = drop if higher_is_better else -drop
            verdicts.append(Verdict.of("max_drop", float(self.max_drop), drop, "points", upper_drop))
        if self.max_size is not None:
            verdicts.append(Verdict.of("max_size", float(self.max_size), float(trial["size_bytes"]), "bytes"))
        if self.max_latency_ms is not None:
            verdicts.append(Verdict.of("max_latency", self.max_latency_ms, trial["latency_ms"]["p50"], "ms"))
        if self.max_latency_factor is not None:
            factor = trial["latency_ms"]["p50"] / (trial.get("baseline_p50_ms") or baseline["latency_ms"]["p50"])
            verdicts.append(Verdict.of("max_latency", self.max_latency_factor, factor, "times the original"))
        if self.max_ram is not None:
            verdicts.append(Verdict.of("max_ram", float(self.max_ram), float(trial["ram_bytes"]), "bytes"))
        return verdicts


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One goal and what was measured.

    Attributes:
        goal: Its name.
        limit: What was asked for.
        value: What was measured.
        unit: ``points`` (of the metric), ``bytes``, ``ms`` or ``times the original``.
        met: Whether the value is within the limit.
        upper: What the value is at most with 95% confidence, where samples are few enough to matter; else None.
    """

    goal: str
    limit: float
    value: float
    unit: str
    met: bool
    upper: float | None = None

    @classmethod
    def of(cls, goal: str, limit: float, value: float, unit: str, upper: float | None = None) -> Verdict:
        """Make the verdict; a drop may exceed its limit by rounding only."""
        return cls(goal=goal, limit=limit, value=value, unit=unit, met=value <= limit + 1e-9, upper=upper)

    @property
    def within_noise(self) -> bool:
        """Whether the limit is kept as measured, and more samples might show that it is not."""
        return self.met and self.upper is not None and self.upper > self.limit

    @property
    def excess(self) -> float:
        """How far beyond the limit, relative to it; 0 where met."""
        if self.met:
            return 0.0
        return (self.value - self.limit) / (0.01 if self.unit == "points" else self.limit)

    @property
    def text(self) -> str:
        """Say it in words."""
        if self.unit == "points":
            change = f"loss of {100 * self.value:.2f}" if self.value >= 0 else f"gain of {-100 * self.value:.2f}"
            sure = "" if self.upper is None else f" (with 95% confidence at most {100 * self.upper:.2f})"
            return f"{change} points{sure}, at most {100 * self.limit:.2f} lost"
        if self.unit == "bytes":
            what = "RAM" if self.goal == "max_ram" else "size"
            return f"{what} {self.value / 1000:,.1f} KB, at most {self.limit / 1000:,.1f} KB"
        if self.unit == "ms":
            return f"latency {self.value:.4g} ms, at most {self.limit:.4g} ms"
        return f"latency {self.value:.3g} times the original's, at most {self.limit:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the words included."""
        return {**asdict(self), "within_noise": self.within_noise, "text": self.text}
