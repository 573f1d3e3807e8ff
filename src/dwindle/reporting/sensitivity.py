"""What `dwindle sensitivity` shows: a table and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from html import escape as html_escape
from typing import Any

from dwindle.reporting.tables import console_of

_ROW, _NAME, _CELL, _TOP = 26, 260, 92, 84


def print_sensitivity(found: Mapping[str, Any], console: Any = None) -> None:
    """Print the metric of each layer at each sparsity, and the advice.

    Args:
        found: `dwindle.layer_sensitivity.Sensitivity.to_dict`.
        console: A `rich.console.Console`; None: standard output.
    """
    from rich.markup import escape
    from rich.table import Table

    console = console or console_of()
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    for sparsity in found["sparsities"]:
        table.add_column(f"{sparsity:.3g}", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in found["rows"]:
        figures = ["–" if value is None else f"{value:.4f}" for value in row["values"]]
        table.add_row(escape(row["layer"]), f"{row['parameters']:,}", *figures, escape(row["reason"]))
    console.print(table)
    console.print()
    how = escape(f"{found['structure']}, {found['criterion']}")
    console.print(
        f"{escape(found['metric'])} on {found['samples']:,} samples with one layer pruned ({how}): "
        f"{found['baseline']:.4f} as it is"
    )
    console.print(escape(found["advice"]))


def sensitivity_svg(found: Mapping[str, Any]) -> str:
    """Return a picture: a row for each layer, a column for each sparsity, the darker the more is lost.

    Args:
        found: `dwindle.layer_sensitivity.Sensitivity.to_dict`.
    """
    rows, sparsities = found["rows"], found["sparsities"]
    sign = 1.0 if found["higher_is_better"] else -1.0
    losses = [[None if v is None else sign * (found["baseline"] - v) for v in row["values"]] for row in rows]
    largest = max([loss for each in losses for loss in each if loss is not None] + [1e-9])
    advice = textwrap.wrap(found["advice"], 96)
    width = _NAME + _CELL * len(sparsities) + 24
    width = max(width, 700)
    height = _TOP + _ROW * len(rows) + 30 + 20 * len(advice)
    title = f"{found['metric']} with one layer pruned ({found['structure']}); {found['baseline']:.4f} as it is"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" font-weight="600" fill="#1a1a1a">{html_escape(title)}</text>',
    ]
    for column, sparsity in enumerate(sparsities):
        middle = _NAME + column * _CELL + _CELL / 2
        parts.append(f'<text x="{middle}" y="{_TOP - 12}" text-anchor="middle" fill="#555">{sparsity:.0%}</text>')
    for number, (row, each) in enumerate(zip(rows, losses, strict=True)):
        top = _TOP + number * _ROW
        name = row["layer"] if len(row["layer"]) <= 34 else f"…{row['layer'][-33:]}"
        parts.append(
            f'<text x="{_NAME - 10}" y="{top + 17}" text-anchor="end" fill="#1a1a1a">{html_escape(name)}</text>'
        )
        for column, (value, loss) in enumerate(zip(row["values"], each, strict=True)):
            share = 0.0 if loss is None else min(max(loss / largest, 0.0), 1.0)
            fill = "#eeeeee" if loss is None else _shade(share)
            left = _NAME + column * _CELL
            parts.append(
                f'<rect x="{left + 1}" y="{top + 1}" width="{_CELL - 2}" height="{_ROW - 2}" rx="2" fill="{fill}"/>'
            )
            ink = "#ffffff" if share > 0.6 else "#1a1a1a"
            shown = "–" if value is None else f"{value:.4f}"
            parts.append(
                f'<text x="{left + _CELL / 2}" y="{top + 17}" text-anchor="middle" fill="{ink}">{shown}</text>'
            )
    for number, line in enumerate(reversed(advice)):
        parts.append(f'<text x="16" y="{height - 18 - 20 * number}" fill="#1a1a1a">{html_escape(line)}</text>')
    return "\n".join([*parts, "</svg>"])


def _shade(share: float) -> str:
    """Return a color between near white and brick, for a share in [0, 1]."""
    light, dark = (0xF4, 0xF1, 0xEC), (0xB5, 0x48, 0x2F)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True))
