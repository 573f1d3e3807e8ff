"""What is known of a model's channels: labelled tensors and weights, what a cut changes and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dwindle.pruning.labels import Labels

Axes = tuple[np.ndarray | None, ...]
#: What a cut keeps: from a vector of labels to the positions that stay.
Kept = Callable[[np.ndarray], np.ndarray]
ConfigEdit = Callable[[dict[str, Any], Kept], dict[str, Any]]

# Single-input operations that work entry by entry: running them would only take time.
ENTRYWISE = {
    "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "swish", "sigmoid", "hard_sigmoid",
    "hard_silu", "hard_swish", "tanh", "hard_tanh", "softplus", "softsign", "exponential", "mish", "log_sigmoid",
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its shape, with any size for the samples, and the labels along each axis."""

    shape: tuple[int, ...]
    dtype: str
    axes: Axes

    @classmethod
    def plain(cls, shape: Sequence[int], dtype: str = "float32") -> Value:
        """Return a tensor without labels."""
        return cls(tuple(shape), dtype, (None,) * len(shape))

    def relabelled(self, axis: int, labels: np.ndarray | None, size: int | None = None) -> Value:
        """Return the same tensor with other labels, and another size, along one axis."""
        axes, shape = list(self.axes), list(self.shape)
        axes[axis] = labels
        shape[axis] = shape[axis] if size is None else size
        return Value(tuple(shape), self.dtype, tuple(axes))


@dataclass
class Site:
    """A weight, and the labels along each of its axes."""

    path: str
    key: str
    variable: Any
    axes: list[np.ndarray | None]
    roles: tuple[str, ...]


@dataclass
class Analysis:
    """The result of a walk: labels, the weights that carry them, what cutting changes, and what it saves.

    Attributes:
        labels: The labels, united and pinned.
        sites: The weights of the layers that are known, by path and key.
        edits: What cutting changes in the config of each layer.
        node_edits: What it changes in the arguments of single calls: path and call to an entry of
            `OPERATION_EDITS` and its labels.
        macs: Multiply-accumulates of a sample: factors, sizes and label vectors, of each call.
        ambiguous: Operations that can carry labels along one of several output axes.
        normalized: Layers that take statistics over labelled axes, and the labels of their input.
    """

    choices: Mapping[Any, int] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    sites: dict[tuple[str, str], Site] = field(default_factory=dict)
    edits: dict[str, ConfigEdit] = field(default_factory=dict)
    node_edits: dict[tuple[str, int], Callable[[Any, Kept], Any]] = field(default_factory=dict)
    macs: list[tuple[float, tuple[np.ndarray, ...]]] = field(default_factory=list)
    ambiguous: dict[Any, list[int]] = field(default_factory=dict)
    normalized: dict[str, Axes] = field(default_factory=dict)
    batch: int | None = None
    _ties: dict[Any, list[Axes]] = field(default_factory=dict)
    _widths: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def tie(self, key: Any, axes: Axes, reason: str) -> None:
        """Unite the labels with those that the same place saw before; pin what meets an axis without labels."""
        if key not in self._ties:
            self._ties[key] = [axes]
            return
        for before, now in zip(self._ties[key][0], axes, strict=True):
            if before is not None and now is not None and len(before) == len(now):
                self.labels.unite(before, now)
            else:
                for one in (before, now):
                    if one is not None:
                        self.labels.pin(one, reason)

    def pin(self, value: Value, reason: str, axes: Sequence[int] | None = None) -> None:
        """Pin all labels of a tensor, or those of some axes."""
        for axis in range(len(value.axes)) if axes is None else axes:
            labels = value.axes[axis]
            if labels is not None:
                self.labels.pin(labels, reason)

    def cost(self, factor: float, *sizes: int | tuple[int, np.ndarray | None]) -> None:
        """Add the multiply-accumulates of a call: the product of sizes, some of which shrink with their labels."""
        vectors = []
        for size in sizes:
            if isinstance(size, tuple) and size[1] is not None:
                vectors.append(size[1])
            else:
                factor *= size[0] if isinstance(size, tuple) else size
        self.macs.append((float(factor), tuple(vectors)))


def removable(analysis: Analysis) -> float:
    """Return how many parameters belong to channels that are not pinned."""
    total = 0.0
    for site in analysis.sites.values():
        fixed = 1.0
        for labels in site.axes:
            if labels is not None:
                classes = np.unique(analysis.labels.resolve(labels))
                free = analysis.labels.free(labels)
                # A single channel never goes.
                fixed *= 1 - (len(free) / len(classes) if len(classes) > 1 else 0)
        total += float(np.prod(site.variable.shape)) * (1 - fixed)
    return total


def taken(array: np.ndarray, value: Value, kept: Kept) -> np.ndarray:
    """Return the array with the positions that stay, along every axis with labels."""
    for axis, vector in enumerate(value.axes):
        if vector is not None:
            array = np.take(array, kept(vector), axis=axis)
    return array


def activation_name(activation: Any) -> str:
    """Return the name of an activation function, or of an activation layer's kind."""
    return str(getattr(activation, "__name__", None) or type(activation).__name__)
