"""What clustering has reached: values and bits of each weight."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from dwindle.clustering.shared_values import SharedValues, entropy_bits
from dwindle.weights import walk_layers


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """What one clustered weight has.

    Attributes:
        clusters: Values that a table may have.
        distinct: Values that the fullest table has.
        tables: How many tables there are.
        weights: Number of weights.
        zeros: How many of them are 0.
        bits: What an ideal entropy coder spends on the numbers of all weights.
    """

    clusters: int
    distinct: int
    tables: int
    weights: int
    zeros: int
    bits: float


def clusters_of(model: keras.Model) -> dict[str, Clustered]:
    """Map ``layer/weight`` to what each clustered weight of the model has now, before any quantization."""
    found = {}
    for path, layer in walk_layers(model):
        for key in layer.__dict__.get("_dwindle_transforms", {}):
            for transform, _ in layer.transforms_and_states(key):
                if isinstance(transform, SharedValues):
                    weight = layer.effective_before(key, order=transform.order + 1)
                    found[f"{path}/{key}"] = _clustered(transform, weight)
    return found


def _clustered(transform: SharedValues, weight: np.ndarray) -> Clustered:
    counts = [np.unique(points, return_counts=True)[1] for points in transform.tables(weight.shape).groups(weight)]
    return Clustered(
        clusters=transform.clusters, distinct=max(len(row) for row in counts), tables=len(counts),
        weights=weight.size, zeros=int((weight == 0).sum()), bits=sum(entropy_bits(row[None]) for row in counts),
    )  # fmt: skip
