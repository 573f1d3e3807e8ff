"""Temperatures that change while a student trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras

from dwindle.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Annealed:
    """A temperature that goes from ``start`` to ``end`` in a straight line over the first ``steps`` steps.

    ``T = start + (end - start) min(1, step / steps)``.

    Attributes:
        steps: Training steps (batches), above 0.
        start: Above 0.
        end: Above 0.

    References:
        Jafari et al. 2021, Annealing Knowledge Distillation, arXiv 2104.07163, who go down to 1.
    """

    steps: int
    start: float = 10.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "start", "end"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigError(f"`{name}` of Annealed is {value!r}; it must be above 0")

    def at(self, step: Any) -> Any:
        """Return the temperature at a step, a number or a tensor."""
        ops = keras.ops
        share = ops.minimum(ops.cast(step, "float32") / float(self.steps), 1.0)
        return self.start + (self.end - self.start) * share

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `resolve_temperature` makes an equal object."""
        return asdict(self)


def resolve_temperature(value: Any) -> float | Annealed:
    """Return the temperature that a number, a dict or an object stands for.

    Raises:
        ConfigError: If it is not above 0.
    """
    if isinstance(value, Annealed):
        return value
    if isinstance(value, Mapping):
        return Annealed(**value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"`temperature` is {value!r}; it must be above 0, such as 4.0, or an Annealed")
    return float(value)
