"""Schedules: which sparsity a weight has after how many training steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import keras

from dwindle.errors import ConfigError


class Schedule(Protocol):
    """The fraction of the target sparsity that is due at a training step."""

    @property
    def last_step(self) -> int:
        """The last step at which masks change."""
        ...

    def fraction(self, step: Any) -> Any:
        """Return the share of the target, in [0, 1], at a step (an integer tensor, counted from 0)."""
        ...

    def is_due(self, step: Any) -> Any:
        """Return a boolean tensor: whether masks are made anew at this step."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the schedule's kind."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The whole target at step ``begin``, and the same mask from then on.

    Args:
        begin: Training step, from 0, at which weights are removed.
    """

    begin: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.begin < 0:
            raise ConfigError(f"`begin` of the schedule is {self.begin}; it must be a training step, 0 or more")

    @property
    def last_step(self) -> int:
        """The last step at which masks change."""
        return self.begin

    def fraction(self, step: Any) -> Any:
        """Return 0 before ``begin`` and 1 from then on."""
        return keras.ops.cast(step >= self.begin, "float32")

    def is_due(self, step: Any) -> Any:
        """Whether this is the one step at which the mask is made."""
        return keras.ops.equal(step, self.begin)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"kind": "constant", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class PolynomialDecay:
    """Sparsity rises fast at first and slowly at the end.

    ``s(t) = s_f (1 - (1 - f_0) (1 - (t - t_0) / (t_1 - t_0))^p)`` for ``t_0 <= t <= t_1``, with ``f_0 = s_i / s_f``.

    Args:
        begin: First step ``t_0``.
        end: Step ``t_1`` at which the target is reached.
        initial_fraction: ``f_0``, the share of the target that is removed at ``t_0``, in [0, 1].
        power: Exponent ``p``.
        frequency: Steps between two masks.

    References:
        Zhu and Gupta 2017, To prune, or not to prune, arXiv 1710.01878, equation 1.
    """

    begin: int = 0
    end: int
    initial_fraction: float = 0.0
    power: float = 3.0
    frequency: int = 50

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.begin < self.end:
            raise ConfigError(
                f"`begin` is {self.begin} and `end` is {self.end}; they must be training steps, 0 <= begin < end"
            )
        if not 0 <= self.initial_fraction <= 1:
            raise ConfigError(f"`initial_fraction` is {self.initial_fraction}; it must lie in [0, 1]")
        if self.power <= 0 or self.frequency < 1:
            raise ConfigError(
                f"`power` is {self.power} and `frequency` is {self.frequency}; they must be above 0 and at least 1"
            )

    @property
    def last_step(self) -> int:
        """The last step at which masks change."""
        return self.end

    def fraction(self, step: Any) -> Any:
        """Return the share of the target at a step."""
        ops = keras.ops
        done = ops.clip((ops.cast(step, "float32") - self.begin) / (self.end - self.begin), 0.0, 1.0)
        share = 1.0 - (1.0 - self.initial_fraction) * ops.power(1.0 - done, self.power)
        return ops.where(step < self.begin, ops.zeros_like(share), share)

    def is_due(self, step: Any) -> Any:
        """Whether masks are made anew: every ``frequency`` steps from ``begin``, and at ``end``."""
        ops = keras.ops
        inside = ops.logical_and(step >= self.begin, step <= self.end)
        on_beat = ops.equal((step - self.begin) % self.frequency, 0)
        return ops.logical_and(inside, ops.logical_or(on_beat, ops.equal(step, self.end)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"kind": "polynomial", **asdict(self)}


_KINDS: dict[str, type[Constant] | type[PolynomialDecay]] = {
    "constant": Constant,
    "polynomial": PolynomialDecay,
}


def schedule_from_dict(data: dict[str, Any]) -> Schedule:
    """Make a schedule from its ``to_dict``."""
    config = dict(data)
    kind = config.pop("kind", None)
    if kind not in _KINDS:
        raise ConfigError(f"`kind` of the schedule is {kind!r}; known are {sorted(_KINDS)}")
    try:
        return _KINDS[kind](**config)
    except TypeError as error:
        raise ConfigError(f"schedule {kind!r}: {error}") from None
