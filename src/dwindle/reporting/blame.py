"""What `dwindle blame` shows: a table and a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from html import escape as html_escape
from typing import Any

from dwindle.measuring.accuracy import higher_is_better
from dwindle.reporting.tables import console_of

_ROW, _NAME, _BAR, _GAP, _TOP = 24, 250, 230, 90, 70


def _value(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _bits(row: Mapping[str, Any]) -> str:
    weights = "" if row["weights"] is None else f"w{row['weights']} "
    return weights + ("float" if row["activations"] == 32 else f"a{row['activations']}")


def print_blame(found: Mapping[str, Any], console: Any = None) -> None:
    """Print the operators with what each costs, and the advice.

    Args:
        found: `dwindle.blaming.Blame.to_dict`.
        console: A `rich.console.Console`; None: standard output.
    """
    from rich.markup import escape
    from rich.table import Table

    console = console or console_of()
    table = Table(box=None, pad_edge=False)
    table.add_column("operator", overflow="fold")
    table.add_column("kind")
    table.add_column("bits")
    for column in ("SQNR dB", "max error", "range", "saturated", "only this", "all but this"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        ends = row["range"]
        table.add_row(
            escape(row["name"]), row["operator"], _bits(row), _value(row["sqnr_db"], ".1f"),
            _value(row["max_error"], ".3g"), "–" if ends is None else f"{ends[0]:.3g} .. {ends[1]:.3g}",
            _value(row["saturation"], ".2%"), _value(row["only"], ".4f"), _value(row["without"], ".4f"),
        )  # fmt: skip
    console.print(table)
    console.print()
    console.print(
        f"{escape(found['metric'])} on {found['samples']:,} samples: float {found['float_value']:.4f}, "
        f"quantized {found['quantized_value']:.4f}"
    )
    console.print(escape(found["advice"]))


def blame_svg(found: Mapping[str, Any]) -> str:
    """Return a picture of the operators: SQNR on the left, the metric with only this one quantized on the right.

    Args:
        found: `dwindle.blaming.Blame.to_dict`.
    """
    rows = found["rows"]
    advice = textwrap.wrap(found["advice"], 120)
    width, height = _NAME + 2 * (_BAR + _GAP) + 20, _TOP + _ROW * len(rows) + 30 + 20 * len(advice)
    loudest = max([row["sqnr_db"] or 0.0 for row in rows] + [1.0])
    sign = 1.0 if higher_is_better(found["metric"]) else -1.0
    losses = [sign * (found["float_value"] - row["only"]) if row["only"] is not None else 0.0 for row in rows]
    largest = max([abs(loss) for loss in losses] + [1e-6])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" font-weight="600" fill="#1a1a1a">Who costs what: float '
        f"{found['float_value']:.4f}, quantized {found['quantized_value']:.4f}</text>",
        f'<text x="{_NAME}" y="{_TOP - 12}" fill="#555">SQNR in the file, dB (longer is better)</text>',
        f'<text x="{_NAME + _BAR + _GAP}" y="{_TOP - 12}" fill="#555">lost when only this is quantized</text>',
    ]
    for number, (row, loss) in enumerate(zip(rows, losses, strict=True)):
        top = _TOP + number * _ROW
        name = row["name"] if len(row["name"]) <= 32 else f"…{row['name'][-31:]}"
        parts.append(
            f'<text x="{_NAME - 10}" y="{top + 14}" text-anchor="end" fill="#1a1a1a">{html_escape(name)}</text>'
        )
        length = max(0.0, (row["sqnr_db"] or 0.0) / loudest) * _BAR
        shown = "exact" if row["max_error"] == 0 else _value(row["sqnr_db"], ".1f")
        parts.append(f'<rect x="{_NAME}" y="{top + 3}" width="{length:.1f}" height="14" rx="2" fill="#3b6ea5"/>')
        parts.append(f'<text x="{_NAME + length + 6:.1f}" y="{top + 14}" fill="#333">{shown}</text>')
        left, length = _NAME + _BAR + _GAP, abs(loss) / largest * _BAR
        lost = "–" if row["only"] is None else f"{loss:+.4f}"
        color = "#b5482f" if loss > 0 else "#4d8c57"
        parts.append(f'<rect x="{left}" y="{top + 3}" width="{length:.1f}" height="14" rx="2" fill="{color}"/>')
        parts.append(f'<text x="{left + length + 6:.1f}" y="{top + 14}" fill="#333">{lost}</text>')
    for number, line in enumerate(reversed(advice)):
        parts.append(f'<text x="16" y="{height - 18 - 20 * number}" fill="#1a1a1a">{html_escape(line)}</text>')
    return "\n".join([*parts, "</svg>"])
