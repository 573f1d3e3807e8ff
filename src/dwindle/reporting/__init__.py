"""Reports: the result of a run as JSON, as one HTML page, and in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwindle.files import write_text
from dwindle.reporting.blame import blame_svg, print_blame
from dwindle.reporting.numbers import format_bytes, format_metric, format_ms
from dwindle.reporting.page import headline, render_html, verdict_line
from dwindle.reporting.sensitivity import print_sensitivity, sensitivity_svg
from dwindle.reporting.tables import print_comparison, print_inspection, terminal_summary

__all__ = [
    "blame_svg", "format_bytes", "format_metric", "format_ms", "headline", "print_blame", "print_comparison",
    "print_inspection", "print_sensitivity", "render_html", "sensitivity_svg", "terminal_summary", "verdict_line",
    "write_report",
]  # fmt: skip


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into a folder.

    Args:
        report: Plain data, version 1.
        folder: Where to write.

    Returns:
        The two paths.

    Raises:
        ConversionError: If they can't be written.
    """
    folder = Path(folder)
    data = write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return data, write_text(folder / "report.html", render_html(report))
