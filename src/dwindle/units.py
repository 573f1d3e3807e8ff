"""Sizes and losses as users write them."""

from __future__ import annotations

import re

from dwindle.errors import ConfigError

_BYTES = {"": 1, "b": 1, "kb": 1000, "k": 1000, "mb": 10**6, "m": 10**6, "gb": 10**9, "kib": 1024, "mib": 2**20}


def parse_size(value: str | float, name: str = "max_size") -> int:
    """Return bytes from ``45000``, ``"45KB"`` (1 KB = 1000 bytes) or ``"44KiB"``.

    Raises:
        ConfigError: If it is no size above 0.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
        unit = found.group(2).lower() if found else ""
        number = number_in(found.group(1)) if found else None
        if number is None or unit not in _BYTES:
            raise ConfigError(f"`{name}` is {value!r}; it must be a size above 0, such as 45KB, 1.5MB or 44KiB")
        value = number * _BYTES[unit]
    if not value > 0 or value == float("inf"):
        raise ConfigError(f"`{name}` is {value!r}; it must be a size above 0 bytes, such as 45KB")
    return int(value)


def parse_drop(value: str | float, name: str = "max_drop") -> float:
    """Return a loss as a fraction from ``0.005`` or ``"0.5%"``.

    Raises:
        ConfigError: If it does not lie in [0, 1).
    """
    given = value
    if isinstance(value, str):
        text = value.strip()
        number = number_in(text.removesuffix("%"))
        if number is None:
            raise ConfigError(f"`{name}` is {given!r}; it must be a drop such as 0.5% or 0.005")
        value = number / 100 if text.endswith("%") else number
    if not 0 <= value < 1:
        raise ConfigError(f"`{name}` is {given!r}; it must be at least 0 and below 100%, such as 0.5% (or 0.005)")
    return float(value)


def number_in(text: str) -> float | None:
    """Return the number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def parse_duration(value: str | float, name: str) -> float:
    """Return seconds, from a number of them or ``"90s"``, ``"20m"``, ``"1.5h"``.

    Raises:
        ConfigError: If it is no time above 0.
    """
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(s|m|min|h)?\s*", str(value))
    number = number_in(found.group(1)) if found else None
    if found is None or number is None or not 0 < number < float("inf"):
        raise ConfigError(f"`{name}` is {value!r}; it must be a time above 0, such as 90s, 20m or 1h")
    return float(number) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found.group(2) or "s"]
