"""Frames of a packed file: pieces of up to 1 MiB, cut into segments; the same code writes and reads one.

Everything that describes a frame, and all that adapts, goes through one arithmetic coder; numbers in lanes and raw
bytes lie behind it. ``docs/packing.md`` has the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dwindle.errors import DataError
from dwindle.packing import lanes
from dwindle.packing.engines import Engine
from dwindle.packing.scales import RowTable, code_row_tables, code_scaled

LARGEST_FRAME = 1 << 20
# What models give a likely bit costs up to eleven bits when it is the other: a frame may grow.
LARGEST_PART = 1 << 24
BYTES, PLANES, TABLE, SCALED, ROWS = range(5)
RAW, LANES, MIXED = range(3)
# Fields of the engine's numbers.
_KIND, _LENGTH, _WIDTH, _ROTATED, _ROW, _METHOD, _LANES, _CLASSES, _DISTINCT = range(9)
WIDTHS = (2, 4, 8, 16, 32, 64)


class Plane(NamedTuple):
    """How one plane of a segment is coded.

    Attributes:
        method: RAW, LANES or MIXED.
        classes: Of LANES.
        lane_bits: Binary logarithm of the number of lanes.
        contexts: Which contexts of MIXED take part.
        common: The most common number, of MIXED.
    """

    method: int
    classes: lanes.Classes | None = None
    lane_bits: int = 0
    contexts: int = 0
    common: int = 0


class Segment(NamedTuple):
    """How a piece of a frame is coded.

    Attributes:
        kind: BYTES, PLANES, TABLE, SCALED or ROWS.
        size: Its bytes.
        bits: Bits of a number.
        rotated: Whether the sign goes to the lowest place, so that a float's first plane is its exponent.
        row: Numbers in a row.
        planes: One for each plane.
        table: The distinct numbers of TABLE, or those that the rows of ROWS are multiples of.
        row_tables: Of ROWS, for an encoder.
        distance: Of SCALED: how far back the vector begins that it is a multiple of.
        factor: Of SCALED: the factor, as 32 bits.
    """

    kind: int
    size: int
    bits: int = 8
    rotated: bool = False
    row: int = 1
    planes: tuple[Plane, ...] = ()
    table: tuple[int, ...] = ()
    row_tables: tuple[RowTable, ...] = ()
    distance: int = 0
    factor: int = 0


def numbers_of(raw: bytes, bits: int) -> np.ndarray:
    """Return a segment's numbers, unsigned."""
    if bits >= 8:
        return np.frombuffer(raw, f"<u{bits // 8}")
    whole = np.frombuffer(raw, np.uint8)
    return np.stack([whole >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)], axis=1).reshape(-1)


