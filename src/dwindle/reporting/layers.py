"""Layers before and after, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

Row = Mapping[str, Any]
Pair = tuple[Row | None, Row | None]


def layer_of(row: Row) -> str:
    """Return the name of a row's layer; reports of earlier versions have only the tensor's name to take it from."""
    if row.get("layer"):
        return str(row["layer"])
    parts = str(row.get("name", "")).split(";")[0].split("/")
    return parts[-2] if len(parts) > 1 else parts[0]


def pair_rows(before: Sequence[Row], after: Sequence[Row]) -> list[Pair]:
    """Return rows of two files by twos: by the name of the layer, and between those by the kind of operator.

    Args:
        before: The first file's operators in order.
        after: The second's.
    """
    return _pairs(before, after, [layer_of, lambda row: str(row["op"])])


def _pairs(before: Sequence[Row], after: Sequence[Row], keys: Sequence[Callable[[Row], str]]) -> list[Pair]:
    if not keys:
        return [*((row, None) for row in before), *((None, row) for row in after)]
    key, *rest = keys
    first, second = [key(row) for row in before], [key(row) for row in after]
    found: list[Pair] = []
    for what, i, i_end, j, j_end in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if what == "equal":
            found += zip(before[i:i_end], after[j:j_end], strict=True)
        else:
            found += _pairs(before[i:i_end], after[j:j_end], rest)
    return found


def layer_table(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rows that the report shows: operators with weights, their shapes, bits, zeros and bytes.

    Args:
        report: The content of ``report.json``.
    """
    layers = report.get("layers") or {}
    before, after = (_weighted(layers.get(key) or []) for key in ("baseline", "result"))
    if not before or not after:
        return None
    every = sum(len(layers.get(key) or []) for key in ("baseline", "result"))
    pairs = pair_rows(before, after)
    largest = max(row["size_bytes"] for row in (*before, *after))
    rows = [
        {
            "name": layer_of(first or second or {}), "op": (second or first or {}).get("op"),
            "cells": [_cell(row, largest) for row in (first, second)],
            "gone": second is None, "new": first is None,
        }
        for first, second in pairs
    ]  # fmt: skip
    totals = [sum(row["size_bytes"] for row in layers[key]) for key in ("baseline", "result")]
    return {"rows": rows, "totals": totals, "rest": every - len(before) - len(after)}


def _weighted(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with weights, or with other constants of some size."""
    total = sum(row["size_bytes"] for row in rows)
    return [row for row in rows if row["bits"] or row["size_bytes"] > total / 100]


def _cell(row: Row | None, largest: int) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "output": "×".join(map(str, row["output_shape"])), "weight": "×".join(map(str, row.get("weight_shape") or [])),
        "bits": row["bits"], "sparsity": row["sparsity"], "distinct": row["distinct"], "bytes": row["size_bytes"],
        "width": round(100 * row["size_bytes"] / largest, 1),
    }  # fmt: skip
