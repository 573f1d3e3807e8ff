"""Schedules: which share of the target sparsity a weight has after how many training steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The training steps at which masks change, and the share of the target that is due at each.

    Steps are counted from 0. Masks change at ``begin``, every ``beat`` steps after it, and at ``last_step``.
    """

    kind: ClassVar[str]
    begin: int = 0
    regrow: float = 0.0

    @property
    def last_step(self) -> int:
        """The last step at which masks change."""
        return self.begin

    @property
    def beat(self) -> int:
        """Steps between two changes."""
        return 1

    def share(self, steps: np.ndarray) -> np.ndarray:
        """Return the share of the target, in [0, 1], at steps from ``begin`` on."""
        return np.ones(steps.shape)

    def steps(self) -> np.ndarray:
        """Return every step at which masks change, in order."""
        return np.unique(np.append(np.arange(self.begin, self.last_step + 1, self.beat), self.last_step))

    def swapped(self) -> np.ndarray:
        """Return the fraction of kept weights that regrowth exchanges at each of `steps`: `regrow`, then less."""
        done = (self.steps() - self.begin) / max(1, self.last_step - self.begin)
        return np.asarray(self.regrow / 2 * (1 + np.cos(np.pi * done)))

    def is_due(self, step: Any) -> Any:
        """Return a boolean tensor: whether masks change at a step, an integer tensor."""
        ops = keras.ops
        if self.last_step == self.begin:
            return ops.equal(step, self.begin)
        inside = ops.logical_and(step >= self.begin, step <= self.last_step)
        if self.beat == 1:
            return inside
        on_beat = ops.equal((step - self.begin) % self.beat, 0)
        return ops.logical_and(inside, ops.logical_or(on_beat, ops.equal(step, self.last_step)))

    def number(self, step: Any) -> Any:
        """Return which of `steps` a step is, an integer tensor; clipped where it is none."""
        ops = keras.ops
        inside = ops.clip(step, self.begin, self.last_step) - self.begin
        return inside if self.beat == 1 else ops.floor_divide(inside + (self.beat - 1), self.beat)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the schedule's kind."""
        return {"kind": self.kind, **asdict(self)}

    def _check(self) -> None:
        for name in ("begin", "end", "frequency"):
            value = getattr(self, name, 1)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"`{name}` of the schedule is {value!r}; it must be a whole number of training steps")
        if self.begin < 0:
            raise ConfigError(f"`begin` of the schedule is {self.begin}; it must be a training step, 0 or more")
        if not 0 <= self.regrow < 1:
            raise ConfigError(
                f"`regrow` of the schedule is {self.regrow}; it must be a fraction in [0, 1), such as 0.3"
            )


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The whole target at step ``begin``, and the same mask from then on.

    With ``regrow`` it is training at a constant sparsity: every ``frequency`` steps until ``end``, the fraction
    ``regrow/2 (1 + cos(pi (t - t_0) / (t_1 - t_0)))`` of the kept weights goes, and as many removed ones come back, as
    zeros: those with the largest gradient.

    Args:
        begin: Training step ``t_0``, from 0, at which weights are removed.
        end: With ``regrow``, the step ``t_1`` of the last exchange.
        frequency: With ``regrow``, steps between two exchanges.
        regrow: Fraction of kept weights that the first exchange swaps, in [0, 1); the paper's is 0.3.

    References:
        Evci et al. 2020, Rigging the Lottery, arXiv 1911.11134, section 3. There the gradient is that of the batch at
        the exchange; here it is that of the step before.
    """

    kind: ClassVar[str] = "constant"
    end: int | None = None
    frequency: int = 100

    def __post_init__(self) -> None:
        """Check the values."""
        self._check()
        if self.regrow and (self.end is None or self.end <= self.begin or self.frequency < 1):
            raise ConfigError(
                f"`regrow` needs `end` above `begin` and `frequency` of 1 or more; they are {self.end} and "
                f"{self.frequency}"
            )
        if self.end is not None and not self.regrow:
            raise ConfigError(f"`end` is {self.end}, but a constant schedule ends only with `regrow`; leave it out")

    @property
    def last_step(self) -> int:
        """The last step at which masks change."""
        return self.begin if self.end is None else self.end

    @property
    def beat(self) -> int:
        """Steps between two changes."""
        return self.frequency


@dataclass(frozen=True, kw_only=True)
class PolynomialDecay(Schedule):
    """Sparsity rises fast at first and slowly at the end.

    ``s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^p`` for ``t_0 <= t <= t_1``, with ``s_i = f_0 s_f``; the
    number of weights removed is ``round(s(t) n)``.

    Args:
        begin: First step ``t_0``.
        end: Step ``t_1`` at which the target is reached.
        initial_fraction: ``f_0``, the share of the target that is removed at ``t_0``, in [0, 1].
        power: Exponent ``p``.
        frequency: Steps between two masks.
        regrow: Fraction of the kept weights that are exchanged at ``t_0`` for removed ones with a large gradient, in
            [0, 1), and less from then on; see `Constant`. 0: what was removed stays removed.

    References:
        Zhu and Gupta 2017, To prune, or not to prune, arXiv 1710.01878, equation 1.
    """

    kind: ClassVar[str] = "polynomial"
    end: int
    initial_fraction: float = 0.0
    power: float = 3.0
    frequency: int = 50

    def __post_init__(self) -> None:
        """Check the values."""
        self._check()
        if not self.begin < self.end:
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

    @property
    def beat(self) -> int:
        """Steps between two changes."""
        return self.frequency

    def share(self, steps: np.ndarray) -> np.ndarray:
        """Return the share of the target at steps from ``begin`` on."""
        done = np.clip((steps - self.begin) / (self.end - self.begin), 0.0, 1.0)
        return np.asarray(1.0 - (1.0 - self.initial_fraction) * (1.0 - done) ** self.power)


# Every schedule that can be saved; a new one adds one line.
SCHEDULES: dict[str, type[Constant] | type[PolynomialDecay]] = {
    "constant": Constant,
    "polynomial": PolynomialDecay,
}


def schedule_from_dict(data: Mapping[str, Any]) -> Schedule:
    """Make a schedule from its ``to_dict``.

    Raises:
        ConfigError: For a kind that is not known, or a value out of range.
    """
    config = dict(data)
    kind = config.pop("kind", None)
    if kind not in SCHEDULES:
        raise ConfigError(
            f"`kind` of the schedule is {kind!r}; known are {sorted(SCHEDULES)}{did_you_mean(kind, SCHEDULES)}"
        )
    try:
        return SCHEDULES[kind](**config)
    except TypeError as error:
        raise ConfigError(f"schedule {kind!r}: {error}") from None