def bytes_of(numbers: np.ndarray, bits: int) -> bytes:
    """Return the bytes of a segment's numbers."""
    if bits >= 8:
        return numbers.astype(f"<u{bits // 8}").tobytes()
    parts = numbers.astype(np.uint8).reshape(-1, 8 // bits)
    whole = np.zeros(len(parts), np.uint8)
    for i in range(8 // bits):
        whole |= parts[:, i] << (bits * i)
    return whole.tobytes()


def rotate(numbers: np.ndarray, bits: int, left: bool) -> np.ndarray:
    """Return the numbers with their highest bit moved to the lowest place, or back."""
    one, rest = numbers.dtype.type(1), numbers.dtype.type(bits - 1)
    turned: np.ndarray = numbers << one | numbers >> rest if left else numbers >> one | numbers << rest
    return turned


def planes_of(numbers: np.ndarray, bits: int) -> list[np.ndarray]:
    """Return the bytes of the numbers by place, highest first; numbers below 8 bits are one plane."""
    if bits <= 8:
        return [numbers.astype(np.uint8)]
    return [(numbers >> numbers.dtype.type(shift)).astype(np.uint8) for shift in range(bits - 8, -1, -8)]


class Codec:
    """Writes and reads frames; what the engine learns in one, it knows in the next.

    Args:
        engine: The coder and its models.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def encode(self, raw: bytes, segments: Sequence[Segment], place: int) -> tuple[bytes, bytes]:
        """Return a frame's coded part and its plain part.

        Args:
            raw: The frame's bytes.
            segments: How they are coded.
            place: Where the frame begins in the file.
        """
        engine = self._engine
        engine.start_encoding()
        body = bytearray()
        begin = 0
        for segment in segments:
            self._header(segment)
            piece = raw[begin : begin + segment.size]
            if segment.kind == BYTES:
                engine.structure(place + begin, segment.size, piece)
            elif segment.kind == SCALED:
                code_scaled(engine, raw[:begin], segment, piece)
            else:
                self._encode_planes(body, segment, piece)
            begin += segment.size
        return engine.finish(), bytes(body)

    def _encode_planes(self, body: bytearray, segment: Segment, piece: bytes) -> None:
        values = numbers_of(piece, segment.bits)
        if segment.kind == TABLE:
            values = np.searchsorted(np.asarray(segment.table, values.dtype), values).astype(np.uint8)
            split, depth = [values], _depth(len(segment.table))
        elif segment.kind == ROWS:
            split, depth = [places_of(values, segment)], _depth(len(segment.table))
        else:
            if segment.rotated:
                values = rotate(values, segment.bits, True)
            split, depth = planes_of(values, segment.bits), min(segment.bits, 8)
        for index, plane in enumerate(segment.planes):
            body += self._encode_plane(segment, depth, index, plane, split)
        if segment.kind == ROWS:
            code_row_tables(self._engine, segment, len(segment.row_tables))

    def _encode_plane(self, segment: Segment, depth: int, index: int, plane: Plane, split: list[np.ndarray]) -> bytes:
        values = split[index]
        self._engine.number(_METHOD, plane.method)
        if plane.method == RAW:
            return values.tobytes()
        if plane.method == MIXED:
            self._engine.plain(3, plane.contexts)
            self._engine.plain(depth, plane.common)
            self._engine.symbols(
                count=len(values), depth=depth, row=segment.row, plane=index, common=plane.common,
                chosen=plane.contexts, groups=split[0] if index else None, values=values,
            )  # fmt: skip
            return b""
        if plane.classes is None:
            raise ValueError("a plane in lanes needs classes")
        self._engine.number(_LANES, plane.lane_bits)
        self._engine.number(_CLASSES, len(plane.classes.levels) - 1)
        groups = 256 if index else -(-len(values) // segment.row)
        lanes.code_classes(self._engine, groups, depth, len(plane.classes.levels), plane.classes)
        tables = np.stack([lanes.frequencies(levels) for levels in plane.classes.levels])
        chosen = plane.classes.of_group[_groups(split[0] if index else None, len(values), segment.row)]
        return self._engine.encode_lanes(values, chosen, tables, 1 << plane.lane_bits)

    def decode(self, coded: memoryview, body: memoryview, size: int, place: int) -> bytes:
        """Return a frame's bytes.

        Args:
            coded: Its coded part.
            body: Its plain part.
            size: How many bytes it stands for.
            place: Where it begins in the file.

        Raises:
            DataError: If the frame is broken.
        """
        engine = self._engine
        engine.start_decoding(coded)
        raw = bytearray()
        while len(raw) < size:
            segment = self._header(None)
            if segment.size > size - len(raw):
                raise DataError("a segment is larger than its frame")
            if segment.kind == BYTES:
                raw += engine.structure(place + len(raw), segment.size)
            elif segment.kind == SCALED:
                raw += code_scaled(engine, bytes(raw), segment, None)
            else:
                piece, body = self._decode_planes(body, segment)
                raw += piece
        engine.check_end()
        if len(body):
            raise DataError("a frame goes on after its last value")
        return bytes(raw)

    def _decode_planes(self, body: memoryview, segment: Segment) -> tuple[bytes, memoryview]:
        count = segment.size * 8 // segment.bits
        split: list[np.ndarray] = []
        tabled = segment.kind in (TABLE, ROWS)
        if tabled:
            depth, planes = _depth(len(segment.table)), int(len(segment.table) > 1)
        else:
            depth, planes = min(segment.bits, 8), max(segment.bits // 8, 1)
        for number in range(planes):
            plane, body = self._decode_plane(body, segment, depth, number, count, split)
            split.append(plane)
        kind = np.dtype(f"<u{max(segment.bits // 8, 1)}")
        if tabled:
            places = split[0].astype(np.int64) if planes else np.zeros(count, np.int64)
            if int(places.max()) >= len(segment.table):
                raise DataError(f"number {int(places.max())} of a table of {len(segment.table)}")
            if segment.kind == TABLE:
                return bytes_of(np.asarray(segment.table, kind)[places], segment.bits), body
            tables = code_row_tables(self._engine, segment, -(-count // segment.row))
            return bytes_of(tables[np.arange(count) // segment.row, places], segment.bits), body
        values = np.zeros(count, kind)
        for part in split:
            values = values << kind.type(8) | part if planes > 1 else part
        if segment.rotated:
            values = rotate(values, segment.bits, False)
        return bytes_of(values, segment.bits), body

    def _decode_plane(
        self, body: memoryview, segment: Segment, depth: int, index: int, count: int, split: list[np.ndarray]
    ) -> tuple[np.ndarray, memoryview]:
        method = self._engine.number(_METHOD)
        if method == RAW:
            if depth != 8 or len(body) < count:
                raise DataError("a frame ends before its last value")
            return np.frombuffer(body[:count], np.uint8), body[count:]
        if method == MIXED:
            contexts, common = self._engine.plain(3), self._engine.plain(depth)
            if not contexts:
                raise DataError("a plane has no context")
            symbols = self._engine.symbols(
                count=count, depth=depth, row=segment.row, plane=index, common=common,
                chosen=contexts, groups=split[0] if index else None,
            )  # fmt: skip
            return symbols, body
        if method != LANES:
            raise DataError(f"a plane has method {method}")
        lane_bits, classes = self._engine.number(_LANES), self._engine.number(_CLASSES) + 1
        if lane_bits > lanes.MOST_LANE_BITS or classes > lanes.MOST_CLASSES:
            raise DataError(f"a plane has {classes} classes and 2^{lane_bits} lanes")
        groups = 256 if index else -(-count // segment.row)
        found = lanes.code_classes(self._engine, groups, depth, classes)
        tables = np.stack([lanes.frequencies(levels) for levels in found.levels])
        chosen = found.of_group[_groups(split[0] if index else None, count, segment.row)]
        values, taken = self._engine.decode_lanes(body, chosen, tables, 1 << lane_bits)
        return values, body[taken:]

    def _header(self, given: Segment | None) -> Segment:
        known = given or Segment(0, 1)
        kind = self._engine.number(_KIND, known.kind)
        size = self._engine.number(_LENGTH, known.size - 1) + 1
        if kind == BYTES:
            return Segment(kind, size)
        if kind == SCALED:
            distance, factor = self._engine.number(_ROW, known.distance), self._engine.plain(32, known.factor)
            return Segment(kind, size, 32, distance=distance, factor=factor)
        if kind not in (PLANES, TABLE, ROWS):
            raise DataError(f"a segment is of kind {kind}")
        width = self._engine.number(_WIDTH, WIDTHS.index(known.bits))
        if width >= len(WIDTHS) or size * 8 % WIDTHS[width]:
            raise DataError("a segment has no whole number of values")
        bits = WIDTHS[width]
        row = self._engine.number(_ROW, known.row - 1) + 1
        if kind != PLANES:
            distinct = self._engine.number(_DISTINCT, len(known.table) - 1) + 1
            if distinct > 256 or bits < 8 or (kind == ROWS and (bits != 32 or distinct > row)):
                raise DataError(f"a table has {distinct} values of {bits} bits")
            entries = known.table or (0,) * distinct
            table = tuple(self._engine.plain(bits, entry) for entry in entries)
            return Segment(kind, size, bits, row=row, table=table)
        rotated = self._engine.bit(_ROTATED, 0, int(known.rotated))
        if rotated and bits <= 8:
            raise DataError(f"a sign is apart in values of {bits} bits")
        return Segment(kind, size, bits, bool(rotated), row)


def places_of(values: np.ndarray, segment: Segment) -> np.ndarray:
    """Return each number's place in its row's table."""
    result = np.empty(len(values), np.uint8)
    for number, (_, table) in enumerate(segment.row_tables):
        line = slice(number * segment.row, (number + 1) * segment.row)
        order = np.argsort(table, kind="stable")
        result[line] = order[np.searchsorted(table[order], values[line])]
    return result


def _depth(distinct: int) -> int:
    """Return the bits of a place in a table."""
    return (distinct - 1).bit_length()


def _groups(first: np.ndarray | None, count: int, row: int) -> np.ndarray:
    return np.arange(count) // row if first is None else first.astype(np.int64)
