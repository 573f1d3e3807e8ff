"""Schemes: which widths the file's weights and activations have, for the whole model or per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dwindle.errors import ConfigError, check_choice, did_you_mean

_WEIGHTS = (2, 4, 8, 16, 32)
_ACTIVATIONS = (8, 16, 32)
_BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Widths of a file.

    Attributes:
        name: What users type; made from the widths where it is left out.
        weights: Bits of the weights: 2, 4 or 8 (integers), 16 or 32 (floats).
        activations: Bits of the activations: 8 or 16 (integers on fixed ranges), 32 where they stay float.
        dynamic: Whether the runtime quantizes activations by itself, from each input; only with float activations.
        granularity: One weight scale per output ``"channel"``, per ``"tensor"``, or per block of 32, 64, 128 or 256
            inputs (fully connected layers with 2 or 4 bits and dynamic activations).
        power_of_two: Whether every scale is a power of two and every zero point 0, for fixed-point hardware.
        layers: ``(pattern, scheme)`` pairs for the layers or operators that differ; a later pair wins.

    Raises:
        ConfigError: For a combination of widths that LiteRT has no kernels for.
    """

    name: str = ""
    weights: int = 8
    activations: int = 32
    dynamic: bool = False
    granularity: str | int = "channel"
    power_of_two: bool = False
    layers: tuple[tuple[str, Scheme], ...] = ()

    def __post_init__(self) -> None:
        """Check the combination and make the name."""
        check_choice("weights", self.weights, _WEIGHTS)
        check_choice("activations", self.activations, _ACTIVATIONS)
        check_choice("granularity", self.granularity, ("channel", "tensor", *_BLOCKS))
        if self.weights >= 16 and (self.activations != 32 or self.dynamic or self.power_of_two):
            raise ConfigError(
                f"a scheme has float weights ({self.weights} bits) and integer activations or power-of-two steps; "
                "LiteRT needs integer weights for that (8, 4 or 2 bits)"
            )
        if self.dynamic and self.activations != 32:
            raise ConfigError(
                f"a scheme is dynamic and has activations of {self.activations} bits; dynamic activations are "
                "rounded by the runtime from float, so leave `activations` out"
            )
        if self.weights == 2 and not self.dynamic:
            raise ConfigError("2-bit weights run with dynamic activations only in LiteRT; add dynamic=True")
        if self.granularity in _BLOCKS and not (self.dynamic and self.weights < 8):
            raise ConfigError(
                f"granularity {self.granularity} (blocks) needs 2 or 4-bit weights and dynamic=True in LiteRT; "
                'use "channel"'
            )
        if not self.name:
            object.__setattr__(self, "name", self._described())

    def _described(self) -> str:
        if self.weights >= 16:
            return f"float{self.weights}"
        kind = "-dynamic" if self.dynamic else "-weights" if self.activations == 32 else f"-a{self.activations}"
        block = "" if self.granularity == "channel" else f"-{self.granularity}"
        return f"w{self.weights}{kind}{block}{'-pow2' if self.power_of_two else ''}"

    @property
    def own_needs_data(self) -> bool:
        """Whether this scheme itself, apart from its layers, has fixed activation ranges."""
        return self.activations < 32

    @property
    def needs_data(self) -> bool:
        """Whether activations have fixed ranges somewhere, which come from calibration data."""
        return self.own_needs_data or any(scheme.needs_data for _, scheme in self.layers)

    @property
    def is_static(self) -> bool:
        """Whether the model's own activations are integers, apart from layers that differ."""
        return self.own_needs_data

    @property
    def is_float(self) -> bool:
        """Whether no integer grid is involved."""
        return self.weights >= 16 and all(scheme.is_float for _, scheme in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        data = asdict(self)
        data["layers"] = [[pattern, scheme.to_dict()] for pattern, scheme in self.layers]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """Make the scheme from `to_dict`.

        Raises:
            ConfigError: For an unknown key.
        """
        known = set(cls.__dataclass_fields__)
        wrong = sorted(set(data) - known)
        if wrong:
            raise ConfigError(
                f"scheme has unknown keys {wrong}; known are {sorted(known)}{did_you_mean(wrong[0], known)}"
            )
        layers = tuple((pattern, cls.from_dict(inner)) for pattern, inner in data.get("layers", ()))
        return cls(**{**data, "layers": layers})


# What a file with integer activations takes and gives.
IO_TYPES = ("float32", "int8", "uint8", "int16")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="float32", weights=32),
        Scheme(name="float16", weights=16),
        Scheme(name="int8", weights=8, activations=8),
        Scheme(name="int8-dynamic", weights=8, dynamic=True),
        Scheme(name="int8-weights", weights=8),
        Scheme(name="int16x8", weights=8, activations=16),
        Scheme(name="int4", weights=4, activations=8),
        Scheme(name="int4-dynamic", weights=4, dynamic=True),
        Scheme(name="int2-dynamic", weights=2, dynamic=True),
        Scheme(name="pow2-8", weights=8, activations=8, power_of_two=True),
    )
}


def resolve_scheme(scheme: str | Scheme | Mapping[str, Any], argument: str = "scheme") -> Scheme:
    """Return the scheme of that name, or the one that a mapping from patterns to schemes stands for.

    Args:
        scheme: A name, a `Scheme`, or a mapping such as ``{"*": "int8", "conv_3": "int16x8"}``. Patterns are
            shell-style and match layer names or LiteRT operator names (``CONV_2D``); a later one wins; layers that
            none matches stay float32.
        argument: What the user calls it.

    Raises:
        ConfigError: If there is none of that name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, Mapping):
        if not scheme:
            raise ConfigError(f"`{argument}` is an empty mapping; give it patterns and schemes, or a scheme's name")
        pairs = [(str(pattern), resolve_scheme(inner, f"{argument}[{pattern!r}]")) for pattern, inner in scheme.items()]
        base = SCHEMES["float32"]
        if pairs[0][0] == "*":
            base, pairs = pairs[0][1], pairs[1:]
        return replace(base, name=f"{base.name}+layers" if pairs else base.name, layers=tuple(pairs))
    if isinstance(scheme, str) and scheme.startswith("float8"):
        raise ConfigError(f"`{argument}` is {scheme!r}; LiteRT has no float8, use `float16`, `int8` or `int8-weights`")
    check_choice(argument, scheme, SCHEMES)
    return SCHEMES[scheme]


def for_layers(scheme: Scheme, patterns: Any) -> Scheme:
    """Return the scheme that applies ``scheme`` to the layers that match and leaves the rest in float32."""
    if patterns is None:
        return scheme
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    return replace(SCHEMES["float32"], name=f"{scheme.name}+layers", layers=tuple((p, scheme) for p in listed))
