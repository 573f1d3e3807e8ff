"""What a candidate is made of, and the plan that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dwindle.compressing.plans import Plan

# Learning rates: new weights learn fast, those of the original are only repaired.
RATES = {"random": 2e-3, "teacher": 1e-3}
# Kernels run so many channels at a time: a layer with 17 takes as long as one with 20. Where time counts, layers keep a
# multiple of this; it took ResNet8 with a quarter of its multiplications from 20.2 to 15.6 us, in fewer bytes.
TOGETHER = 4
# Ways to choose channels: in words, and the options of the step.
ALLOTMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "evenly": ("its own channels", {}),
    "by-bytes": ("cut where bytes are", {"scope": "balanced", "target": "parameters"}),
    "by-work": ("cut where time goes", {"scope": "balanced", "target": "macs", "multiple": TOGETHER}),
    "globally": ("its best channels", {"scope": "global", "target": "parameters"}),
}
TUNING_RATE = 2e-4
# Largest shift of images, as a share of their height and width.
SHIFT = 0.07


# Schemes by kinds of layers: in words, and as `dwindle.quantization.resolve_scheme` takes them. Dense layers hold many
# bytes and run few multiplications, and LiteRT multiplies 4 bits about as fast there as 8; in convolutions it does not.
MIXTURES: dict[str, tuple[str, dict[str, str]]] = {
    "int4-dense": ("int8, dense layers int4", {"*": "int8", "FULLY_CONNECTED": "int4"}),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices behind a candidate; `plan` turns them into steps.

    Attributes:
        width: Factor of the layers' widths, in (0, 1].
        depth: Share of the residual blocks that stays, in (0, 1].
        start: ``"teacher"``: the channels that matter most, with their weights; ``"random"``: new weights.
        allotted: Which channels stay: ``"evenly"``, ``width`` of each layer's; ``"by-bytes"`` and ``"by-work"``: a
            layer gives the more the more parameters or multiply-accumulates its channels take; ``"globally"``: those
            that matter most in one ranking. But for the first, ``width`` squared of the parameters (or
            multiply-accumulates) are left.
        energy: Share of the spectrum that low rank keeps; 1: no low rank.
        sparsity: Fraction of single weights set to 0; it makes packed files smaller.
        clusters: Values per tensor; 0: any. It makes packed files smaller.
        scheme: Scheme of the file, or one of `MIXTURES`.
    """

    width: float = 1.0
    depth: float = 1.0
    start: str = "teacher"
    allotted: str = "evenly"
    energy: float = 1.0
    sparsity: float = 0.0
    clusters: int = 0
    scheme: str = "int8"

    @property
    def name(self) -> str:
        """What it is, in words."""
        parts = []
        if self.width < 1 or self.depth < 1:
            parts.append(f"{self.width:g} as wide" + (f", {self.depth:g} as deep" if self.depth < 1 else ""))
            parts.append(ALLOTMENTS[self.allotted][0] if self.start == "teacher" else "new weights")
        if self.energy < 1:
            parts.append(f"low rank {self.energy:g}")
        if self.sparsity > 0:
            parts.append(f"{self.sparsity:.0%} pruned")
        if self.clusters:
            parts.append(f"{self.clusters} values")
        return ", ".join([*parts, MIXTURES[self.scheme][0] if self.scheme in MIXTURES else self.scheme])

    @property
    def written(self) -> str | dict[str, str]:
        """The scheme as steps name it."""
        return MIXTURES[self.scheme][1] if self.scheme in MIXTURES else self.scheme

    def plan(self, epochs: tuple[int, ...], tuning: int, *, compact: bool = False, shifts: bool = False) -> Plan:
        """Return the plan.

        Args:
            epochs: Epochs of distilled training, in parts: a plan with more parts goes on where that with fewer ended.
            tuning: Epochs of quantized training at the end; 0: quantized after training.
            compact: Write the file without names and metadata.
            shifts: Shift the images of long trainings, in which students begin to learn samples by heart.
        """
        steps: list[tuple[str, dict[str, Any]]] = []
        _, allotment = ALLOTMENTS[self.allotted]
        width = 1.0 if allotment else self.width
        if width < 1 or self.depth < 1:
            shape = {"width": width, "depth": self.depth, "start": self.start}
            steps.append(("shrink", shape | ({"multiple": TOGETHER} if self.start == "random" else {})))
        if allotment and self.width < 1:
            share = round(1 - self.width**2, 4)
            steps.append(("prune", {"sparsity": share, "structure": "channel", "criterion": "taylor", **allotment}))
        if self.energy < 1:
            steps.append(("factorize", {"energy": self.energy}))
        if self.sparsity > 0:
            steps.append(("prune", {"sparsity": self.sparsity}))
        rate = RATES[self.start if self.width < 1 or self.depth < 1 else "teacher"]
        if steps:
            # A later part is a finer one: it begins at a smaller rate.
            steps += [
                (
                    "train",
                    {
                        "epochs": count,
                        "learning_rate": rate / 2 ** min(part, 1),
                        "shift": SHIFT * (shifts and part > 1),
                    },
                )
                for part, count in enumerate(epochs)
            ]
        if self.clusters:
            steps.append(("cluster", {"clusters": self.clusters}))
        if tuning or self.clusters:
            steps.append(("quantize", {"scheme": self.written}))
            steps.append(("train", {"epochs": max(1, tuning), "learning_rate": TUNING_RATE}))
        steps.append(("export", {"scheme": self.written, "compact": compact}))
        unit = "epoch" if epochs == (1,) else "epochs"
        told = f" ({'+'.join(map(str, epochs))} {unit})" if epochs and self.trains else ""
        return Plan(name=f"{self.name}{told}", steps=tuple(steps))

    @property
    def trains(self) -> bool:
        """Whether something changes before quantization, so that training has to repair it."""
        return self.width < 1 or self.depth < 1 or self.energy < 1 or self.sparsity > 0


def after_training(needs_no_data: bool, *, compact: bool = False) -> list[Plan]:
    """Return the plans without training: seconds each.

    Args:
        needs_no_data: Leave out what needs calibration samples.
        compact: Write files without names and metadata.
    """
    schemes = {"int8": "int8 after training", "int8-dynamic": "int8 weights, dynamic", "float16": "float16"}
    return [
        Plan(name=name, steps=(("export", {"scheme": scheme, "compact": compact}),))
        for scheme, name in schemes.items()
        if not (needs_no_data and scheme == "int8")
    ]


def same_size(epochs: int, *, compact: bool = False) -> Plan:
    """Return the plan of int8 in training at the model's own size."""
    return Plan(
        name="int8 in training, distilled",
        steps=(
            ("quantize", {}), ("train", {"epochs": max(1, epochs // 4), "learning_rate": TUNING_RATE}),
            ("export", {"scheme": "int8", "compact": compact}),
        ),
    )  # fmt: skip
