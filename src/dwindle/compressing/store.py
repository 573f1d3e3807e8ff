"""The out folder: what is in it, who owns it, and how it survives an interruption at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, ConversionError
from dwindle.files import write_text

_MARK = "dwindle-run.json"


class Store:
    """The folder of one run of `compress`.

    A trial is a folder ``trials/NNN``; it is made under a temporary name and renamed when all its files are there, so
    what has its final name is whole. The run's mark holds a fingerprint of model, data and seed.

    Args:
        folder: The out folder.
        fingerprint: Plain data that must be the same to go on with an earlier run.
        resume: Go on with the run that is there.
        force: Throw away the run that is there and begin anew.

    Raises:
        ConfigError: If the folder is not ours, holds a run and neither ``resume`` nor ``force`` is given, or holds
            the run of another model, data or seed.
        ConversionError: If it can't be written.
    """

    def __init__(
        self, folder: str | Path, fingerprint: Mapping[str, Any], *, resume: bool = False, force: bool = False
    ) -> None:
        self.folder = Path(folder)
        self._mark = self.folder / _MARK
        check_out_folder(folder, resume=resume, force=force)
        if self._mark.exists() and resume:
            before = json.loads(self._mark.read_text(encoding="utf8"))
            for key, value in fingerprint.items():
                if before.get(key) != value:
                    raise ConfigError(
                        f"`{self.folder}` holds a run with another {key.replace('_', ' ')}; "
                        "resume it with what it was begun with, or choose another folder"
                    )
        elif self._mark.exists():
            for name in ("trials", "teacher", "model.tflite", "model.keras", "report.html", "report.json", "plan.yaml"):
                _remove(self.folder / name)
        try:
            (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"`{self.folder}` can't be written: {error.strerror or error}") from None
        for leftover in (self.folder / "trials").glob(".*"):
            _remove(leftover)
        write_text(self._mark, json.dumps(dict(fingerprint), indent=2))

    @property
    def teacher(self) -> Path:
        """The folder for what the original says of the training samples."""
        return self.folder / "teacher"

    def tidy(self) -> None:
        """Remove what only trials in progress need."""
        _remove(self.teacher)

    def begin(self, number: int) -> Path:
        """Return an empty folder for the files of a trial in progress."""
        path = self.folder / "trials" / f".{number:03d}.{os.getpid()}"
        _remove(path)
        path.mkdir(parents=True)
        return path

    def finish(self, number: int, working: Path, record: Mapping[str, Any]) -> None:
        """Write a trial's record and give its folder its final name."""
        write_text(working / "trial.json", json.dumps(dict(record), indent=2))
        final = self.folder / "trials" / f"{number:03d}"
        _remove(final)
        working.rename(final)

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return a finished trial's record, or None."""
        path = self.folder / "trials" / f"{number:03d}" / "trial.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError):
            return None
        return record

    def publish(self, trial: str) -> None:
        """Copy a trial's file and its trainable twin to the top of the folder, each in one rename."""
        source = self.folder / "trials" / trial
        for name in ("model.tflite", "model.keras"):
            if (source / name).exists():
                temporary = self.folder / f".{name}.{os.getpid()}.tmp"
                try:
                    shutil.copyfile(source / name, temporary)
                    temporary.replace(self.folder / name)
                except OSError as error:
                    temporary.unlink(missing_ok=True)
                    raise ConversionError(f"`{self.folder / name}` can't be written: {error.strerror}") from None


def check_out_folder(folder: str | Path, *, resume: bool = False, force: bool = False) -> None:
    """Check the out folder before any work is done.

    Raises:
        ConfigError: If it is a file, not ours, or holds a run and neither ``resume`` nor ``force`` is given.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`{folder}` is a file; name a folder for the results")
    ours = (folder / _MARK).exists()
    if folder.is_dir() and not ours and any(folder.iterdir()):
        raise ConfigError(
            f"`{folder}` has files that dwindle did not write; name a new or empty folder (nothing was changed)"
        )
    if ours and not resume and not force:
        raise ConfigError(f"`{folder}` holds an earlier run; go on with --resume, or write over it with --force")
    if resume and not ours:
        raise ConfigError(f"`{folder}` holds no run to resume; leave --resume out")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
