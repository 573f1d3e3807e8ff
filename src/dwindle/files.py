"""Writing files so that nothing is ever half written, and nothing of the user's is lost."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dwindle.errors import ConfigError, ConversionError


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file under a temporary name in the same folder, then rename it into place.

    Raises:
        ConversionError: If it can't be written (disk full, no permission); an old file is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the old file is unchanged" if path.exists() else ""
        raise ConversionError(f"`{path}` can't be written: {error.strerror or error}{kept}") from None
    return path


def write_text(path: str | Path, content: str) -> Path:
    """Write UTF-8 text as `write_bytes` does."""
    return write_bytes(path, content.encode("utf8"))


def check_output_file(path: str | Path, *, suffixes: tuple[str, ...]) -> Path:
    """Check where a file is to be written, before any work is done.

    Raises:
        ConfigError: If the name ends in something else, or names a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"`{path}` ends in {path.suffix or 'nothing'!r}; it must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"`{path}` is a folder; name a file")
    return path


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_keras(model: object, path: str | Path) -> Path:
    """Save a Keras model as ``.keras`` under a temporary name, then rename it into place.

    Raises:
        ConversionError: If it can't be written; an old file is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.keras")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(str(temporary))  # type: ignore[attr-defined]
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConversionError(f"`{path}` can't be written: {error.strerror or error}") from None
    return path
