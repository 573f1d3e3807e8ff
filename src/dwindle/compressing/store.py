"""The out folder: what is in it, who owns it, and how it survives an interruption at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, ConversionError
from dwindle.files import size_of

DATABASE = "trials.sqlite"
PUBLISHED = ("model.tflite", "model.keras")
# What a run writes at the top of its folder; `--force` removes these and nothing else.
_OURS = (
    "trials", "teacher", "stages", "shared", "micro", *PUBLISHED, "report.html", "report.json", "model-card.md",
    "plan.yaml", DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal",
)  # fmt: skip
_TABLES = """
create table if not exists marks (name text primary key, value text not null);
create table if not exists trials (number integer primary key, record text not null);
create table if not exists screened (recipe text primary key, figures text not null);
"""


class Store:
    """The folder of one run of `compress`.

    Records of trials are rows of an SQLite database, their files folders ``trials/NNN``. Files are made under a
    temporary name, the folder is renamed, and then the row is written in one transaction: what has a row is whole. The
    database also holds a fingerprint of model, data and seed. While a run goes on, another one is refused.

    Args:
        folder: The out folder.
        fingerprint: Plain data that must be the same to go on with an earlier run.
        resume: Go on with the run that is there.
        force: Throw away the run that is there and begin anew.

    Raises:
        ConfigError: If the folder is not ours, holds a run and neither ``resume`` nor ``force`` is given, holds
            the run of another model, data or seed, or is in use.
        ConversionError: If it can't be written.
    """

    def __init__(
        self, folder: str | Path, fingerprint: Mapping[str, Any], *, resume: bool = False, force: bool = False
    ) -> None:
        self.folder = Path(folder)
        check_out_folder(folder, resume=resume, force=force)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"`{self.folder}` can't be written: {error.strerror or error}") from None
        self._lock = _lock(self.folder)
        try:
            if not resume:
                for name in _OURS:
                    _remove(self.folder / name)
            (self.folder / "trials").mkdir(exist_ok=True)
            self._database = _opened(self.folder / DATABASE)
            self._check_marks({key: str(value) for key, value in fingerprint.items()})
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError | sqlite3.Error):
                raise ConversionError(f"`{self.folder}` can't be written: {error}") from None
            raise
        for leftover in (self.folder / "trials").glob(".*"):
            _remove(leftover)

    def _check_marks(self, wanted: Mapping[str, str]) -> None:
        before = dict(self._database.execute("select name, value from marks"))
        for key, value in wanted.items():
            if before and before.get(key) != value:
                raise ConfigError(
                    f"`{self.folder}` holds a run with another {key.replace('_', ' ')}; "
                    "resume it with what it was begun with, or choose another folder"
                )
        with self._database:
            self._database.executemany("insert or replace into marks values (?, ?)", wanted.items())

    def close(self) -> None:
        """Let others use the folder."""
        self._database.close()
        self._lock.release()

    @property
    def teacher(self) -> Path:
        """The folder for what the original says of the training samples."""
        return self.folder / "teacher"

    @property
    def stages(self) -> Path:
        """The folder for models between steps."""
        return self.folder / "stages"

    @property
    def shared(self) -> Path:
        """The folder for what worker processes read."""
        return self.folder / "shared"

    def tidy(self) -> None:
        """Remove what only trials in progress need."""
        for path in (self.teacher, self.stages, self.shared):
            _remove(path)

    def size_bytes(self) -> int:
        """Return the bytes of all files in the folder."""
        return size_of(self.folder)

    def begin(self, number: int) -> Path:
        """Return an empty folder for the files of a trial in progress."""
        path = self.folder / "trials" / f".{number:03d}.{os.getpid()}"
        _remove(path)
        path.mkdir(parents=True)
        return path

    def finish(self, number: int, working: Path, record: Mapping[str, Any]) -> None:
        """Give a trial's folder its final name and write its record."""
        final = self.folder / "trials" / f"{number:03d}"
        _remove(final)
        working.rename(final)
        self.write(number, record)

    def write(self, number: int, record: Mapping[str, Any]) -> None:
        """Write a trial's record, in one transaction."""
        with self._database:
            self._database.execute("insert or replace into trials values (?, ?)", (number, json.dumps(dict(record))))

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return a finished trial's record, or None."""
        found = self._database.execute("select record from trials where number = ?", (number,)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def screened(self, recipe: str) -> dict[str, Any] | None:
        """Return what was found about a recipe's untrained file; None where nothing was."""
        found = self._database.execute("select figures from screened where recipe = ?", (recipe,)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def keep_screened(self, recipe: str, figures: Mapping[str, Any]) -> None:
        """Keep what was found about a recipe's untrained file."""
        with self._database:
            self._database.execute("insert or replace into screened values (?, ?)", (recipe, json.dumps(dict(figures))))

    def forget_twins(self, trials: Iterable[str]) -> None:
        """Remove the trainable twins of some trials, which bounds what a long search takes.

        Args:
            trials: Their identifiers.
        """
        for trial in trials:
            (self.folder / "trials" / trial / "model.keras").unlink(missing_ok=True)

    def publish(self, trial: str) -> None:
        """Copy a trial's file and its trainable twin to the top of the folder, each in one rename."""
        source = self.folder / "trials" / trial
        for name in PUBLISHED:
            if (source / name).exists():
                temporary = self.folder / f".{name}.{os.getpid()}.tmp"
                try:
                    shutil.copyfile(source / name, temporary)
                    temporary.replace(self.folder / name)
                except OSError as error:
                    temporary.unlink(missing_ok=True)
                    raise ConversionError(f"`{self.folder / name}` can't be written: {error.strerror}") from None


def read_trials(folder: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's finished trials, also while it goes on; in the order of their numbers.

    Raises:
        ConfigError: If the folder holds no run.
    """
    path = Path(folder) / DATABASE
    if not path.exists():
        raise ConfigError(f"`{folder}` holds no run; name the folder that `dwindle compress --out` wrote")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return [json.loads(row[0]) for row in database.execute("select record from trials order by number")]
    except (sqlite3.Error, ValueError) as error:
        raise ConfigError(f"`{path}` can't be read: {error}") from None


def check_out_folder(folder: str | Path, *, resume: bool = False, force: bool = False) -> None:
    """Check the out folder before any work is done.

    Raises:
        ConfigError: If it is a file, not ours, or holds a run and neither ``resume`` nor ``force`` is given.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`{folder}` is a file; name a folder for the results")
    ours = (folder / DATABASE).exists()
    if folder.is_dir() and not ours and any(entry.name != _LOCK for entry in folder.iterdir()):
        raise ConfigError(
            f"`{folder}` has files that dwindle did not write; name a new or empty folder (nothing was changed)"
        )
    if ours and not resume and not force:
        raise ConfigError(f"`{folder}` holds an earlier run; go on with --resume, or write over it with --force")
    if resume and not ours:
        raise ConfigError(f"`{folder}` holds no run to resume; leave --resume out")


_LOCK = ".lock"


def _lock(folder: Path) -> Any:
    """Return a lock on the folder, which the system lets go when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"`{folder}` is in use by another run; wait for its end, or name another folder") from None
    except OSError as error:
        raise ConversionError(f"`{folder}` can't be written: {error.strerror or error}") from None
    return lock


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    try:
        database.executescript(_TABLES)
    except sqlite3.DatabaseError as error:
        database.close()
        raise ConfigError(f"`{path}` is damaged ({error}); begin anew with --force") from None
    return database


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
