"""Where the rules of `dwindle.pruning.layer_rules` write what they know of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dwindle.pruning.analysis import ENTRYWISE, Analysis, ConfigEdit, Kept, Site, Value, activation_name
from dwindle.weights import raw_variable

Labelled = np.ndarray | None


class Place:
    """Where a rule writes: a layer, or a layer inside a wrapper.

    Args:
        analysis: The analysis of the model.
        path: Path of the layer that the model's config names.
        keys: Attributes that lead to the inner layer.
        inside: Keys that lead to the inner layer's config in the outer one's.
    """

    def __init__(self, analysis: Analysis, path: str, keys: tuple[str, ...] = (), inside: tuple[str, ...] = ()) -> None:
        self.analysis, self.path, self.keys, self.inside = analysis, path, keys, inside
        self._edits: list[ConfigEdit] = []

    def within(self, key: str, *config: str) -> Place:
        """Return the place of an inner layer."""
        return Place(self.analysis, self.path, (*self.keys, key), (*self.inside, *config))

    def new(self, name: str, count: int) -> np.ndarray:
        """Return labels of a width of this layer: the same at each call."""
        key = (self.path, "/".join((*self.keys, name)))
        widths = self.analysis._widths
        if key not in widths:
            widths[key] = self.analysis.labels.new(count)
        return widths[key]

    def weight(self, layer: Any, name: str, *axes: tuple[Labelled, str]) -> None:
        """Say which labels each axis of a weight has, and its role; see `dwindle.pruning.channel_groups.Member`.

        Fewer axes than the weight has are its last ones. A weight that the layer does not have is left out.
        """
        variable = raw_variable(layer, name)
        if variable is None:
            return
        rank = len(variable.shape)
        full = [(None, "")] * (rank - len(axes)) + list(axes)
        labels = [vector if size > 1 or vector is None or len(vector) == 1 else None
                  for (vector, _), size in zip(full, variable.shape, strict=True)]  # fmt: skip
        key = (self.path, "/".join((*self.keys, name)))
        self.analysis.tie(
            ("weight", *key), tuple(labels), f"`{self.path}` is shared by tensors that can't be cut alike"
        )
        if key not in self.analysis.sites:
            self.analysis.sites[key] = Site(*key, variable, labels, tuple(role for _, role in full))

    def edit(self, change: ConfigEdit, what: str = "size") -> None:
        """Say what a cut changes in the layer's config; said again at another call, it counts once."""
        analysis, inside = self.analysis, self.inside
        before = analysis.edits.get(self.path)
        key = ("edit", self.path, inside, what)
        if key in analysis._ties:
            return
        analysis._ties[key] = []

        def nested(config: dict[str, Any], kept: Kept, keys: Sequence[str] = inside) -> dict[str, Any]:
            if not keys:
                return change(config, kept)
            return {**config, keys[0]: nested(config[keys[0]], kept, keys[1:])}

        def both(config: dict[str, Any], kept: Kept) -> dict[str, Any]:
            return nested(config if before is None else before(config, kept), kept)

        analysis.edits[self.path] = both

    def activated(self, activation: Any, labels: np.ndarray) -> None:
        """Pin a width whose activation does not work entry by entry, such as a softmax."""
        if activation is not None and activation_name(activation) not in ENTRYWISE:
            self.analysis.labels.pin(labels, f"activation `{activation_name(activation)}` of `{self.path}`")

    def pin_others(self, value: Value, *axes: int) -> None:
        """Pin the labels on all axes but these."""
        left = {axis % len(value.shape) for axis in axes}
        others = [axis for axis in range(len(value.shape)) if axis not in left]
        self.analysis.pin(value, f"`{self.path}` needs every position of it", others)


def counted(name: str, labels: np.ndarray, times: int = 1) -> ConfigEdit:
    """Return the edit that sets a config's size to the number of labels that stay."""
    return lambda config, kept: {**config, name: len(kept(labels)) // times}


def size_of(value: Value, axis: int) -> tuple[int, Labelled]:
    """Return the size and the labels of an axis, as `Analysis.cost` takes them."""
    return value.shape[axis], value.axes[axis]


def unknown(place: Place, layer: Any, *values: Value) -> list[Value]:
    """Pin what a layer takes that no rule covers, and return its outputs without labels."""
    for value in values:
        place.pin_others(value)
        place.analysis.pin(value, f"layer `{place.path}` ({type(layer).__name__}) is not known to channel pruning")
    shapes = [value.shape for value in values]
    shape = layer.compute_output_shape(*shapes)
    shapes = [shape] if isinstance(shape[0], int | type(None)) else list(shape)
    return [Value.plain([1 if size is None else size for size in one], values[0].dtype) for one in shapes]
