"""Which plans are tried, in the order of their cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from dwindle.compressing.goals import Goals
from dwindle.compressing.plans import Plan
from dwindle.errors import UnsupportedModelError
from dwindle.shrinking import shrink

WIDTHS = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)
# What an int8 file holds besides its weights: names, scales and the graph, about this much a layer.
_BYTES_PER_LAYER = 700


def after_training(needs_no_data: bool) -> list[Plan]:
    """Return the plans without training: seconds each.

    Args:
        needs_no_data: Leave out what needs calibration samples.
    """
    plans = [] if needs_no_data else [Plan(name="int8 after training", steps=(("export", {"scheme": "int8"}),))]
    return [
        *plans,
        Plan(name="int8 weights, dynamic", steps=(("export", {"scheme": "int8-dynamic"}),)),
        Plan(name="float16", steps=(("export", {"scheme": "float16"}),)),
    ]


def same_size(epochs: int) -> list[Plan]:
    """Return the plans that train the model at its own size: quantized, pruned, and both."""
    short = max(1, epochs // 4)
    tune = {"epochs": short, "learning_rate": 2e-4}
    return [
        Plan(
            name="int8 in training, distilled",
            steps=(("quantize", {}), ("train", tune), ("export", {"scheme": "int8"})),
        ),
        Plan(
            name="80% pruned, distilled, int8",
            steps=(("prune", {"sparsity": 0.8}), ("train", {"epochs": short * 2}), ("export", {"scheme": "int8"})),
        ),
        Plan(
            name="80% pruned, then int8 in training, distilled",
            steps=(
                ("prune", {"sparsity": 0.8}), ("train", {"epochs": short * 2}), ("quantize", {}), ("train", tune),
                ("export", {"scheme": "int8"}),
            ),
        ),
    ]  # fmt: skip


def student(width: float, epochs: int) -> Plan:
    """Return the plan of a narrower student, distilled from the original and then quantized in training."""
    return Plan(
        name=f"student {width:g} as wide, distilled, int8 in training",
        steps=(
            ("shrink", {"width": width}), ("train", {"epochs": epochs, "learning_rate": 2e-3}), ("quantize", {}),
            ("train", {"epochs": max(1, epochs // 4), "learning_rate": 2e-4}), ("export", {"scheme": "int8"}),
        ),
    )  # fmt: skip


def student_widths(model: keras.Model, goals: Goals, say: Any) -> Iterator[float]:
    """Yield widths from wide to narrow, without those whose int8 file can't meet the size goal."""
    for width in WIDTHS:
        try:
            twin = shrink(model, width=width)
        except UnsupportedModelError as error:
            say(f"no student {width:g} as wide: {error}")
            return
        layers = len(twin.layers)
        expected = twin.count_params() + layers * _BYTES_PER_LAYER
        if goals.max_size is not None and expected > int(goals.max_size) * 1.15:
            continue
        yield width


def smallest_int8_bytes(model: keras.Model) -> int:
    """Return a lower bound for any int8 file of the model at its own size: one byte a parameter."""
    return int(model.count_params())
