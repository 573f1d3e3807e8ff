"""Context-mixing models: what the next bit is likely to be, from what came before it; integer arithmetic throughout.

Each context gives a prediction that adapts; a small network mixes them in the logistic domain and learns from every
bit. Encoder and decoder run the same code, so that both know the same probabilities (``docs/packing.md``, "Mixing").

References:
    Mahoney (2005), *Adaptive weighing of context models for lossless data compression*, and Mattern (2012), *Mixing
    strategies in data compression*: mixing in the logistic domain. Differences: a prediction is weighted by how often
    its context was seen, and numbers in a tensor have contexts of their own (their row, their neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dwindle.errors import DataError
from dwindle.packing.coder import Coder

_M32 = 0xFFFFFFFF
# The logistic function on 65 points from -8 to 8, as 1/65536; linear in between.
ANCHORS = tuple(min(65535, round(65536 / (1 + math.exp(-(i - 32) / 4)))) for i in range(65))


def _squash_table() -> list[int]:
    table = []
    for d in range(4096):
        i, rest = divmod(d, 64)
        table.append(((64 - rest) * ANCHORS[i] + rest * ANCHORS[i + 1]) >> 6)
    return table


def _stretch_table(squash: list[int]) -> list[int]:
    table, d = [], 0
    for p in range(4096):
        while d < 4095 and squash[d] < p * 16 + 8:
            d += 1
        table.append(d - 2048)
    return table


SQUASH = _squash_table()
STRETCH = _stretch_table(SQUASH)
# How far a prediction moves after its n-th bit (1/65536), and how much it is trusted before it (1/256).
RATE = tuple(131072 // (2 * n + 3) for n in range(256))
TRUST = tuple(1280 * n // (5 * n + 2) for n in range(256))
# A cell of the table: probability of a one (16 bits), count (8 bits), check (8 bits).
FRESH = 0x80000000
HALF = 32768
WEIGHT_LIMIT = 1 << 22


def hashed(a: int, b: int) -> int:
    """Return 32 bits that depend on both numbers."""
    x = (a * 0x9E3779B1 + b * 0x85EBCA6B) & _M32
    x = ((x ^ x >> 15) * 0x2C1B3C6D) & _M32
    return x ^ x >> 13


class Mixer:
    """A table of adaptive predictions, and the network that mixes those of several contexts.

    Args:
        table_bits: Binary logarithm of the number of cells, which all contexts share by hash.
    """

    def __init__(self, table_bits: int) -> None:
        self._table = [FRESH] * (1 << table_bits)
        self._mask = (1 << table_bits) - 1

    def code(
        self, coder: Coder, contexts: Sequence[int], node: int, weights: list[int], limit: int, shift: int, bit: int
    ) -> int:
        """Code one bit with the predictions of some contexts; predictions and weights learn from it.

        Args:
            coder: Encoder or decoder.
            contexts: Hashes, 32 bits each.
            node: Which bit of a symbol it is, given those before; less than 256.
            weights: One a context, in 1/65536; changed.
            limit: Highest count; a lower one forgets sooner.
            shift: Learning rate of the weights, as a power of two: higher is slower.
            bit: The bit, for an encoder.

        Returns:
            The bit.
        """
        table, mask, stretch, trust, rate = self._table, self._mask, STRETCH, TRUST, RATE
        places, cells, inputs = [], [], []
        dot = 0
        for context, weight in zip(contexts, weights):  # noqa: B905 - checking costs time in the innermost loop
            place = (context ^ node) & mask
            cell = table[place]
            check = context >> 24
            if cell & 255 != check:
                # A count of 0 is trusted with nothing: the input is 0.
                cell, value = FRESH | check, 0
            else:
                value = stretch[cell >> 20] * trust[cell >> 8 & 255] >> 8
                dot += value * weight
            places.append(place)
            cells.append(cell)
            inputs.append(value)
        dot >>= 16
        p = SQUASH[dot + 2048 if -2048 <= dot <= 2047 else 0 if dot < 0 else 4095]
        if p < 32:
            p = 32
        elif p > 65504:
            p = 65504
        bit = coder.code(p, bit)
        error = 65536 - p if bit else -p
        half = 1 << (shift - 1)
        for i, value in enumerate(inputs):
            cell = cells[i]
            count, chance = cell >> 8 & 255, cell >> 16
            if value:
                weight = weights[i] + (value * error + half >> shift)
                weights[i] = weight if -WEIGHT_LIMIT < weight < WEIGHT_LIMIT else _clamped(weight)
            if bit:
                chance += (65535 - chance) * rate[count] >> 16
            else:
                chance -= chance * rate[count] >> 16
            table[places[i]] = chance << 16 | (count + 1 if count < limit else limit) << 8 | cell & 255
        return bit


def _clamped(weight: int) -> int:
    return min(max(weight, -WEIGHT_LIMIT), WEIGHT_LIMIT)


class Numbers:
    """Small adaptive codes for the numbers that describe a frame: lengths, methods, tables."""

    def __init__(self) -> None:
        self._chances: dict[tuple[int, int], int] = {}

    def bit(self, coder: Coder, field: int, place: int, bit: int = 0) -> int:
        """Code one bit whose probability adapts, one for each field and place."""
        chance = self._chances.get((field, place), HALF)
        bit = coder.code(chance, bit)
        chance += (65535 - chance >> 4) if bit else -(chance >> 4)
        self._chances[field, place] = min(max(chance, 32), 65504)
        return bit

    def number(self, coder: Coder, field: int, value: int = 0) -> int:
        """Code a number from 0 to 2^32 - 2: the length of ``value + 1`` in unary, then its lower bits as they are.

        Raises:
            DataError: If what is read is longer.
        """
        value += 1
        length = 0
        while length < 32 and self.bit(coder, field, length, int(value.bit_length() > length + 1)):
            length += 1
        if length == 32:
            raise DataError("a number in a frame is too large")
        rest = plain(coder, length, value & (1 << length) - 1)
        return (1 << length | rest) - 1

    def tree(self, coder: Coder, field: int, bits: int, value: int = 0) -> int:
        """Code a number of a few bits, highest first, with one probability for each node of the tree."""
        node = 1
        for place in range(bits - 1, -1, -1):
            node = node << 1 | self.bit(coder, field, node, value >> place & 1)
        return node - (1 << bits)


def plain(coder: Coder, bits: int, value: int = 0) -> int:
    """Code bits that nothing is known about, highest first."""
    result = 0
    for place in range(bits - 1, -1, -1):
        result = result << 1 | coder.code(HALF, value >> place & 1)
    return result
