"""Choosing how each piece of a file is coded; an encoder may choose otherwise, a decoder reads whatever was chosen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dwindle.packing import frames, grouping
from dwindle.packing.frames import BYTES, LANES, LARGEST_FRAME, MIXED, PLANES, RAW, ROWS, SCALED, TABLE, Plane, Segment
from dwindle.packing.lanes import MOST_GROUPS, MOST_LANE_BITS
from dwindle.packing.scales import find_row_tables, nearest_factor
from dwindle.packing.segments import SHORTEST_BYTES, Region

# From this many bytes on a plane is coded in lanes: many times as fast, and what they cost is no longer seen. From the
# lower number on it is where that costs next to nothing.
LANES_FROM_BYTES, LANES_MAYBE_FROM_BYTES = 8192, 2048
_NEARLY = 1.005
# A lane costs about three bytes, so that one for 1024 bytes adds 0.3%.
_BYTES_OF_A_LANE = 1024
_FEWEST_LANE_BITS = 2
# A plane that shrinks by less than 1% is stored.
_STORED_FROM = 0.99
_MOST_DISTINCT, _MOST_DISTINCT_BYTES = 256, 32
_MOST_SCALES_BYTES = 1 << 16
_MOST_CANDIDATES = 64
# A row's table costs about 7 bytes.
_NUMBERS_OF_A_ROW_TABLE = 24
_MOST_IN_A_ROW = 64
# What a neighbour says is lost in noise where a number takes nearly all of its bits.
_NOISY = 0.9


def cut(size: int, regions: list[Region]) -> Iterator[list[tuple[int, int, Region | None]]]:
    """Cut a file into frames of up to 1 MiB; each is a list of pieces (first byte, bytes, region or None).

    Args:
        size: Bytes of the file.
        regions: What `find_regions` found.
    """
    frame: list[tuple[int, int, Region | None]] = []
    used = 0
    for start, length, region in _pieces(size, regions):
        begin, end = start, start + length
        while begin < end:
            room = LARGEST_FRAME - used
            take = min(room, end - begin)
            if region is not None and take < end - begin:
                row = max(region.row * region.bits // 8, 8)
                take -= take % (row - row % 8 if row <= take else 8)
            if take:
                frame.append((begin, take, region))
                begin += take
                used += take
            if begin < end or used == LARGEST_FRAME:
                yield frame
                frame, used = [], 0
    if frame:
        yield frame


def _pieces(size: int, regions: list[Region]) -> Iterator[tuple[int, int, Region | None]]:
    place = 0
    for region in regions:
        if region.start > place:
            yield place, region.start - place, None
        yield region.start, region.size, region
        place = region.start + region.size
    if place < size:
        yield place, size - place, None


def plan_frame(raw: bytes, place: int, pieces: list[tuple[int, int, Region | None]]) -> list[Segment]:
    """Return how a frame's pieces are coded.

    Args:
        raw: The frame's bytes.
        place: Where it begins in the file.
        pieces: From `cut`.
    """
    result: list[Segment] = []
    scales: list[int] = []
    for start, length, region in pieces:
        begin = start - place
        piece = raw[begin : begin + length]
        segment = None
        if region is not None and length >= SHORTEST_BYTES:
            if region.bits == 32 and region.is_float and length <= _MOST_SCALES_BYTES:
                segment = _scaled(raw, begin, length, scales)
                scales.append(begin)
            segment = segment or plan_region(piece, region)
        if segment is None:
            segment = Segment(BYTES, length)
        if result and result[-1].kind == segment.kind == BYTES:
            segment = Segment(BYTES, result.pop().size + length)
        result.append(segment)
    return result


def _scaled(raw: bytes, begin: int, length: int, candidates: list[int]) -> Segment | None:
    """Return a segment for a vector that is an earlier one times a number, but for single steps of the last place."""
    mine = np.frombuffer(raw, "<u4", length // 4, begin)
    for other in reversed(candidates[-_MOST_CANDIDATES:]):
        if other + length > begin:
            continue
        found = nearest_factor(mine, np.frombuffer(raw, "<u4", length // 4, other))
        if found is not None:
            return Segment(SCALED, length, 32, distance=begin - other, factor=found[0])
    return None


def plan_region(raw: bytes, region: Region) -> Segment:
    """Return how a vector or tensor is coded."""
    numbers = frames.numbers_of(raw, region.bits)
    values = frames.rotate(numbers, region.bits, True) if region.is_float else numbers
    parts = frames.planes_of(values, region.bits)
    depth = min(region.bits, 8)
    planned = [_plane(part, depth, region.row, parts[0] if index else None) for index, part in enumerate(parts)]
    segment = Segment(
        PLANES, len(raw), region.bits, region.is_float, region.row, tuple(plane for plane, _ in planned)
    )  # fmt: skip
    if region.bits < 8:
        return segment
    table = _distinct(numbers)
    if len(table) > _MOST_DISTINCT and (rows := _rows(numbers, region)) is not None:
        return rows
    if len(table) > (_MOST_DISTINCT_BYTES if region.bits == 8 else _MOST_DISTINCT):
        return segment
    index = np.searchsorted(table, numbers).astype(np.uint8)
    depth = (len(table) - 1).bit_length()
    plane, size = _plane(index, depth, region.row, None) if depth else (None, 0.0)
    if size + len(table) * region.bits / 8 >= sum(size for _, size in planned) and region.bits > 8:
        return segment
    return Segment(
        TABLE, len(raw), region.bits, row=region.row, planes=() if plane is None else (plane,),
        table=tuple(int(value) for value in table),
    )  # fmt: skip


def _rows(numbers: np.ndarray, region: Region) -> Segment | None:
    """Return a segment for rows of few distinct numbers each, where all rows' are multiples of the same ones."""
    row = region.row
    if region.bits != 32 or not region.is_float or row < _NUMBERS_OF_A_ROW_TABLE or len(numbers) % row:
        return None
    found = find_row_tables(numbers, row, min(_MOST_IN_A_ROW, row // 2))
    if found is None:
        return None
    table, rows = found
    segment = Segment(
        ROWS, 4 * len(numbers), 32, row=row, table=tuple(int(value) for value in table), row_tables=tuple(rows)
    )  # fmt: skip
    if len(table) == 1:
        return segment
    plane, _ = _plane(frames.places_of(numbers, segment), (len(table) - 1).bit_length(), row, None)
    return segment._replace(planes=(plane,))


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the distinct numbers in order, or more than 256 numbers if there are more."""
    if numbers.dtype == np.uint8:
        return np.flatnonzero(np.bincount(numbers, minlength=256)).astype(np.uint8)
    first = np.unique(numbers[:4096])
    return first if len(first) > _MOST_DISTINCT else np.unique(numbers)


def _plane(symbols: np.ndarray, depth: int, row: int, first: np.ndarray | None) -> tuple[Plane, float]:
    """Return how a plane is coded, and about how many bytes it takes."""
    count, size = len(symbols), 1 << depth
    number = -(-count // row) if first is None else 256
    everything = np.bincount(symbols, minlength=size)
    adaptive = grouping.adaptive_estimate(everything)
    contexts = 3 if first is not None or adaptive > _NOISY * count * depth / 8 else 7
    mixed = Plane(MIXED, contexts=contexts, common=int(everything.argmax()))
    stored = count * _STORED_FROM if depth == 8 else float("inf")
    if adaptive < LANES_MAYBE_FROM_BYTES:
        # Later planes may depend on the first one, which the estimate does not know.
        return (Plane(RAW), float(count)) if adaptive >= stored and count > 64 else (mixed, adaptive)
    one_group = number > MOST_GROUPS
    if one_group:
        counts = everything[None]
    elif first is None:
        counts = grouping.row_histograms(symbols, row, size)
    else:
        counts = grouping.histograms(symbols, first.astype(np.int64), number, size)
    classes, estimate = grouping.choose_classes(counts)
    if one_group:
        classes = classes._replace(of_group=np.zeros(number, np.int64))
    if min(estimate, adaptive) >= stored:
        return Plane(RAW), float(count)
    if estimate < LANES_FROM_BYTES and estimate > _NEARLY * adaptive:
        return mixed, min(estimate, adaptive)
    lane_bits = int(np.log2(estimate / _BYTES_OF_A_LANE))
    return Plane(LANES, classes, min(max(lane_bits, _FEWEST_LANE_BITS), MOST_LANE_BITS)), estimate
