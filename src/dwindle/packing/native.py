"""The engine in C, compiled once for each user where a C compiler is found; without one Python does the same, slower.

``DWINDLE_NATIVE=0`` in the environment keeps to Python. The library lies in ``$XDG_CACHE_HOME/dwindle`` (``~/.cache``),
under a name made of its source's hash.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import DataError
from dwindle.packing.lanes import NOT_AT_END, TOO_SHORT

_SOURCES = Path(__file__).parent / "c"
_LARGEST_PART = 1 << 24
_SECONDS = 60


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled engine, or None where there is none."""
    if os.environ.get("DWINDLE_NATIVE", "1") == "0":
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _compiled() -> Path:
    """Return the library's path, compiling it if it is not there yet.

    Raises:
        OSError: If there is no compiler, or nowhere to write.
        subprocess.SubprocessError: If it does not compile.
    """
    digest = hashlib.sha256(f"{platform.machine()} {sys.platform}".encode())
    for name in ("dwz.h", "dwz_dictionary.h", "dwz.c", "engine.c"):
        digest.update((_SOURCES / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dwindle"
    # What others may write into, they could have put a library of theirs in.
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and (cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022):
        raise PermissionError(f"`{cache}` belongs to, or can be written by, somebody else")
    path = cache / f"engine-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / "engine.so"
        subprocess.run(
            [compiler, "-std=c99", "-O3", "-fPIC", "-shared", "-o", str(made), str(_SOURCES / "engine.c")],
            check=True, capture_output=True, timeout=_SECONDS,
        )  # fmt: skip
        made.replace(path)
    return path


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the types of its functions set."""
    word, size, pointer, number = ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    signatures: tuple[tuple[str, Any, list[Any]], ...] = (
        ("engine_bytes", size, []),
        ("engine_start", None, [pointer, pointer, word]),
        ("engine_encode", None, [pointer, pointer, size]),
        ("engine_decode", None, [pointer, pointer, size]),
        ("engine_number", word, [pointer, word, word]),
        ("engine_bit", number, [pointer, word, word, number]),
        ("engine_chain", None, [pointer, word, word, number, pointer, word]),
        ("engine_plain", word, [pointer, number, word]),
        ("engine_structure", None, [pointer, ctypes.c_uint64, pointer, word]),
        ("engine_symbols", None, [pointer, pointer, pointer, *[word] * 6]),
        ("engine_encode_lanes", size, [*[pointer] * 3, word, pointer, *[word] * 3, pointer, size]),
        ("engine_decode_lanes", size, [*[pointer] * 3, word, pointer, *[word] * 3, pointer, size]),
        ("engine_failed", number, [pointer]),
        ("engine_left_over", number, [pointer]),
        ("engine_finish", size, [pointer]),
    )
    for name, result, arguments in signatures:
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def _below(tables: np.ndarray) -> np.ndarray:
    """Return the sums of the frequencies below each symbol, and all of them at the end."""
    sums = np.zeros((len(tables), tables.shape[1] + 1), np.uint16)
    sums[:, 1:] = np.cumsum(tables, axis=1)
    return sums


class NativeEngine:
    """The engine in C; what it does is in `dwindle.packing.engines.Engine`.

    Args:
        found: The compiled library.
        table_bits: Binary logarithm of the cells of the table of predictions.
    """

    def __init__(self, found: ctypes.CDLL, table_bits: int) -> None:
        self._call: Any = found
        # 64-bit words, so that everything in it is aligned.
        self._work = np.zeros(found.engine_bytes() // 8 + 1, np.uint64)
        self._table = np.empty(1 << table_bits, np.uint32)
        self._at = self._work.ctypes.data
        self._sink: np.ndarray | None = None
        self._coded = np.zeros(1, np.uint8)
        self._call.engine_start(self._at, self._table.ctypes.data, table_bits)

    def start_encoding(self) -> None:
        """Begin a frame."""
        if self._sink is None:
            self._sink = np.empty(_LARGEST_PART, np.uint8)
        self._call.engine_encode(self._at, self._sink.ctypes.data, self._sink.size)

    def start_decoding(self, coded: bytes | memoryview) -> None:
        """Begin a frame's coded part."""
        self._coded = np.frombuffer(bytes(coded) + b"\0", np.uint8)
        self._call.engine_decode(self._at, self._coded.ctypes.data, self._coded.size - 1)

    def number(self, field: int, value: int = 0) -> int:
        """Code a number below 2^32 - 1, small ones shorter."""
        result = int(self._call.engine_number(self._at, field, value))
        self._check()
        return result

    def bit(self, field: int, place: int, bit: int = 0) -> int:
        """Code a bit with a probability of its own."""
        return int(self._call.engine_bit(self._at, field, place, bit))

    def chain(self, field: int, shift: int, bits: int, values: np.ndarray) -> np.ndarray:
        """Code numbers of a few bits, each with chances that depend on the one before."""
        result = np.array(values, np.uint8)
        self._call.engine_chain(self._at, field, shift, bits, result.ctypes.data, result.size)
        return result

    def plain(self, bits: int, value: int = 0) -> int:
        """Code bits as they are."""
        if bits > 32:
            upper = self.plain(bits - 32, value >> 32)
            return upper << 32 | self.plain(32, value & 0xFFFFFFFF)
        return int(self._call.engine_plain(self._at, bits, value))

    def structure(self, place: int, size: int, values: bytes | None = None) -> bytes:
        """Code bytes of the file's structure."""
        buffer = np.zeros(size, np.uint8) if values is None else np.frombuffer(values, np.uint8).copy()
        self._call.engine_structure(self._at, place, buffer.ctypes.data, size)
        self._check()
        return buffer.tobytes()

    def symbols(
        self, *, count: int, depth: int, row: int, plane: int, common: int, chosen: int, groups: np.ndarray | None,
        values: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Code a plane's numbers (`dwindle.packing.contexts.code_symbols`)."""
        buffer = np.zeros(count, np.uint8) if values is None else values.astype(np.uint8)
        first = None if groups is None else np.ascontiguousarray(groups, np.uint8)
        self._call.engine_symbols(
            self._at, buffer.ctypes.data, None if first is None else first.ctypes.data, count, row, depth, plane,
            chosen, common,
        )  # fmt: skip
        self._check()
        return buffer

    def encode_lanes(self, symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray, lanes: int) -> bytes:
        """Return the states and words of a plane (`dwindle.packing.lanes.encode`)."""
        below = _below(tables)
        values, of = np.ascontiguousarray(symbols, np.uint8), np.ascontiguousarray(classes, np.uint8)
        # A number takes one word at most, and words are written from the end.
        sink = np.empty(4 * lanes + 2 * values.size, np.uint8)
        begin = self._call.engine_encode_lanes(
            self._at, values.ctypes.data, of.ctypes.data, values.size, below.ctypes.data, len(tables), below.shape[1],
            lanes, sink.ctypes.data, sink.size,
        )  # fmt: skip
        return sink[begin:].tobytes()

    def decode_lanes(
        self, data: memoryview, classes: np.ndarray, tables: np.ndarray, lanes: int
    ) -> tuple[np.ndarray, int]:
        """Return a plane's numbers, and how many bytes they took (`dwindle.packing.lanes.decode`)."""
        below = _below(tables)
        of = np.ascontiguousarray(classes, np.uint8)
        result, source = np.empty(of.size, np.uint8), np.frombuffer(data, np.uint8)
        taken = self._call.engine_decode_lanes(
            self._at, result.ctypes.data, of.ctypes.data, of.size, below.ctypes.data, len(tables), below.shape[1],
            lanes, source.ctypes.data, source.size,
        )  # fmt: skip
        if taken == 0:
            raise DataError(TOO_SHORT)
        if taken == 1:
            raise DataError(NOT_AT_END)
        return result, int(taken)

    def finish(self) -> bytes:
        """Return the coded part of an encoder's frame."""
        size = int(self._call.engine_finish(self._at))
        if self._sink is None or size > self._sink.size:
            raise DataError("a frame grows beyond 16 MiB")
        return self._sink[:size].tobytes()

    def check_end(self) -> None:
        """Check that a decoder's frame was read to its end, and not beyond."""
        self._check()
        if self._call.engine_left_over(self._at):
            raise DataError("a frame goes on after its last value")

    def _check(self) -> None:
        if self._call.engine_failed(self._at):
            raise DataError(TOO_SHORT)
