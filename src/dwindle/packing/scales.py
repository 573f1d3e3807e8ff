"""Vectors of scales that are another vector times one number, as a bias' scales are its kernel's times its input's."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dwindle.errors import DataError
from dwindle.packing.engines import Engine

if TYPE_CHECKING:
    from dwindle.packing.frames import Segment

SCALED_FIELD, _RESIDUAL_FIELD = 9, 15


class RowTable(NamedTuple):
    """One row's table.

    Attributes:
        factor: What the first table was multiplied by, as 32 bits; None if it is the first table.
        values: Its numbers, as 32 bits each.
    """

    factor: int | None
    values: np.ndarray


def multiplied(values: np.ndarray, factor: int) -> np.ndarray:
    """Return float32 products, rounded to the nearest or even, in integer arithmetic on the numbers' 32 bits.

    Zeros, denormal numbers, infinities and what overflows or underflows give 0: only ordinary products count.

    Args:
        values: Bits of the numbers, uint32.
        factor: Bits of the other factor.
    """
    a, b = values.astype(np.int64), int(factor)
    exponent_a, exponent_b = a >> 23 & 255, b >> 23 & 255
    product = (a & 0x7FFFFF | 0x800000) * (b & 0x7FFFFF | 0x800000)
    shift = 23 + (product >> 47)
    rest = product & ((1 << shift) - 1)
    half = np.int64(1) << (shift - 1)
    kept = product >> shift
    kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    exponent = exponent_a + exponent_b - 127 + (shift - 23) + (kept >> 24)
    mantissa = np.where(kept >> 24 == 1, 0, kept & 0x7FFFFF)
    ordinary = (exponent_a > 0) & (exponent_a < 255) & (0 < exponent_b < 255) & (exponent > 0) & (exponent < 255)
    sign = (a ^ b) & 0x80000000
    return np.where(ordinary, sign | exponent << 23 | mantissa, 0).astype(np.uint32)


def code_scaled(engine: Engine, before: bytes, segment: Segment, piece: bytes | None) -> bytes:
    """Code a vector by how far each number lies from the product, in steps of the last place.

    Args:
        engine: The coder of the differences.
        before: The frame's bytes before the segment.
        segment: Its size, factor and distance.
        piece: Its bytes, for an encoder.

    Returns:
        Its bytes.

    Raises:
        DataError: If the other vector does not lie before it in the frame.
    """
    start = len(before) - segment.distance
    if segment.size % 4 or start < 0 or segment.distance < segment.size:
        raise DataError("a vector refers to one outside its frame")
    expected = multiplied(np.frombuffer(before, "<u4", segment.size // 4, start), segment.factor)
    return _code_near(engine, expected, None if piece is None else np.frombuffer(piece, "<u4")).tobytes()


def code_row_tables(engine: Engine, segment: Segment, rows: int) -> np.ndarray:
    """Code each row's table: the segment's own, or its product with a number but for steps of the last place.

    Args:
        engine: The coder.
        segment: Its table, and the rows' tables for an encoder.
        rows: How many rows.

    Returns:
        The tables, ``(rows, distinct)``, uint32.
    """
    table = np.asarray(segment.table, np.uint32)
    result = np.empty((rows, len(table)), np.uint32)
    for number in range(rows):
        given = segment.row_tables[number] if segment.row_tables else None
        if engine.bit(SCALED_FIELD, 0, int(given is not None and given.factor is not None)):
            factor = engine.plain(32, 0 if given is None or given.factor is None else given.factor)
            actual = None if given is None else np.asarray(given.values, "<u4")
            result[number] = _code_near(engine, multiplied(table, factor), actual)
        else:
            result[number] = table
    return result


def _code_near(engine: Engine, expected: np.ndarray, actual: np.ndarray | None) -> np.ndarray:
    """Code numbers by how far they lie from what is expected."""
    wanted = None if actual is None else actual.astype(np.int64)
    result = np.empty(len(expected), np.int64)
    for place, value in enumerate(expected.astype(np.int64)):
        difference = 0 if wanted is None else int(wanted[place] - value + (1 << 31)) % (1 << 32) - (1 << 31)
        folded = engine.number(_RESIDUAL_FIELD, difference * 2 if difference >= 0 else -difference * 2 - 1)
        difference = folded // 2 if folded % 2 == 0 else -(folded + 1) // 2
        result[place] = (int(value) + difference) % (1 << 32)
    return result.astype("<u4")


def nearest_factor(numbers: np.ndarray, others: np.ndarray) -> tuple[int, int] | None:
    """Return the factor for which the products with ``others`` come nearest to ``numbers``, and the steps in all.

    None if there is none for which no product is more than two steps of the last place away.

    Args:
        numbers: Bits of float32 numbers.
        others: As many.
    """
    if _apart(numbers, others):
        return None
    mine, theirs = numbers.view("<f4").astype(np.float64), others.view("<f4").astype(np.float64)
    used = theirs != 0
    if not used.any() or (mine[~used] != 0).any():
        return None
    with np.errstate(all="ignore"):
        quotients = mine[used] / theirs[used]
        middle = np.float32(quotients[np.abs(theirs[used]).argmax()])
    if not np.isfinite(quotients).all() or not np.ptp(quotients) <= 1e-6 * abs(quotients[0]):
        return None
    best = None
    bits = int(middle.view(np.uint32))
    for factor in range(max(bits - 4, 0), min(bits + 5, 1 << 32)):
        away = np.abs(numbers.astype(np.int64) - multiplied(others, factor).astype(np.int64))
        if int(away.max()) <= 2 and (best is None or int(away.sum()) < best[1]):
            best = factor, int(away.sum())
    return best


def _apart(numbers: np.ndarray, others: np.ndarray) -> bool:
    """Return whether the first and the last number alone rule a common factor out, as they nearly always do."""
    mine, theirs = numbers.view("<f4"), others.view("<f4")
    first, last = float(mine[0]) * float(theirs[-1]), float(mine[-1]) * float(theirs[0])
    return abs(first - last) > 2e-6 * abs(first) + 1e-60


def find_row_tables(numbers: np.ndarray, row: int, most: int) -> tuple[np.ndarray, list[RowTable]] | None:
    """Return a table and, for each row, the table with its numbers that is a multiple of the first one.

    So are the rows of a kernel whose weights were shared before a normalization was folded into it.

    Args:
        numbers: Bits of float32 numbers, of whole rows.
        row: Numbers in a row.
        most: Largest table.

    Returns:
        None if there are none.
    """
    lines = numbers.reshape(-1, row)
    ordered = np.sort(lines, axis=1)
    counts = 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)
    if counts.max() > most:
        return None
    table = np.unique(lines[counts.argmax()])
    values = table.view("<f4").astype(np.float64)
    found = []
    for line in lines:
        fitting = _row_table(np.unique(line), table, values)
        if fitting is None:
            return None
        found.append(fitting)
    return table, found


def _row_table(mine: np.ndarray, table: np.ndarray, values: np.ndarray) -> RowTable | None:
    if np.isin(mine, table).all():
        return RowTable(None, table)
    numbers = mine.view("<f4").astype(np.float64)
    largest = numbers[np.abs(numbers).argmax()]
    if not np.isfinite(numbers).all() or not np.isfinite(values).all():
        return None
    with np.errstate(all="ignore"):
        factors = largest / values[values != 0]
    # The largest number is one of the table's largest, as a rule.
    for factor in factors[np.argsort(np.abs(factors), kind="stable")]:
        products = values * factor
        places = np.abs(products[None] - numbers[:, None]).argmin(axis=1)
        if not np.allclose(products[places], numbers, rtol=1e-6, atol=0) or len(np.unique(places)) < len(places):
            continue
        near = nearest_factor(mine, table[places])
        if near is not None:
            result = multiplied(table, near[0])
            result[places] = mine
            return RowTable(near[0], result)
    return None
