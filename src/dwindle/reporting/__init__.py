"""Reports: the result of a run as JSON, as one HTML page, as a model card, and in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwindle.files import write_text
from dwindle.reporting.blame import blame_svg, print_blame
from dwindle.reporting.card import render_card
from dwindle.reporting.numbers import format_bytes, format_metric, format_ms
from dwindle.reporting.page import headline, render_html, verdict_line
from dwindle.reporting.sensitivity import print_sensitivity, sensitivity_svg
from dwindle.reporting.state import read_state
from dwindle.reporting.tables import print_comparison, print_inspection, terminal_summary

__all__ = [
    "blame_svg", "format_bytes", "format_metric", "format_ms", "headline", "print_blame", "print_comparison",
    "print_inspection", "print_sensitivity", "read_state", "rebuild_report", "render_card", "render_html",
    "sensitivity_svg", "terminal_summary", "verdict_line", "write_report",
]  # fmt: skip


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path, Path]:
    """Write ``report.json``, ``report.html`` and ``model-card.md`` into a folder.

    Args:
        report: Plain data, version 1.
        folder: Where to write.

    Returns:
        The three paths.

    Raises:
        ConversionError: If they can't be written.
    """
    folder, text = Path(folder), json.dumps(report, indent=2, ensure_ascii=False)
    data = write_text(folder / "report.json", text + "\n")
    return (data, *_write_pages(json.loads(text), folder))


def rebuild_report(folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``model-card.md`` anew from what an out folder holds, finished or not.

    Args:
        folder: The out folder of `compress`.

    Returns:
        The two paths.

    Raises:
        DataError: If there is neither a report nor a trial.
        ConversionError: If they can't be written.
    """
    return _write_pages(read_state(folder), Path(folder))


def _write_pages(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    page = write_text(folder / "report.html", render_html(report))
    return page, write_text(folder / "model-card.md", render_card(report))
