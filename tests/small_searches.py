"""Searches that take seconds."""

from __future__ import annotations

import dwindle as dw


def arrays(parts):
    return {f"{name}_{part}": array for part, both in parts.items() for name, array in zip("xy", both, strict=True)}


def quick(task, out, **options):
    model, parts = task
    wanted = {"goals": dw.Goals(max_drop="50%", max_size="5KB"), "epochs": 4, "trials": 9, **options}
    return dw.compress(model, data=arrays(parts), out=out, **wanted)
