"""Choosing classes for groups of numbers: rows with alike distributions share a table. Only an encoder needs this."""

from __future__ import annotations

import numpy as np

from dwindle.packing.lanes import LEVEL_BITS, LEVELS, MOST_CLASSES, MOST_GROUPS, SCALE, Classes, frequencies

_ROUNDS = 8
# Where only one group in so many changes its class, the turns end.
_FEW = 100
# Twice the classes must save this much, or four times the classes.
_WORTHWHILE, _IN_VAIN = 0.998, 1


def histograms(symbols: np.ndarray, groups: np.ndarray, count: int, size: int) -> np.ndarray:
    """Return how often each symbol is in each group, ``(groups, symbols)``."""
    return np.bincount(groups * size + symbols, minlength=count * size).reshape(count, size)


def row_histograms(symbols: np.ndarray, row: int, size: int) -> np.ndarray:
    """Return how often each symbol is in each row, ``(rows, symbols)``."""
    count = -(-len(symbols) // row)
    places = np.repeat(np.arange(0, count * size, size), row)[: len(symbols)]
    places += symbols
    return np.bincount(places, minlength=count * size).reshape(count, size)


def levels_of(counts: np.ndarray) -> np.ndarray:
    """Return the nearest levels of a table for counts of one class."""
    total = max(int(counts.sum()), 1)
    wanted = counts * (SCALE / total)
    levels = np.asarray(LEVELS, np.float64)
    found = np.searchsorted((levels[1:] + levels[:-1]) / 2, wanted)
    found[(counts > 0) & (found == 0)] = 1
    if not counts.any():
        found[0] = 1
    return found


def estimate(sums: np.ndarray, of_group: np.ndarray, levels: np.ndarray) -> float:
    """Return about how many bytes a plane takes: numbers, tables and classes.

    Args:
        sums: Histograms of the classes.
        of_group: The classes of the groups.
        levels: Tables of the classes.
    """
    bits = 0.0
    for mine, table in zip(sums, levels, strict=True):
        used = mine > 0
        chances = frequencies(table)[used] / SCALE
        bits -= float((mine[used] * np.log2(chances)).sum())
        changes = int((np.diff(table, prepend=0) != 0).sum())
        bits += min(4.5 * changes + 0.3 * len(table), LEVEL_BITS * len(table)) + 8
    sizes = np.bincount(of_group, minlength=len(levels))
    sizes = sizes[sizes > 0]
    if len(sizes) > 1:
        bits -= float((sizes * np.log2(sizes / sizes.sum())).sum())
    return bits / 8


def adaptive_estimate(counts: np.ndarray) -> float:
    """Return about how many bytes an adaptive code takes for one class: half a logarithm for each symbol learnt."""
    total = counts.sum()
    used = counts[counts > 0]
    entropy = -(used * np.log2(used / total)).sum()
    return float(entropy + 0.5 * len(used) * np.log2(total)) / 8


def choose_classes(counts: np.ndarray) -> tuple[Classes, float]:
    """Return classes and tables for which a plane is small, and about how many bytes it takes.

    Groups are assigned to the table that codes them best and tables follow their groups, in turns, for 1, 2, 4, 8 and
    16 classes, as long as that saves something.

    Args:
        counts: Histograms of the groups, ``(groups, symbols)``.
    """
    groups = len(counts)
    everything = counts.sum(axis=0)
    best = Classes(np.zeros(groups, np.int64), levels_of(everything)[None])
    least = estimate(everything[None], *best)
    if groups == 1 or groups > MOST_GROUPS:
        return best, least
    used = np.flatnonzero(everything)
    shares = counts[:, used].astype(np.float32)
    prior = (everything[used] / everything.sum() + 1e-4).astype(np.float32)[None]
    chances = shares + np.float32(0.5)
    chances /= chances.sum(axis=1, keepdims=True)
    order = np.argsort(-(chances * np.log2(chances)).sum(axis=1), kind="stable")
    number, in_vain = 2, 0
    while number <= min(MOST_CLASSES, groups):
        of_group = _assigned(shares, prior, order, number)
        kept, of_group = np.unique(of_group, return_inverse=True)
        sums = _sums(counts, of_group, len(kept))
        found = Classes(of_group, np.stack([levels_of(each) for each in sums]))
        size = estimate(sums, *found)
        if size < _WORTHWHILE * least:
            best, least, in_vain = found, size, 0
        else:
            in_vain += 1
        if in_vain > _IN_VAIN:
            break
        number *= 2
    return best, least


def _assigned(shares: np.ndarray, prior: np.ndarray, order: np.ndarray, number: int) -> np.ndarray:
    """Return classes of groups: begun in the order of their entropies, then in turns with the tables."""
    of_group: np.ndarray = np.empty(len(shares), np.int64)
    of_group[order] = np.arange(len(shares)) * number // len(shares)
    for _ in range(_ROUNDS):
        table = (of_group == np.arange(number)[:, None]).astype(np.float32) @ shares + prior
        lengths = -np.log2(table / table.sum(axis=1, keepdims=True))
        found: np.ndarray = (shares @ lengths.T).argmin(axis=1)
        if int((found != of_group).sum()) * _FEW <= len(found):
            return found
        of_group = found
    return of_group


def _sums(counts: np.ndarray, of_group: np.ndarray, number: int) -> np.ndarray:
    return np.stack([counts[of_group == each].sum(axis=0) for each in range(number)])
