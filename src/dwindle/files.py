"""Writing files so that nothing is ever half written, and nothing of the user's is lost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dwindle.errors import ConfigError, ConversionError

#: Bytes of the config in a ``.keras`` above which it is not read.
LARGEST_CONFIG_BYTES = 64_000_000


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
        folder = " (or in nothing, for a SavedModel folder)" if ".tflite" in suffixes else ""
        raise ConfigError(
            f"`{path}` ends in {path.suffix or 'nothing'!r}; it must end in {' or '.join(suffixes)}{folder}"
        )
    if path.is_dir():
        raise ConfigError(f"`{path}` is a folder; name a file")
    return path


# What a SavedModel folder may have; a folder with anything else holds something of the user's.
_SAVED_MODEL_ENTRIES = {"saved_model.pb", "fingerprint.pb", "keras_metadata.pb", "variables", "assets", "assets.extra"}


def names_folder(path: str | Path) -> bool:
    """Whether an output path stands for a SavedModel folder: no suffix, ``.savedmodel``, or a slash at the end."""
    suffix = Path(path).suffix.lower()
    return suffix in ("", ".savedmodel") or (str(path).endswith(("/", os.sep)) and suffix not in (".tflite", ".keras"))


def check_output_folder(path: str | Path) -> Path:
    """Check where a SavedModel folder is to be written, before any work is done.

    Raises:
        ConfigError: If there is a file, a link, or a folder with anything but a SavedModel in it.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise ConfigError(f"`{path}` has no name of its own; name a folder that is to be made")
    if path.is_symlink():
        raise ConfigError(f"`{path}` is a link; name the folder itself")
    if path.is_file():
        raise ConfigError(f"`{path}` is a file, and a SavedModel is a folder; name another, or remove the file")
    entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in entries if name not in _SAVED_MODEL_ENTRIES]
    if foreign or (entries and "saved_model.pb" not in entries):
        raise ConfigError(
            f"`{path}` is a folder that holds something other than a SavedModel (`{(foreign or entries)[0]}`), which "
            "writing would remove; name another folder"
        )
    return path


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder next to ``path``, which is gone at the end unless `replace_folder` has moved it.

    Raises:
        ConversionError: If it can't be made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(f"`{path}` can't be written: {error.strerror or error}") from None
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Move a folder to its name; a folder that had it is removed once the new one is there.

    Raises:
        ConversionError: If it can't be moved; an old folder is still there.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        if old.exists():
            old.rename(path)
        raise ConversionError(f"`{path}` can't be written: {error.strerror or error}") from None
    shutil.rmtree(old, ignore_errors=True)


def size_of(path: str | Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    path = Path(path)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; of a folder, over its files' names and hashes, sorted."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        told = "".join(f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
        return hashlib.sha256(told.encode("utf8")).hexdigest()
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
