"""How sure a difference in accuracy is that was measured on the same samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dwindle.measuring.accuracy import right

#: Quantile of the normal distribution for one-sided 95%.
_SURE = 1.6448536269514722


@dataclass(frozen=True, kw_only=True)
class PairedDrop:
    """A loss of accuracy between two files on the same samples.

    Attributes:
        samples: How many there are.
        only_before: Samples that only the first file has right.
        only_after: Samples that only the second has right.
        drop: The loss, ``(only_before - only_after) / samples``.
        upper: With 95% confidence the loss on all such samples is at most this.
    """

    samples: int
    only_before: int
    only_after: int
    drop: float
    upper: float

    @property
    def error(self) -> float:
        """Standard error of the loss, with the same half observations as in `upper`."""
        b, c, n = self.only_before + 0.5, self.only_after + 0.5, self.samples + 2
        return math.sqrt(b + c - (b - c) ** 2 / n) / n

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def paired_drop(before: np.ndarray, after: np.ndarray, y: np.ndarray) -> PairedDrop:
    """Compare two files' outputs for the same samples.

    Errors that both make say nothing of the difference, so the bound is much tighter than that of two accuracies on
    their own: with half an observation more in each cell, ``b = only_before + 1/2`` and ``c = only_after + 1/2`` of
    ``n + 2`` samples, it is ``(b - c) / n + 1.645 sqrt(b + c - (b - c)^2 / n) / n``.

    Args:
        before: Outputs of the first file, as `dwindle.measuring.accuracy.accuracy` takes them.
        after: Outputs of the second.
        y: Labels.

    References:
        Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions, Statistics in
        Medicine 24(5), section 3.
    """
    first, second = right(before, y), right(after, y)
    only_before, only_after, samples = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    b, c, n = only_before + 0.5, only_after + 0.5, samples + 2
    upper = (b - c) / n + _SURE * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return PairedDrop(
        samples=samples, only_before=only_before, only_after=only_after, drop=(only_before - only_after) / samples,
        upper=upper,
    )  # fmt: skip
