"""Axis lengths that are not known yet, such as the number of samples, and what graphs compute with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError

BATCH = "batch"


@dataclass(frozen=True)
class Size:
    """A factor times unknown lengths, such as ``4 * batch``.

    Attributes:
        factor: The known part.
        names: The unknown ones, sorted; one that counts twice is there twice.
    """

    factor: Fraction
    names: tuple[str, ...]

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Size):
            return size(self.factor * other.factor, (*self.names, *other.names))
        return size(self.factor * _fraction(other), self.names)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        names = list(self.names)
        if isinstance(other, Size):
            for name in other.names:
                if name not in names:
                    raise ValueError(f"{self} does not divide by {other}")
                names.remove(name)
            return size(self.factor / other.factor, tuple(names))
        return size(self.factor / _fraction(other), self.names)

    def __floordiv__(self, other: Any) -> Any:
        found = self / other
        if (found.factor if isinstance(found, Size) else Fraction(found)).denominator != 1:
            raise ValueError(f"{self} does not divide by {other}")
        return found

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Size) and other.names == self.names:
            return size(self.factor + other.factor, self.names)
        if not isinstance(other, Size) and other == 0:
            return self
        raise ValueError(f"{self} + {other} has no closed form")

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + other * -1

    def __str__(self) -> str:
        return "*".join(([] if self.factor == 1 else [str(self.factor)]) + list(self.names))


def size(factor: Any, names: tuple[str, ...] = ()) -> Any:
    """Return a `Size`, or an int where nothing is unknown."""
    factor = Fraction(factor)
    if not names or factor == 0:
        return int(factor) if factor.denominator == 1 else float(factor)
    return Size(factor, tuple(sorted(names)))


def _fraction(value: Any) -> Fraction:
    return Fraction(value.item() if isinstance(value, np.generic) else value)


def product(sizes: Any) -> Any:
    """Return the product of known and unknown lengths."""
    return prod(sizes, start=size(1))


def divides(small: Any, large: Any) -> bool:
    """Return whether ``large`` is a whole multiple of ``small``."""
    small_names = list(small.names) if isinstance(small, Size) else []
    large_names = list(large.names) if isinstance(large, Size) else []
    for name in small_names:
        if name not in large_names:
            return False
        large_names.remove(name)
    a = small.factor if isinstance(small, Size) else Fraction(small)
    b = large.factor if isinstance(large, Size) else Fraction(large)
    return a != 0 and (b / a).denominator == 1


def has_sizes(value: Any) -> bool:
    """Return whether an array holds lengths that are not known."""
    return isinstance(value, np.ndarray) and value.dtype == object


def known(values: Any) -> bool:
    """Return whether all lengths are numbers."""
    return not any(isinstance(value, Size) for value in values)


def filled_in(target: Sequence[Any], sizes: Sequence[Any], *, zero_copies: bool = True) -> list[Any]:
    """Return the lengths that a Reshape asks for, without 0 and -1, and with open lengths where samples lie.

    Args:
        target: As in the file: numbers or `Size`.
        sizes: Lengths of what is reshaped.
        zero_copies: Whether 0 stands for the length of the same axis.
    """
    found = [sizes[k] if n == 0 and zero_copies and not isinstance(n, Size) else n for k, n in enumerate(target)]
    found = [n if isinstance(n, Size) else int(n) for n in found]
    total = product(sizes)
    rest = product(n for n in found if isinstance(n, Size) or n != -1)
    if -1 in found:
        place = found.index(-1)
        if not isinstance(rest, Size) and rest == 0:
            found[place] = 0
        elif divides(rest, total):
            found[place] = total / rest if isinstance(total, Size) else total // rest
        else:
            raise UnsupportedModelError(f"a Reshape of {_text(sizes)} into {_text(target)}")
        rest = product(found)
        # A model written for one sample has that 1 in its shapes, and -1 for what is known.
        if found[place] != size(1, (BATCH,)) and isinstance(found[place], Size) and found[:1] == [1]:
            found[0], found[place] = size(1, (BATCH,)), found[place] / size(1, (BATCH,))
    elif total != rest and isinstance(total, Size) and divides(rest, total):
        missing = total / rest
        if isinstance(missing, Size) and found:
            found[0] = found[0] * missing
    return found


def _text(sizes: Sequence[Any]) -> str:
    return "(" + ", ".join(str(n) for n in sizes) + ")"
