"""The container: a header, frames, and two checksums; read and written a frame at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from dwindle.errors import DataError
from dwindle.packing import planning
from dwindle.packing.engines import make_engine
from dwindle.packing.frames import LARGEST_FRAME, LARGEST_PART, Codec
from dwindle.packing.segments import Region

MAGIC = b"DWZ\x01"
FEWEST_TABLE_BITS, MOST_TABLE_BITS = 10, 22
_MOST_STRUCTURE_BYTES = 1 << 14


def table_bits_for(size: int, regions: list[Region]) -> int:
    """Return how large a table of predictions a file needs, as a binary logarithm.

    One of 256 KiB serves a structure of up to 16 KiB; four times that, any more.
    """
    structure = size - sum(region.size for region in regions)
    return 16 if structure <= _MOST_STRUCTURE_BYTES else 18


def packed(
    content: Any, regions: list[Region], *, table_bits: int, say: Callable[[int, int], None] | None = None
) -> Iterator[bytes]:
    """Yield a packed file, piece by piece.

    Args:
        content: The file's bytes, or a memory map of it.
        regions: Its tensors and vectors.
        table_bits: Binary logarithm of the cells of the table of predictions.
        say: Called with the bytes done and the bytes in all.
    """
    total = len(content)
    check = 0

    def checked(piece: bytes) -> bytes:
        nonlocal check
        check = zlib.crc32(piece, check)
        return piece

    yield checked(MAGIC + varint(total) + bytes([table_bits]))
    codec = Codec(make_engine(table_bits))
    raw_check = 0
    for pieces in planning.cut(total, regions):
        place = pieces[0][0]
        raw = bytes(content[place : pieces[-1][0] + pieces[-1][1]])
        raw_check = zlib.crc32(raw, raw_check)
        coded, body = codec.encode(raw, planning.plan_frame(raw, place, pieces), place)
        yield checked(varint(len(raw)) + varint(len(coded)) + varint(len(body)) + coded + body)
        if say is not None:
            say(place + len(raw), total)
    yield checked(varint(0) + raw_check.to_bytes(4, "little"))
    yield check.to_bytes(4, "little")


def unpacked(
    stream: BinaryIO, say: Callable[[int, int], None] | None = None, tell: Callable[[int], None] | None = None
) -> Iterator[bytes]:
    """Yield the file that a packed one stands for, frame by frame.

    The caller keeps it only once all of it has come: the checksums are at the end.

    Args:
        stream: The packed file, at its beginning, seekable.
        say: Called with the bytes done and the bytes in all.
        tell: Called with the binary logarithm of the cells of the table of predictions.

    Raises:
        DataError: If it is no packed file, of another version, or damaged.
    """
    _check_file(stream)
    reader = _Reader(stream)
    reader.take(len(MAGIC))
    total = reader.varint("size")
    table_bits = reader.take(1)[0]
    if not FEWEST_TABLE_BITS <= table_bits <= MOST_TABLE_BITS:
        raise DataError(f"it asks for a table of 2^{table_bits} cells")
    if tell is not None:
        tell(table_bits)
    codec = Codec(make_engine(table_bits))
    done, check = 0, 0
    while size := reader.varint("frame"):
        if size > LARGEST_FRAME or size > total - done:
            raise DataError(f"a frame of {size} bytes is larger than what is left of the file")
        coded_size, body_size = reader.varint("frame"), reader.varint("frame")
        if max(coded_size, body_size) > LARGEST_PART:
            raise DataError(f"a frame of {size} bytes takes {coded_size + body_size}")
        coded, body = reader.take(coded_size), reader.take(body_size)
        raw = codec.decode(memoryview(coded), memoryview(body), size, done)
        check = zlib.crc32(raw, check)
        done += len(raw)
        yield raw
        if say is not None:
            say(done, total)
    if done != total:
        raise DataError(f"it holds {done} of {total} bytes")
    if check != int.from_bytes(reader.take(4), "little"):
        raise DataError("the restored file's checksum is wrong")
    reader.take(4)
    if stream.read(1):
        raise DataError("it goes on after its end")


def _check_file(stream: BinaryIO) -> None:
    """Check the beginning, and the checksum at the end, over everything before it."""
    begin = stream.read(len(MAGIC))
    if begin[:3] != MAGIC[:3]:
        raise DataError(f"it does not begin as a packed model does (`DWZ`, found {begin[:3]!r}); pass a .dwz file")
    if begin[3:] != MAGIC[3:]:
        raise DataError(f"it is of version {begin[3] if len(begin) > 3 else 'none'}, and this dwindle reads version 1")
    check = zlib.crc32(begin)
    tail = b""
    while block := stream.read(1 << 16):
        tail += block
        check = zlib.crc32(tail[:-4], check)
        tail = tail[-4:]
    if len(tail) < 4 or int.from_bytes(tail, "little") != check:
        raise DataError("it is truncated or damaged: its checksum is wrong")
    stream.seek(0)


def varint(value: int) -> bytes:
    """Return a number in groups of 7 bits, lowest first, with the highest bit set in all but the last (LEB128)."""
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


class _Reader:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def take(self, size: int) -> bytes:
        found = self._stream.read(size)
        if len(found) < size:
            raise DataError("it is truncated")
        return found

    def varint(self, what: str) -> int:
        value = 0
        for group in range(9):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << (7 * group)
            if byte < 0x80:
                return value
        raise DataError(f"the {what} has more than 63 bits")
