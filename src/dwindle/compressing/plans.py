"""Plans: the ordered steps that make one candidate file; plain data that a person can read and edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, did_you_mean
from dwindle.quantization.schemes import SCHEMES

# Each step and the options that it takes, with their defaults. `dwindle.compressing.steps` does them.
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "shrink": {"width": 0.5, "depth": 1.0, "start": "random", "multiple": 1},
    "prune": {
        "sparsity": 0.8,
        "structure": "element",
        "scope": "layer",
        "criterion": "magnitude",
        "target": "channels",
        "multiple": 1,
    },
    "factorize": {"energy": 0.9},
    "cluster": {"clusters": 16, "init": "kmeans", "per_channel": False},
    "quantize": {"scheme": "int8"},
    "train": {"epochs": 1, "learning_rate": 1e-3, "temperature": 4.0, "alpha": 0.5, "shift": 0.0},
    "export": {"scheme": "int8", "compact": False},
}

# What goes without saying where a plan is told in words.
_UNSAID = {"compact": False, "shift": 0.0, "multiple": 1}


def schemes_in(scheme: Any) -> list[Any]:
    """Return the names of schemes that a step's ``scheme`` has: its own, or those of a mapping's layers."""
    if isinstance(scheme, Mapping):
        return list(scheme.values())
    return [] if scheme is None else [scheme]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A named list of steps.

    Args:
        name: What it is, in words.
        steps: ``(step, options)`` pairs, the last one ``export``.

    Raises:
        ConfigError: For an unknown step or option, or a list that does not end in ``export``.
    """

    name: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]

    def __post_init__(self) -> None:
        """Check every step and fill defaults in."""
        if not self.steps or self.steps[-1][0] != "export":
            raise ConfigError(f"plan `{self.name}` must end in the step `export`")
        filled = []
        for step, options in self.steps:
            if step not in STEP_OPTIONS:
                raise ConfigError(
                    f"plan `{self.name}` has step `{step}`; known are {', '.join(STEP_OPTIONS)}"
                    f"{did_you_mean(step, STEP_OPTIONS)}"
                )
            known = STEP_OPTIONS[step]
            for key in options:
                if key not in known:
                    raise ConfigError(
                        f"step `{step}` of plan `{self.name}` has option `{key}`; known are {', '.join(known)}"
                        f"{did_you_mean(key, known)}"
                    )
            for one in schemes_in(options.get("scheme")):
                if not isinstance(one, str) or one not in SCHEMES:
                    raise ConfigError(
                        f"step `{step}` of plan `{self.name}` has scheme {one!r}; known are {', '.join(SCHEMES)}, or a "
                        f"mapping from layers or operators to these{did_you_mean(str(one), SCHEMES)}"
                    )
            given = {key: _checked(value, known[key], f"step `{step}` of plan `{self.name}` has `{key}`")
                     for key, value in options.items()}  # fmt: skip
            filled.append((step, {**known, **given}))
        object.__setattr__(self, "steps", tuple(filled))

    @property
    def trains(self) -> bool:
        """Whether a step needs training data."""
        return any(step == "train" for step, _ in self.steps)

    def words(self) -> list[str]:
        """Return each step in words; what is off is left out."""
        told = [
            [f"{name}={_short(value)}" for name, value in options.items() if value != _UNSAID.get(name)]
            for _, options in self.steps
        ]
        return [" ".join([step, *options]) for (step, _), options in zip(self.steps, told, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` makes an equal plan."""
        return {"version": 1, "name": self.name, "steps": [{step: dict(options)} for step, options in self.steps]}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Make a plan from `to_dict`'s result, as read from YAML.

        Raises:
            ConfigError: If it has another form.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("steps"), list):
            raise ConfigError("a plan must be a mapping with `name` and a list of `steps`")
        if data.get("version", 1) != 1:
            raise ConfigError(f"the plan has version {data['version']!r}; this dwindle reads version 1")
        steps = []
        for entry in data["steps"]:
            if not isinstance(entry, Mapping) or len(entry) != 1:
                raise ConfigError(
                    f"a step must be one name with its options, such as `export: {{scheme: int8}}`; found {entry!r}"
                )
            step, options = next(iter(entry.items()))
            if options is not None and not isinstance(options, Mapping):
                raise ConfigError(f"the options of step `{step}` are {options!r}; they must be a mapping")
            steps.append((str(step), dict(options or {})))
        return cls(name=str(data.get("name", "plan")), steps=tuple(steps))

    def to_yaml(self) -> str:
        """Return the plan as YAML text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a YAML file.

    Raises:
        ConfigError: If it can't be read, or is no plan.
    """
    import yaml

    try:
        return Plan.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"plan `{path}` can't be read: {' '.join(str(error).split())[:200]}") from None


def _checked(value: Any, default: Any, what: str) -> Any:
    """Return the value of an option, which is of its default's kind; what it may be beyond that, its step checks.

    Raises:
        ConfigError: If it is of another kind.
    """
    if isinstance(default, bool) or not isinstance(default, int | float):
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{what} {value!r}; it must be true or false")
        return value
    whole = isinstance(default, int)
    try:
        number = float(value)  # YAML takes 1e-3, without a point, for a word
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (whole and number != int(number)):
        raise ConfigError(f"{what} {value!r}; it must be a {'whole ' if whole else ''}number, such as {default}")
    return int(number) if whole else number if isinstance(value, str) else value


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{pattern}:{scheme}" for pattern, scheme in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
