"""Which plans are tried, in the order of their cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from dwindle.compressing.goals import Goals
from dwindle.compressing.plans import Plan
from dwindle.errors import UnsupportedModelError
from dwindle.shrinking import shrink

# Each student is this much narrower than the one before; the narrowest is a twentieth as wide as the original.
NARROWER = 0.7
NARROWEST = 0.05
# What an int8 file holds besides its weights: names, scales and the graph, about this much a layer.
BYTES_PER_LAYER = 450


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
    """Yield widths from wide to narrow, the first one the widest whose int8 file can meet the size goal."""
    width = 0.7
    if goals.max_size is not None:
        steps = [round(0.9 * 0.95**number, 3) for number in range(60)]
        width = next(
            (w for w in steps if w >= NARROWEST and _expected_bytes(model, w, say) <= int(goals.max_size)), 0.0
        )
    while width >= NARROWEST:
        if _expected_bytes(model, width, say) == float("inf"):
            return
        yield width
        width = round(width * NARROWER, 3)


def _expected_bytes(model: keras.Model, width: float, say: Any) -> float:
    """Return about how large the int8 file of a student of this width is; infinite where there is none."""
    try:
        twin = shrink(model, width=width)
    except UnsupportedModelError as error:
        say(f"no student {width:g} as wide: {error}")
        return float("inf")
    channels = sum(int(variable.shape[-1]) for variable in twin.trainable_variables if len(variable.shape) > 1)
    # Each channel has a scale and a zero point for its weights and for its bias, and a bias of 32 bits.
    return float(twin.count_params() + 28 * channels + BYTES_PER_LAYER * len(twin.layers))


def smallest_int8_bytes(model: keras.Model) -> int:
    """Return a lower bound for any int8 file of the model at its own size: one byte a parameter."""
    return int(model.count_params())
