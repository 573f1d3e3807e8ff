"""The coder with its models, as frames use it: in Python, or the same in C where a compiler was found."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dwindle.packing import lanes as lanes_module
from dwindle.packing import native
from dwindle.packing.coder import Coder, Decoder, Encoder, Learner
from dwindle.packing.contexts import Structure, code_symbols, dictionary
from dwindle.packing.model import Mixer, Numbers, plain


class Engine(Protocol):
    """Codes in one direction at a time; a decoder ignores the values it is given, and returns those that it finds.

    What it reads may be broken: then, at the end of a frame at the latest, it raises `DataError`.
    """

    def start_encoding(self) -> None:
        """Begin a frame."""

    def start_decoding(self, coded: bytes | memoryview) -> None:
        """Begin a frame's coded part."""

    def number(self, field: int, value: int = 0) -> int:
        """Code a number below 2^32 - 1, small ones shorter."""

    def bit(self, field: int, place: int, bit: int = 0) -> int:
        """Code a bit with a probability of its own."""

    def chain(self, field: int, shift: int, bits: int, values: np.ndarray) -> np.ndarray:
        """Code numbers of a few bits, each with chances that depend on the one before.

        Args:
            field: Of the first; that of a later one is higher by the one before without its lowest bits.
            shift: How many bits that is.
            bits: Of each number.
            values: The numbers, or as many others for a decoder.
        """

    def plain(self, bits: int, value: int = 0) -> int:
        """Code bits as they are."""

    def structure(self, place: int, size: int, values: bytes | None = None) -> bytes:
        """Code bytes of the file's structure."""

    def symbols(
        self, *, count: int, depth: int, row: int, plane: int, common: int, chosen: int, groups: np.ndarray | None,
        values: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Code a plane's numbers (`code_symbols`)."""

    def encode_lanes(self, symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray, lanes: int) -> bytes:
        """Return the states and words of a plane (`dwindle.packing.lanes.encode`)."""

    def decode_lanes(
        self, data: memoryview, classes: np.ndarray, tables: np.ndarray, lanes: int
    ) -> tuple[np.ndarray, int]:
        """Return a plane's numbers, and how many bytes they took (`dwindle.packing.lanes.decode`)."""

    def finish(self) -> bytes:
        """Return the coded part of an encoder's frame."""

    def check_end(self) -> None:
        """Check that a decoder's frame was read to its end, and not beyond."""


def make_engine(table_bits: int) -> Engine:
    """Return the fastest engine that there is; both write the same bytes.

    Args:
        table_bits: Binary logarithm of the cells of the table of predictions.
    """
    library = native.library()
    return PythonEngine(table_bits) if library is None else native.NativeEngine(library, table_bits)


class PythonEngine:
    """The engine in Python: the reference, and all that is needed."""

    def __init__(self, table_bits: int) -> None:
        self._mixer = Mixer(table_bits)
        self._structure = Structure(self._mixer)
        learner = Learner()
        for place, value in enumerate(dictionary()):
            self._structure.code(learner, place, value)
        self._numbers = Numbers()
        self._encoder = Encoder()
        self._decoder: Decoder | None = None

    @property
    def _coder(self) -> Coder:
        return self._encoder if self._decoder is None else self._decoder

    def start_encoding(self) -> None:
        """Begin a frame."""
        self._numbers, self._encoder, self._decoder = Numbers(), Encoder(), None

    def start_decoding(self, coded: bytes | memoryview) -> None:
        """Begin a frame's coded part."""
        self._numbers, self._decoder = Numbers(), Decoder(coded)

    def number(self, field: int, value: int = 0) -> int:
        """Code a number below 2^32 - 1, small ones shorter."""
        return self._numbers.number(self._coder, field, value)

    def bit(self, field: int, place: int, bit: int = 0) -> int:
        """Code a bit with a probability of its own."""
        return self._numbers.bit(self._coder, field, place, bit)

    def chain(self, field: int, shift: int, bits: int, values: np.ndarray) -> np.ndarray:
        """Code numbers of a few bits, each with chances that depend on the one before."""
        result = []
        before = 0
        for value in values.tolist():
            before = self._numbers.tree(self._coder, field + (before >> shift), bits, value)
            result.append(before)
        return np.array(result, np.uint8)

    def plain(self, bits: int, value: int = 0) -> int:
        """Code bits as they are."""
        return plain(self._coder, bits, value)

    def structure(self, place: int, size: int, values: bytes | None = None) -> bytes:
        """Code bytes of the file's structure."""
        coder, code = self._coder, self._structure.code
        if values is None:
            return bytes(code(coder, place + i) for i in range(size))
        return bytes(code(coder, place + i, value) for i, value in enumerate(values))

    def symbols(
        self, *, count: int, depth: int, row: int, plane: int, common: int, chosen: int, groups: np.ndarray | None,
        values: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Code a plane's numbers (`code_symbols`)."""
        found = code_symbols(
            self._coder, self._mixer, count=count, depth=depth, row=row, plane=plane, common=common, chosen=chosen,
            groups=None if groups is None else groups.tolist(), values=None if values is None else values.tolist(),
        )  # fmt: skip
        return np.asarray(found, np.uint8)

    def encode_lanes(self, symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray, lanes: int) -> bytes:
        """Return the states and words of a plane (`dwindle.packing.lanes.encode`)."""
        return lanes_module.encode(symbols, classes, tables, lanes)

    def decode_lanes(
        self, data: memoryview, classes: np.ndarray, tables: np.ndarray, lanes: int
    ) -> tuple[np.ndarray, int]:
        """Return a plane's numbers, and how many bytes they took (`dwindle.packing.lanes.decode`)."""
        return lanes_module.decode(data, classes, tables, lanes)

    def finish(self) -> bytes:
        """Return the coded part of an encoder's frame."""
        return self._encoder.finish()

    def check_end(self) -> None:
        """Check that a decoder's frame was read to its end, and not beyond."""
        if self._decoder is not None:
            self._decoder.check_end()
