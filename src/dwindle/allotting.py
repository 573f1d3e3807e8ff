"""Sharing out a budget: one point of each item's choices, so that all together cost at most so much and err least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Points:
    """What one item can be.

    Attributes:
        costs: Cost of each choice, whole numbers.
        errors: What each choice errs by.
        choices: What each choice is; of no concern here.
    """

    costs: np.ndarray
    errors: np.ndarray
    choices: tuple[Any, ...]


def allot(points: Mapping[str, Points], budget: int, *, floor: int) -> dict[str, int]:
    r"""Return the number of a choice for each item, with ``sum of costs <= budget`` and a small ``sum of errors``.

    For a price of one unit of cost each item takes ``argmin(error + price * cost)``, and bisection finds the price that
    keeps the budget (the Lagrangian; exact up to one choice where errors are convex in cost). What is left of the
    budget then goes, one step at a time, to the items that gain most by it. Where that stays below ``floor`` because an
    item's choices lie far apart, solutions in which such an item is one or two steps dearer are tried as well.

    Args:
        points: The choices of each item. The cheapest of all together must keep the budget.
        budget: What may be spent.
        floor: What should be spent at least, where that can be done.

    References:
        Everett 1963, Generalized Lagrange multiplier method, Operations Research 11(3).
    """
    best = _solved(points, budget)
    if _cost(points, best) >= floor:
        return best
    tried = []
    for name, place in best.items():
        each = points[name]
        dearer = np.unique(each.costs[each.costs > each.costs[place]])[:2]
        for cost in dearer:
            forced = int(np.flatnonzero(each.costs == cost)[np.argmin(each.errors[each.costs == cost])])
            rest = {key: value for key, value in points.items() if key != name}
            if cost + sum(int(value.costs.min()) for value in rest.values()) <= budget:
                tried.append({**_solved(rest, budget - int(cost)), name: forced})
    enough = [picked for picked in tried if _cost(points, picked) >= floor]
    return min(enough, key=lambda picked: _error(points, picked)) if enough else best


def _cost(points: Mapping[str, Points], picked: Mapping[str, int]) -> int:
    return sum(int(points[name].costs[place]) for name, place in picked.items())


def _error(points: Mapping[str, Points], picked: Mapping[str, int]) -> float:
    return sum(float(points[name].errors[place]) for name, place in picked.items())


def _solved(points: Mapping[str, Points], budget: int) -> dict[str, int]:
    def at(price: float) -> dict[str, int]:
        return {name: int(np.argmin(each.errors + price * each.costs)) for name, each in points.items()}

    low, high = 1e-30, 1.0
    if _cost(points, at(low)) <= budget:
        high = low
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _cost(points, at(middle)) > budget else (low, middle)
    picked = at(high)
    while True:
        spare = budget - _cost(points, picked)
        gains = []
        for name, each in points.items():
            more, now = each.costs - each.costs[picked[name]], picked[name]
            fits = np.flatnonzero((more > 0) & (more <= spare) & (each.errors < each.errors[now]))
            if fits.size:
                gain = (each.errors[now] - each.errors[fits]) / more[fits]
                gains.append((float(gain.max()), name, int(fits[gain.argmax()])))
        if not gains:
            return picked
        _, name, place = max(gains)
        picked[name] = place
