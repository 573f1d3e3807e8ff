"""The report of an out folder, also of one whose search is not finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwindle.compressing.store import DATABASE, read_trials
from dwindle.errors import ConfigError, DataError

VERSION = 1


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return the content of ``report.json``; where trials were made since, or there is none yet, the state so far.

    Args:
        folder: The out folder of `compress`.

    Returns:
        The report; of an unfinished search with ``status`` ``"running"``, and the smallest file that meets the goals
        so far as ``result``.

    Raises:
        DataError: If the folder has neither a report nor trials, or its report can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"`{folder}` is no folder; name the out folder of dwindle compress")
    report, (trials, last) = _report(folder / "report.json"), _trials(folder)
    if report is not None:
        known = {trial.get("id") for trial in report.get("trials") or []}
        written = max((made for made, _ in _made(folder / "report.json")), default=0)
        if last <= written or known.issuperset(trial.get("id") for trial in trials):
            return report
    elif not trials and not (folder / "trials").is_dir():
        raise DataError(f"`{folder}` has no report.json and no trials; name the out folder of dwindle compress")
    return _so_far(report or {}, trials)


def stamp(folder: str | Path) -> str:
    """Return text that changes when the state does."""
    folder = Path(folder)
    watched = [folder / "report.json", *(folder / f"{DATABASE}{end}" for end in ("", "-wal"))]
    return " ".join(f"{path}:{made}:{size}" for path in watched for made, size in _made(path))


def _made(path: Path) -> list[tuple[int, int]]:
    """Return when a file was written and how large it is; nothing where there is none at this moment."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [(found.st_mtime_ns, found.st_size)]


def _report(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` can't be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(report, dict) or report.get("version") != VERSION:
        version = report.get("version") if isinstance(report, dict) else None
        raise DataError(f"`{path}` has version {version!r}; this dwindle reads reports of version {VERSION}")
    return report


def _trials(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of finished trials, and when the last was written."""
    if not (folder / DATABASE).exists():
        return [], 0
    try:
        found = read_trials(folder)
    except ConfigError as error:
        raise DataError(str(error)) from None
    last = max((made for end in ("", "-wal") for made, _ in _made(folder / f"{DATABASE}{end}")), default=0)
    return [_without_plan(trial) for trial in found], last


def _without_plan(trial: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in trial.items() if key != "plan"}


def _so_far(frame: Mapping[str, Any], trials: list[dict[str, Any]]) -> dict[str, Any]:
    kept = ("dwindle", "command", "seed", "model", "target", "data", "goals", "environment")
    metric = {**(frame.get("metric") or {"name": "accuracy", "higher_is_better": True}), "judged_on": "validation"}
    done = [trial for trial in trials if trial.get("status", "done") == "done"]
    meeting = [trial for trial in done if trial.get("meets") and trial["id"] != "000"]
    return {
        "version": VERSION, **{key: frame[key] for key in kept if key in frame}, "metric": metric,
        "status": "running", "met": False, "baseline": done[0] if done else None, "trials": trials,
        "result": min(meeting, key=lambda trial: trial.get("size_bytes") or 0, default=None),
    }  # fmt: skip
