"""Numbers as people read them. 1 KB is 1000 bytes."""

from __future__ import annotations


def format_bytes(count: float | None) -> str:
    """Return ``33,056`` bytes as ``33.1 KB``."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{significant(count / size)} {unit}"
    return f"{int(count)} B"


def format_ms(value: float | None) -> str:
    """Return milliseconds, in microseconds below 0.1 ms."""
    if value is None:
        return "–"
    return f"{significant(value * 1000)} µs" if value < 0.1 else f"{significant(value)} ms"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with three significant digits, never in exponents."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text else text


def format_metric(value: float | None, name: str = "accuracy") -> str:
    """Return an accuracy in percent, any other metric as a number."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}%" if "accuracy" in name else significant(value, 4)


def times(before: float | None, after: float | None, better: str, worse: str) -> str:
    """Return ``52x smaller`` or ``1.3x larger`` from two positive figures."""
    if not before or not after:
        return "–"
    factor = before / after
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{significant(factor)}x {better}" if factor > 1 else f"{significant(1 / factor)}x {worse}"
