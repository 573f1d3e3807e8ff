"""Schemes: which widths the file's weights and activations have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dwindle.errors import ConfigError, check_choice, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Widths of a file.

    Attributes:
        name: What users type.
        weights: Bits of the weights.
        activations: Bits of the activations; 32 where they stay float.
        dynamic: Whether the runtime quantizes activations by itself, from each input.
    """

    name: str
    weights: int
    activations: int = 32
    dynamic: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether activations have fixed ranges, which come from calibration data."""
        return self.activations < 32

    @property
    def is_float(self) -> bool:
        """Whether no integer grid is involved."""
        return self.weights >= 16 and self.activations == 32

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Make the scheme from `to_dict`.

        Raises:
            ConfigError: For an unknown key.
        """
        try:
            return cls(**data)
        except TypeError:
            known = set(cls.__dataclass_fields__)
            wrong = sorted(set(data) - known)
            raise ConfigError(
                f"scheme has unknown keys {wrong}; known are {sorted(known)}"
                + (did_you_mean(wrong[0], known) if wrong else "")
            ) from None


# What a file with integer activations takes and gives.
IO_TYPES = ("float32", "int8")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="float32", weights=32),
        Scheme(name="float16", weights=16),
        Scheme(name="int8", weights=8, activations=8),
        Scheme(name="int8-dynamic", weights=8, dynamic=True),
    )
}


def resolve_scheme(scheme: str | Scheme, argument: str = "scheme") -> Scheme:
    """Return the scheme of that name.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(scheme, Scheme):
        return scheme
    check_choice(argument, scheme, SCHEMES)
    return SCHEMES[scheme]
