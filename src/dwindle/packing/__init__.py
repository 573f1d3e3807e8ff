"""Packed model files: a ``.tflite`` made as small as it gets without a change, and restored bit for bit.

Constants are coded with adaptive models of their own (``docs/packing.md`` specifies the format); a decoder in C99 for
devices is in ``dwindle/packing/c``.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import ConversionError, DataError, UnsupportedModelError, VerificationError
from dwindle.files import check_output_file, sha256_of
from dwindle.packing.container import packed, table_bits_for, unpacked
from dwindle.packing.segments import find_regions

__all__ = ["Packed", "c_sources", "pack", "unpack"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed file and the model that it stands for.

    Attributes:
        file: The file that was written.
        model_bytes: Bytes of the ``.tflite``.
        packed_bytes: Bytes of the ``.dwz``.
        model_sha256: SHA-256 of the ``.tflite``.
        work_bytes: Bytes that a device's decoder needs for its table of predictions, besides 90 KiB and the model.
    """

    file: Path
    model_bytes: int
    packed_bytes: int
    model_sha256: str
    work_bytes: int

    @property
    def times_smaller(self) -> float:
        """Bytes of the model for each byte packed."""
        return self.model_bytes / self.packed_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "file": str(self.file), "times_smaller": self.times_smaller}


def pack(source: str | Path, out: str | Path, *, progress: Progress | None = None) -> Packed:
    """Pack a ``.tflite`` into a ``.dwz``, restore it, and compare the two before the packed file gets its name.

    It does not change the model: `unpack` gives the same bytes. Time goes by what is compressed, not by size: 15 to
    30 MB a second of a large file with a C compiler on the machine, 0.1 to 1 MB without; memory stays below 100 MB.

    Args:
        source: A ``.tflite`` file.
        out: The ``.dwz`` to write; an old one is replaced.
        progress: Called with the bytes done and the bytes in all.

    Returns:
        Both sizes and the model's hash.

    Raises:
        ConfigError: If ``out`` does not end in ``.dwz``.
        DataError: If ``source`` does not exist or can't be read.
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
        ConversionError: If ``out`` can't be written; an old file is still there.
        VerificationError: If what was written does not restore the model; nothing is written then.

    Example:
        >>> import tempfile, pathlib
        >>> from dwindle.packing import pack
        >>> pack("missing.tflite", pathlib.Path(tempfile.gettempdir()) / "missing.dwz")
        Traceback (most recent call last):
        ...
        dwindle.errors.DataError: `missing.tflite` does not exist; pass a .tflite file
    """
    source, out = Path(source), check_output_file(out, suffixes=(".dwz",))
    content = _mapped(source, ".tflite")
    try:
        regions = find_regions(content)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"`{source}`: {error}") from None
    table_bits = table_bits_for(len(content), regions)
    digest = sha256_of(source)
    with _replacing(out) as temporary:
        _write(temporary, out, packed(content, regions, table_bits=table_bits, say=progress))
        restored = hashlib.sha256()
        with temporary.open("rb") as stream:
            for piece in unpacked(stream):
                restored.update(piece)
        if restored.hexdigest() != digest:
            raise VerificationError(
                f"`{source}` comes back changed from `{out}`, so nothing was written; was the file changed meanwhile? "
                "If not, please report it"
            )
    return Packed(
        file=out, model_bytes=len(content), packed_bytes=out.stat().st_size, model_sha256=digest,
        work_bytes=4 << table_bits,
    )  # fmt: skip


def unpack(source: str | Path, out: str | Path, *, progress: Progress | None = None) -> Packed:
    """Restore the ``.tflite`` that a ``.dwz`` stands for.

    Nothing gets the name ``out`` unless all of it was restored and both checksums are right.

    Args:
        source: A ``.dwz`` file.
        out: The ``.tflite`` to write; an old one is replaced.
        progress: Called with the bytes done and the bytes in all.

    Returns:
        Both sizes and the model's hash.

    Raises:
        ConfigError: If ``out`` does not end in ``.tflite``.
        DataError: If ``source`` does not exist, is no packed file, is of another version, or damaged.
        ConversionError: If ``out`` can't be written; an old file is still there.
    """
    source, out = Path(source), check_output_file(out, suffixes=(".tflite",))
    _check_exists(source, ".dwz")
    table_bits: list[int] = []
    with _replacing(out) as temporary, source.open("rb") as stream:
        try:
            _write(temporary, out, unpacked(stream, progress, table_bits.append))
        except DataError as error:
            raise DataError(f"`{source}` can't be unpacked: {error}") from None
    return Packed(
        file=out, model_bytes=out.stat().st_size, packed_bytes=source.stat().st_size, model_sha256=sha256_of(out),
        work_bytes=4 << table_bits[0],
    )  # fmt: skip


def c_sources() -> tuple[Path, Path, Path]:
    """Return the decoder for devices, ``dwz.h``, ``dwz.c`` and ``dwz_dictionary.h``: C99, no allocation."""
    folder = Path(__file__).parent / "c"
    return folder / "dwz.h", folder / "dwz.c", folder / "dwz_dictionary.h"


def _check_exists(source: Path, suffix: str) -> None:
    if not source.exists():
        raise DataError(f"`{source}` does not exist; pass a {suffix} file")
    if source.is_dir():
        raise DataError(f"`{source}` is a folder; pass a {suffix} file")


def _mapped(source: Path, suffix: str) -> Any:
    """Return a file as a map of memory, so that only what is used is read."""
    _check_exists(source, suffix)
    with source.open("rb") as stream:
        if not source.stat().st_size:
            raise UnsupportedModelError(f"`{source}` is empty; pass a {suffix} file")
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder, and rename it into place if nothing fails."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        try:
            temporary.replace(out)
        except OSError as error:
            raise _unwritable(out, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write(temporary: Path, out: Path, pieces: Iterable[bytes]) -> None:
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _unwritable(out, error) from None


def _unwritable(out: Path, error: OSError) -> ConversionError:
    kept = "; the old file is unchanged" if out.exists() else ""
    return ConversionError(f"`{out}` can't be written: {error.strerror or error}{kept}")
