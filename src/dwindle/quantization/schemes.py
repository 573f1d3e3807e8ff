"""Schemes: which widths the file's weights and activations have, for the whole model or per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        power_of_two: Whether every scale is a power of two and every zero point 0, for fixed-point hardware; not with
            16-bit activations.
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
        if self.weights >= 16 and self.granularity != "channel":
            raise ConfigError(
                f"a scheme has float weights ({self.weights} bits) and granularity {self.granularity!r}; floats have "
                "no scales, leave `granularity` out"
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
        if self.power_of_two and (self.activations == 16 or self.granularity in _BLOCKS):
            what = "16-bit activations" if self.activations == 16 else f"blocks of {self.granularity} inputs"
            raise ConfigError(
                f"a scheme has power-of-two steps and {what}; they come with 8-bit, float or dynamic activations and "
                'granularity "channel" or "tensor"'
            )
        self._check_layers()
        if not self.name:
            object.__setattr__(self, "name", self._described())

    def _check_layers(self) -> None:
        pairs = self.layers if isinstance(self.layers, tuple | list) else None
        if pairs is None or not all(
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Scheme)
            for pair in pairs
        ):
            raise ConfigError(f"`layers` of a scheme is {self.layers!r}; it must be (pattern, Scheme) pairs")
        for pattern, inner in pairs:
            if inner.layers:
                raise ConfigError(
                    f"the scheme of the layers {pattern!r} has layers of its own ({inner.name}); list every pattern in "
                    "one mapping, where a later one wins"
                )
        object.__setattr__(self, "layers", tuple((pattern, inner) for pattern, inner in pairs))

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
        try:
            layers = tuple((pattern, cls.from_dict(inner)) for pattern, inner in data.get("layers", ()))
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"scheme has the layers {data['layers']!r}; they must be [pattern, scheme] pairs"
            ) from None
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
        hidden = (
            [pattern for pattern, _ in pairs[: [pattern for pattern, _ in pairs].index("*")]] if "*" in scheme else []
        )
        if hidden:
            raise ConfigError(
                f"`{argument}` has '*' after {hidden[0]!r}, and a later pattern wins; put '*' first: it is for the rest"
            )
        base = SCHEMES["float32"]
        if pairs[0][0] == "*":
            base, pairs = pairs[0][1], pairs[1:]
        return with_layers(base, pairs)
    if isinstance(scheme, str) and scheme.lower().startswith(("float8", "fp8")):
        raise ConfigError(
            f"`{argument}` is {scheme!r}; LiteRT has no float8, use `float16`, `int8` or `int8-weights`; a SavedModel "
            "folder (export to a path without `.tflite`) holds `float8-e4m3` and `float8-e5m2`"
        )
    check_choice(argument, scheme, SCHEMES)
    return SCHEMES[scheme]


def with_layers(scheme: Scheme, pairs: Sequence[tuple[str, Scheme]]) -> Scheme:
    """Return the scheme with more layers that differ, behind those that it has."""
    if not pairs:
        return scheme
    name = scheme.name if scheme.layers else f"{scheme.name}+layers"
    return replace(scheme, name=name, layers=(*scheme.layers, *pairs))


def without_layers(scheme: Scheme) -> Scheme:
    """Return what the scheme says of the layers that no pattern of its own matches."""
    return replace(scheme, name=scheme.name.removesuffix("+layers"), layers=()) if scheme.layers else scheme


def for_layers(scheme: Scheme, patterns: str | Sequence[str] | None) -> Scheme:
    """Return the scheme that applies ``scheme`` to the layers that match and leaves the rest in float32.

    Raises:
        ConfigError: If the patterns are none or no names, or ``scheme`` has layers of its own.
    """
    if patterns is None:
        return scheme
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(p, str) for p in listed):
        raise ConfigError(f"`layers` is {patterns!r}; it must be a name or pattern, or a list of them, such as 'conv*'")
    if scheme.layers:
        raise ConfigError(
            f"`layers` is {patterns!r} and `scheme` is a mapping; put the patterns into the mapping, such as "
            "{'conv*': 'int8'}, and leave `layers` out"
        )
    return replace(with_layers(SCHEMES["float32"], [(p, scheme) for p in listed]), name=f"{scheme.name}+layers")
