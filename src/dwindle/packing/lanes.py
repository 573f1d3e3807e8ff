"""Range asymmetric numeral systems over many interleaved states, which NumPy carries out side by side.

Large planes are coded this way: probabilities do not adapt, but every group of numbers (a row, or all those with the
same first plane) belongs to one of up to 16 classes, each with a table of its own.

References:
    Duda (2013), *Asymmetric numeral systems*, arXiv 1311.2540; Giesen (2014), *Interleaved entropy coders*, arXiv
    1402.3392. Different from both: the number of lanes grows with the size, and tables are coded by the adaptive coder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dwindle.errors import DataError

if TYPE_CHECKING:
    from dwindle.packing.engines import Engine

SCALE_BITS = 14
SCALE = 1 << SCALE_BITS
LOWEST = 1 << 16
MOST_CLASSES = 16
MOST_LANE_BITS = 10
MOST_GROUPS = 1 << 12


def _levels() -> tuple[int, ...]:
    found = {0}
    for octave in range(SCALE_BITS + 1):
        found |= {(4 + quarter << octave) // 4 for quarter in range(4)}
    return tuple(sorted(level for level in found if level <= SCALE))


# A table is sent in steps of a quarter octave: 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...
LEVELS = _levels()
LEVEL_BITS = 6
# Fields of the engine; `packing/frames.py` has those below 16.
_CLASS_FIELD, _LEVEL_FIELD = 16, 32


TOO_SHORT = "a frame ends before its last value"
NOT_AT_END = "the values of a plane do not end where they should"


class Classes(NamedTuple):
    """Which table each number of a plane has.

    Attributes:
        of_group: Class of each group.
        levels: Places in `LEVELS`, ``(classes, symbols)``.
    """

    of_group: np.ndarray
    levels: np.ndarray


def frequencies(levels: np.ndarray) -> np.ndarray:
    """Return the frequencies, which add up to 16384, that the levels of one table stand for.

    Raises:
        DataError: If no symbol has any.
    """
    weights = np.asarray(LEVELS, np.int64)[levels]
    total = int(weights.sum())
    if total == 0:
        raise DataError("a table of frequencies is empty")
    result = np.where(weights > 0, np.maximum(weights * SCALE // total, 1), 0)
    rest = SCALE - int(result.sum())
    largest = int(result.argmax())
    if rest > 0:
        result[largest] += rest
    while rest < 0:
        largest = int(result.argmax())
        cut = min(-rest, int(result[largest]) // 2)
        result[largest] -= cut
        rest += cut
    return result


def code_classes(engine: Engine, groups: int, symbols_bits: int, classes: int, given: Classes | None = None) -> Classes:
    """Code the class of each group, then each class's table.

    Raises:
        DataError: If what is read is no class or level.
    """
    of_group = np.zeros(groups, np.int64)
    if classes > 1:
        if groups > MOST_GROUPS:
            raise DataError(f"classes of {groups} rows")
        of_group = engine.chain(_CLASS_FIELD, 0, 4, of_group if given is None else given.of_group).astype(np.int64)
        if int(of_group.max()) >= classes:
            raise DataError(f"class {int(of_group.max())} of {classes}")
    levels = np.zeros((classes, 1 << symbols_bits), np.int64)
    for number in range(classes):
        wanted = levels[number] if given is None else given.levels[number]
        levels[number] = engine.chain(_LEVEL_FIELD, 2, LEVEL_BITS, wanted)
        if int(levels[number].max()) >= len(LEVELS):
            raise DataError(f"level {int(levels[number].max())} of {len(LEVELS)}")
    return Classes(of_group, levels)


def encode(symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray, lanes: int) -> bytes:
    """Return the states and words of a plane.

    Numbers of a class with one symbol only are known, and take no turn.

    Args:
        symbols: The numbers.
        classes: The class of each.
        tables: Frequencies, ``(classes, symbols)``.
        lanes: How many states take turns.
    """
    coded = tables.max(axis=1)[classes] < SCALE
    symbols, classes = symbols[coded], classes[coded]
    below = np.cumsum(tables, axis=1) - tables
    frequency = tables[classes, symbols].astype(np.uint64)
    start = below[classes, symbols].astype(np.uint64)
    state = np.full(lanes, LOWEST, np.uint64)
    blocks: list[np.ndarray] = []
    for begin in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        f = frequency[begin : begin + lanes]
        x = state[: len(f)]
        full = x >= f << np.uint64(32 - SCALE_BITS)
        blocks.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        whole, rest = np.divmod(x, f)
        state[: len(f)] = (whole << np.uint64(SCALE_BITS)) + rest + start[begin : begin + lanes]
    return b"".join([state.astype("<u4").tobytes(), *(block.tobytes() for block in reversed(blocks))])


def decode(data: memoryview, classes: np.ndarray, tables: np.ndarray, lanes: int) -> tuple[np.ndarray, int]:
    """Return a plane's numbers, and how many bytes of ``data`` they took.

    Args:
        data: States, words, and what follows.
        classes: The class of each number.
        tables: Frequencies, ``(classes, symbols)``.
        lanes: How many states take turns.

    Raises:
        DataError: If the data is too short, or the states do not end as they began.
    """
    if len(data) < 4 * lanes:
        raise DataError(TOO_SHORT)
    state = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
    words = np.frombuffer(data[4 * lanes : len(data) - len(data) % 2], "<u2").astype(np.int64)
    result = tables.argmax(axis=1).astype(np.uint8)[classes]
    coded = np.flatnonzero(tables.max(axis=1)[classes] < SCALE)
    symbol_of = np.stack([np.repeat(np.arange(len(table)), table) for table in tables]).reshape(-1)
    below = (np.cumsum(tables, axis=1) - tables).reshape(-1)
    flat = tables.reshape(-1)
    first_slot = classes[coded] * SCALE
    first_symbol = classes[coded] * tables.shape[1]
    found = np.empty(len(coded), np.uint8)
    place = 0
    for begin in range(0, len(coded), lanes):
        end = min(begin + lanes, len(coded))
        x = state[: end - begin]
        slot = x & (SCALE - 1)
        symbol = symbol_of[first_slot[begin:end] + slot]
        found[begin:end] = symbol
        entry = first_symbol[begin:end] + symbol
        x = flat[entry] * (x >> SCALE_BITS) + slot - below[entry]
        empty = (x < LOWEST).nonzero()[0]
        if empty.size:
            if place + empty.size > len(words):
                raise DataError(TOO_SHORT)
            x[empty] = x[empty] << 16 | words[place : place + empty.size]
            place += empty.size
        state[: end - begin] = x
    if (state != LOWEST).any():
        raise DataError(NOT_AT_END)
    result[coded] = found
    return result, 4 * lanes + 2 * place
