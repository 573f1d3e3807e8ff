"""The two users of the mixer: bytes of the file's structure, and the numbers of a tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from dwindle.packing.coder import Coder
from dwindle.packing.model import Mixer, hashed

# Bytes of structure: counts, learning rate and first weights were chosen on LiteRT files of 3 to 400 KB.
_BYTE_LIMIT, _BYTE_SHIFT, _BYTE_WEIGHT = 127, 14, 20000
_BYTE_CONTEXTS = 7
_NO_MATCH = hashed(9, 0)
HISTORY = 1 << 14
_LONGEST_MATCH, _SHORTEST_MATCH = 32, 4
_SYMBOL_LIMIT, _SYMBOL_SHIFT = 255, 15


@functools.cache
def dictionary() -> bytes:
    """Return what the model of the structure has seen before the first byte, from the C decoder's own source."""
    source = (Path(__file__).parent / "c" / "dwz_dictionary.h").read_text(encoding="utf8")
    return bytes(int(number) for number in source.partition("= {")[2].partition("}")[0].split(",")[:-1])


class Structure:
    """Bytes predicted from the bytes before: the last 1, 2, 3, 4 and 6, those 4 and 8 back, and the longest repetition.

    It goes on from frame to frame, over the bytes that it codes and no others.
    """

    def __init__(self, mixer: Mixer) -> None:
        self._mixer = mixer
        self._weights = [[_BYTE_WEIGHT] * (_BYTE_CONTEXTS + 1) for _ in range(256)]
        self._history = bytearray(HISTORY)
        self._index = [0] * 4096
        self._count = 0
        self._match, self._length = 0, 0
        self._near = self._far = 0

    def code(self, coder: Coder, place: int, value: int = 0) -> int:
        """Code one byte.

        Args:
            coder: Encoder or decoder.
            place: Its place in the file: flatbuffers align everything to 4 bytes.
            value: The byte, for an encoder.
        """
        near, far = self._near, self._far
        last = near & 0xFF
        column = (place & 3) << 4
        contexts = [
            hashed(1, last),
            hashed(2, near & 0xFFFF),
            hashed(3, near & 0xFFFFFF),
            hashed(4, near),
            hashed(5, hashed(near, far & 0xFFFF)),
            hashed(6 + column, near >> 24 | (far >> 24) << 8),
            hashed(7 + column, near >> 24 | last << 8),
            _NO_MATCH,
        ]
        length = min(self._length, 31)
        expected = self._history[self._match % HISTORY] | 256 if length else 0
        node = 1
        for bit in range(7, -1, -1):
            if expected >> (bit + 1) == node:
                hit = expected >> bit & 1
                contexts[_BYTE_CONTEXTS] = hashed(8, length * 2 + hit) ^ node
            else:
                contexts[_BYTE_CONTEXTS] = _NO_MATCH
            node = node << 1 | self._mixer.code(
                coder, contexts, node, self._weights[node], _BYTE_LIMIT, _BYTE_SHIFT, value >> bit & 1
            )
        self._learn(node & 0xFF)
        return node & 0xFF

    def _learn(self, value: int) -> None:
        history = self._history
        if self._length and history[self._match % HISTORY] == value:
            self._length = min(self._length + 1, 65535)
            self._match += 1
        else:
            self._length = 0
        history[self._count % HISTORY] = value
        self._count += 1
        self._far = (self._far << 8 | self._near >> 24) & 0xFFFFFFFF
        self._near = (self._near << 8 | value) & 0xFFFFFFFF
        if self._count < 5:
            return
        key = hashed(10, hashed(self._near, self._far & 0xFF)) >> 20
        found = self._index[key]
        if not self._length and found and self._count - found < HISTORY - _LONGEST_MATCH:
            length = 0
            while (
                length < _LONGEST_MATCH
                and length < found
                and history[(found - 1 - length) % HISTORY] == history[(self._count - 1 - length) % HISTORY]
            ):
                length += 1
            if length >= _SHORTEST_MATCH:
                self._match, self._length = found, length
        self._index[key] = self._count


def code_symbols(
    coder: Coder,
    mixer: Mixer,
    *,
    count: int,
    depth: int,
    row: int,
    plane: int,
    common: int,
    chosen: int,
    groups: Sequence[int] | None,
    values: Sequence[int] | None = None,
) -> list[int]:
    """Code the numbers of one plane of a tensor one after another.

    First comes whether a number is the most common one, then its bits, highest first, all mixed from up to three
    contexts: none; its group (the row that it is in, or the first plane's symbol at its place); and the magnitudes
    of the numbers on its left and above it.

    Args:
        coder: Encoder or decoder.
        mixer: The table of predictions.
        count: How many numbers.
        depth: Bits of one, 1 to 8.
        row: Numbers in a row.
        plane: Which plane of the tensor.
        common: The most common number, zero as a rule.
        chosen: Which contexts take part: 1 none, 2 group, 4 neighbours; added up.
        groups: The first plane for a later one; None for the first, whose groups are rows.
        values: The numbers, for an encoder.
    """
    used = [i for i in range(3) if chosen >> i & 1]
    weights = [[65536 // len(used)] * len(used) for _ in range(257)]
    salt = plane << 4
    size = 1 << depth
    magnitudes = [min((s - common) % size, (common - s) % size).bit_length() for s in range(size)]
    result: list[int] = [0] * count
    everything = hashed(16 + salt, 0)
    near = [[hashed(18 + salt, a * 16 + b) for b in range(9)] for a in range(9)]
    code = mixer.code
    for place in range(count):
        line, column = divmod(place, row)
        contexts = []
        for which in used:
            if which == 0:
                contexts.append(everything)
            elif which == 1:
                contexts.append(hashed(17 + salt, line if groups is None else groups[place]))
            else:
                left = magnitudes[result[place - 1]] if column else 0
                above = magnitudes[result[place - row]] if line else 0
                contexts.append(near[left][above])
        value = values[place] if values is not None else 0
        if code(coder, contexts, 0, weights[256], _SYMBOL_LIMIT, _SYMBOL_SHIFT, int(value == common)):
            result[place] = common
            continue
        node = 1
        for bit in range(depth - 1, -1, -1):
            node = node << 1 | code(
                coder, contexts, node, weights[node], _SYMBOL_LIMIT, _SYMBOL_SHIFT, value >> bit & 1
            )
        result[place] = node - size
    return result
