"""A binary arithmetic coder: one bit at a time, each with the probability that a model gives it."""

from __future__ import annotations

from typing import Protocol

from dwindle.errors import DataError

PROBABILITY_BITS = 16
_MASK = 0xFFFFFFFF
# A decoder holds four bytes, so it is always that far ahead of the bit that it decodes.
_AHEAD = 4


class Coder(Protocol):
    """What a model needs: the same model runs over an `Encoder` and over a `Decoder`."""

    def code(self, probability: int, bit: int) -> int:
        """Code one bit; a decoder ignores ``bit`` and returns the one that it finds."""


class Learner:
    """Let a model take in what is known to both sides: nothing is written."""

    def code(self, probability: int, bit: int) -> int:  # noqa: ARG002 - every coder takes it
        """Return the bit."""
        return bit


class Encoder:
    """Write bits as one number between two bounds that close in on each other.

    The interval ``[low, high]`` is cut at ``low + ((high - low) * p >> 16)``: a one keeps the lower part. Bytes in
    which both bounds agree are written. There is no carry, so a byte that is out never changes.

    References:
        Witten, Neal and Cleary (1987), *Arithmetic coding for data compression*; the carry-less form with 32-bit bounds
        is common to the PAQ family (Mahoney 2005, *Adaptive weighing of context models for lossless data compression*).
    """

    def __init__(self) -> None:
        self._low, self._high = 0, _MASK
        self._out = bytearray()

    def code(self, probability: int, bit: int) -> int:
        """Write ``bit``; ``probability`` is of a one, in 1/65536, from 1 to 65535."""
        middle = self._low + ((self._high - self._low) * probability >> PROBABILITY_BITS)
        if bit:
            self._high = middle
        else:
            self._low = middle + 1
        while (self._low ^ self._high) < 1 << 24:
            self._out.append(self._high >> 24)
            self._low = self._low << 8 & _MASK
            self._high = self._high << 8 & _MASK | 0xFF
        return bit

    def finish(self) -> bytes:
        """Return what was written: the shortest bytes that lie in the interval when zeros follow."""
        for kept in (0, 8, 16, 24, 32):
            step = 1 << (32 - kept)
            value = -(-self._low // step) * step
            if value <= self._high:
                self._out += value.to_bytes(4, "big")[: kept // 8]
                break
        return bytes(self._out)


class Decoder:
    """Read what an `Encoder` wrote; zeros follow the last byte, and no more of them than are needed.

    Args:
        data: The encoder's bytes, all of them.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = bytes(data)
        self._low, self._high = 0, _MASK
        self._value = int.from_bytes(self._data[:_AHEAD].ljust(_AHEAD, b"\0"), "big")
        self._place = _AHEAD

    def code(self, probability: int, bit: int = 0) -> int:
        """Return the next bit.

        Raises:
            DataError: If the data ended long ago.
        """
        middle = self._low + ((self._high - self._low) * probability >> PROBABILITY_BITS)
        if self._value <= middle:
            self._high, bit = middle, 1
        else:
            self._low, bit = middle + 1, 0
        while (self._low ^ self._high) < 1 << 24:
            self._low = self._low << 8 & _MASK
            self._high = self._high << 8 & _MASK | 0xFF
            self._value = self._value << 8 & _MASK
            if self._place < len(self._data):
                self._value |= self._data[self._place]
            elif self._place >= len(self._data) + _AHEAD:
                raise DataError("a frame ends before its last value")
            self._place += 1
        return bit

    def check_end(self) -> None:
        """Check that everything was read.

        Raises:
            DataError: If bytes are left over.
        """
        if self._place < len(self._data):
            raise DataError("a frame goes on after its last value")
