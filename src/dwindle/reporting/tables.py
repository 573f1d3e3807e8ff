"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dwindle.reporting.advice import suggestions
from dwindle.reporting.numbers import format_bytes, format_metric, format_ms
from dwindle.reporting.page import headline, verdict_line


def console_of() -> Any:
    """Return a console for standard output."""
    import sys

    from rich.console import Console

    # Not a terminal: wide enough that no cell is folded, plain text.
    return Console() if sys.stdout.isatty() else Console(width=140, no_color=True, highlight=False)


def terminal_summary(report: Mapping[str, Any], console: Any = None) -> None:
    """Print the trials, the verdict, the goals, and what to try where one is missed.

    Args:
        report: The content of ``report.json``.
        console: A `rich.console.Console`; None: standard output.
    """
    from rich.markup import escape
    from rich.table import Table

    console = console or console_of()
    name = (report.get("metric") or {}).get("name", "accuracy")
    table = Table(box=None, pad_edge=False)
    table.add_column("#")
    table.add_column("trial", overflow="fold")
    for column in (name, "size", "p50", "RAM"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("goals")
    chosen = (report.get("result") or {}).get("id")
    for number, trial in enumerate(report.get("trials") or []):
        done = trial.get("status", "done") == "done"
        mark = "chosen" if trial.get("id") == chosen else ("met" if trial.get("meets") else "missed")
        table.add_row(
            str(trial.get("id", number)), escape(str(trial.get("name"))),
            format_metric(trial.get("accuracy"), name) if done else "–", format_bytes(trial.get("size_bytes")),
            format_ms((trial.get("latency_ms") or {}).get("p50")), format_bytes(trial.get("ram_bytes")),
            ("" if number == 0 and trial.get("id") != chosen else mark) if done else str(trial.get("status")),
            style="bold" if trial.get("id") == chosen else None,
        )  # fmt: skip
    console.print(table)
    console.print()
    console.print(f"[bold]{escape(headline(report))}[/bold] {escape(verdict_line(report))}")
    for verdict in report.get("verdicts") or []:
        console.print(f"  {'met   ' if verdict['met'] else 'missed'}  {escape(verdict['text'])}")
    for line in suggestions(report):
        console.print(f"  try     {escape(line)}")


def print_comparison(rows: Sequence[Mapping[str, Any]], console: Any = None) -> None:
    """Print files side by side.

    Args:
        rows: What `dwindle.measuring.Compared.to_dict` returns, the first file first.
        console: A `rich.console.Console`; None: standard output.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    name, files = rows[0]["metric"], _short([row["file"] for row in rows])
    for column in (name, "size", "smaller", "p50", "faster", "RAM", "same class", "largest difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row, file in zip(rows, files, strict=True):
        same, difference = row["same_class"], row["max_difference"]
        table.add_row(
            escape(file), format_metric(row["accuracy"], name), format_bytes(row["size_bytes"]),
            f"{row['times_smaller']:.2f}x", format_ms(row["latency_ms"]["p50"]), f"{row['times_faster']:.2f}x",
            format_bytes(row["ram_bytes"]), "–" if same is None else f"{same:.2%}",
            "–" if difference is None else f"{difference:.3g}",
        )  # fmt: skip
    (console or console_of()).print(table)


def _short(files: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that tell them apart."""
    parts = [PurePath(file).parts for file in files]
    for length in range(1, max(map(len, parts), default=1)):
        ends = [str(PurePath(*part[-length:])) for part in parts]
        if len(set(ends)) == len(set(files)):
            return ends
    return list(files)


def print_inspection(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any], console: Any = None) -> None:
    """Print a table of operators or layers.

    Args:
        rows: What `dwindle.measuring.Row.to_dict` gives.
        totals: ``size_bytes``, ``weights_bytes`` and ``parameters``.
        console: A `rich.console.Console`; None: standard output.
    """
    from rich.markup import escape
    from rich.table import Table

    console = console or console_of()
    table = Table(box=None, pad_edge=False)
    for column in ("#", "operator"):
        table.add_column(column, no_wrap=True)
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=44)
    for column in ("output", "parameters", "bytes", "bits", "zeros", "values"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shape = "×".join(str(size) for size in row["output_shape"])
        weights = row["bits"] > 0
        table.add_row(
            str(row["index"]), escape(row["op"]), escape(row["name"]), shape, f"{row['parameters']:,}",
            f"{row['size_bytes']:,}", str(row["bits"]) if weights else "", f"{row['sparsity']:.1%}" if weights else "",
            f"{row['distinct']:,}" if weights else "",
        )  # fmt: skip
    console.print(table)
    rest = totals["size_bytes"] - totals["weights_bytes"]
    console.print(
        f"{totals['parameters']:,} parameters, {totals['size_bytes']:,} bytes: {totals['weights_bytes']:,} of "
        f"constants and {rest:,} of graph, names and tables"
    )
