"""Goals: what the user needs of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dwindle.errors import ConfigError, check_choice, did_you_mean
from dwindle.units import number_in, parse_drop, parse_size

LIMITS = ("max_drop", "max_relative_drop", "max_size", "max_packed", "max_latency", "max_ram")
LATENCIES = ("p50", "p90")
# Quantile of the normal distribution for one-sided 99%: what is picked is the best of dozens of trials.
_SURE = 2.3263478740408408
# Bytes up to which names and metadata count: of a file that is asked for, and of an original that is to get small.
SMALL_FILE, SMALL_MODEL = 100_000, 2_000_000
# What a file counts for, times its size, whose convolutions have kernels that take four to five times as long.
SLOW_KERNELS = 4
# What can be made small among the files that meet the goals.
COSTS = ("size", "packed", "latency", "ram", "drop")


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
        max_relative_drop: The same as a share of the original's metric, for metrics of any size: 0.02 or ``"2%"``.
        max_size: Largest size of the file: bytes or ``"45KB"`` (1 KB = 1000 bytes).
        max_packed: Largest size packed by `dwindle.packing.pack`, as it is sent or kept in flash: bytes or ``"8KB"``.
        max_latency: Largest latency: milliseconds, ``"2ms"``, or a factor of the original's, ``"0.5x"``.
        max_ram: Largest RAM while it runs: bytes or ``"64KB"``.
        latency: Which latency is meant: ``"p50"``, the median, or ``"p90"``.
        minimize: What is to be small among the files that meet all this: ``"size"``, ``"packed"``, ``"latency"``,
            ``"ram"`` or ``"drop"``. None: the size, where convolutions of fewer than 8 bits, which LiteRT runs
            slowly, count for four times as many bytes; the drop where no limit is set to it.

    Raises:
        ConfigError: For a value that can't be met by any file, or when nothing is asked for.
    """

    max_drop: float | str | None = None
    max_relative_drop: float | str | None = None
    max_size: int | str | None = None
    max_packed: int | str | None = None
    max_latency: float | str | None = None
    max_ram: int | str | None = None
    latency: str = "p50"
    minimize: str | None = None

    def __post_init__(self) -> None:
        """Check every value, and turn it into plain numbers."""
        if all(getattr(self, name) is None for name in LIMITS):
            raise ConfigError(f"no goal is given; pass at least one of {', '.join(f'`{name}`' for name in LIMITS)}")
        check_choice("latency", self.latency, LATENCIES)
        if self.minimize is not None:
            check_choice("minimize", self.minimize, COSTS)
        for name in ("max_drop", "max_relative_drop"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_drop(getattr(self, name), name))
        for name in ("max_size", "max_packed", "max_ram"):
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

    @property
    def limits_drop(self) -> bool:
        """Whether a limit is set to the loss of the metric."""
        return self.max_drop is not None or self.max_relative_drop is not None

    @property
    def minimized(self) -> str:
        """What is to be small among the files that meet the goals, one of `COSTS`."""
        return self.minimize or ("size" if self.limits_drop else "drop")

    @property
    def needs_packed(self) -> bool:
        """Whether packed sizes matter, which take time to find."""
        return self.max_packed is not None or self.minimized == "packed"

    def compacts(self, baseline: Mapping[str, Any]) -> bool:
        """Whether files are written without names and metadata: where bytes are asked for, and kilobytes count."""
        if self.max_size is not None:
            return float(self.max_size) <= SMALL_FILE
        return self.minimized == "size" and baseline["size_bytes"] <= SMALL_MODEL

    def loss(self, baseline: Mapping[str, Any], trial: Mapping[str, Any], higher_is_better: bool) -> float | None:
        """Return how much worse the metric of a trial is than the original's; None without labels."""
        before, after = baseline.get("accuracy"), trial.get("accuracy")
        if before is None or after is None:
            return None
        return float(before - after if higher_is_better else after - before)

    def allowed_loss(self, baseline: Mapping[str, Any]) -> float | None:
        """Return the largest loss of the metric that is accepted, absolute; None where no limit is set to it."""
        limits = [] if self.max_drop is None else [float(self.max_drop)]
        if self.max_relative_drop is not None:
            limits.append(float(self.max_relative_drop) * abs(float(baseline.get("accuracy") or 0.0)))
        return min(limits) if limits else None

    def cautious(
        self, baseline: Mapping[str, Any], trial: Mapping[str, Any], higher_is_better: bool
    ) -> Mapping[str, Any]:
        """Return a trial's figures with the metric that it has with 99% confidence, for picking between trials.

        The file that just keeps a limit on the samples that picked it is one that was lucky there, and more likely than
        not to miss it elsewhere. Three quarters of the limit are the most that is taken off, so that strict limits can
        be met on few samples.

        Args:
            baseline: The original's figures.
            trial: The trial's, with ``loss_error``, the standard error of its loss, where that is known.
            higher_is_better: Whether the metric is.
        """
        margin = self.margin(baseline, trial.get("loss_error"))
        if margin == 0 or trial.get("accuracy") is None:
            return trial
        return {**trial, "accuracy": trial["accuracy"] + (-margin if higher_is_better else margin)}

    def margin(self, baseline: Mapping[str, Any], loss_error: float | None) -> float:
        """Return what is taken off the limit on the loss for the chance of samples, absolute; 0 without a limit."""
        allowed = self.allowed_loss(baseline)
        return 0.0 if allowed is None or loss_error is None else min(_SURE * loss_error, 0.75 * allowed)

    def cost(self, baseline: Mapping[str, Any], trial: Mapping[str, Any], higher_is_better: bool) -> float:
        """Return what is to be small of a trial's measured figures: bytes, milliseconds, or points.

        Where the user did not say what, files with slow kernels count as larger: people want small and fast ones, and
        these save some bytes and take several times as long. Measured times are not weighed, since they vary, and the
        same seed is to find the same file.
        """
        kind = self.minimized
        if kind == "drop":
            loss = self.loss(baseline, trial, higher_is_better)
            return float(trial["size_bytes"]) if loss is None else loss
        if kind == "latency":
            return float(trial["latency_ms"][self.latency])
        counted = SLOW_KERNELS if self.minimize is None and trial.get("slow_kernels") else 1
        return counted * float(trial[{"size": "size_bytes", "packed": "packed_bytes", "ram": "ram_bytes"}[kind]])

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
        loss = self.loss(baseline, trial, higher_is_better)
        if self.max_drop is not None and loss is not None:
            verdicts.append(Verdict.of("max_drop", float(self.max_drop), loss, "points", upper_drop))
        if self.max_relative_drop is not None and loss is not None:
            share = loss / max(abs(float(baseline["accuracy"])), 1e-12)
            verdicts.append(Verdict.of("max_relative_drop", float(self.max_relative_drop), share, "share"))
        for name, key in (("max_size", "size_bytes"), ("max_packed", "packed_bytes"), ("max_ram", "ram_bytes")):
            limit = getattr(self, name)
            if limit is not None:
                verdicts.append(Verdict.of(name, float(limit), float(trial[key]), "bytes"))
        took = trial["latency_ms"][self.latency]
        if self.max_latency_ms is not None:
            verdicts.append(Verdict.of("max_latency", self.max_latency_ms, took, "ms"))
        if self.max_latency_factor is not None:
            own = {"p50": trial.get("baseline_p50_ms"), "p90": trial.get("baseline_p90_ms")}[self.latency]
            factor = took / (own or baseline["latency_ms"][self.latency])
            verdicts.append(Verdict.of("max_latency", self.max_latency_factor, factor, "times the original"))
        return verdicts


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One goal and what was measured.

    Attributes:
        goal: Its name.
        limit: What was asked for.
        value: What was measured.
        unit: ``points`` (of the metric), ``share`` (of the original's metric), ``bytes``, ``ms`` or ``times the
            original``.
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
        return (self.value - self.limit) / (0.01 if self.unit in ("points", "share") else self.limit)

    @property
    def text(self) -> str:
        """Say it in words."""
        if self.unit == "points":
            change = f"loss of {100 * self.value:.2f}" if self.value >= 0 else f"gain of {-100 * self.value:.2f}"
            sure = ""
            if self.upper is not None:
                bound = (
                    f"at least {-100 * self.upper:.2f} gained"
                    if self.upper < 0
                    else f"at most {100 * self.upper:.2f} lost"
                )
                sure = f" (with 95% confidence {bound})"
            return f"{change} points{sure}, at most {100 * self.limit:.2f} lost"
        if self.unit == "share":
            change = "worse" if self.value >= 0 else "better"
            return f"metric {abs(self.value):.2%} {change}, at most {self.limit:.2%} worse"
        if self.unit == "bytes":
            what = {"max_ram": "RAM", "max_packed": "packed size"}.get(self.goal, "size")
            return f"{what} {self.value / 1000:,.1f} KB, at most {self.limit / 1000:,.1f} KB"
        if self.unit == "ms":
            return f"latency {self.value:.4g} ms, at most {self.limit:.4g} ms"
        return f"latency {self.value:.3g} times the original's, at most {self.limit:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the words included."""
        return {**asdict(self), "within_noise": self.within_noise, "text": self.text}
