"""Groups of channels: what has to be cut together, what it costs, and what stays and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from dwindle.pruning.analysis import Analysis
from dwindle.pruning.dependencies import analyse
from dwindle.weights import check_model

#: Roles of the axes that make channels.
MAKES = ("out", "gate")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One axis of one weight that a group's channels run along.

    Attributes:
        layer: Path of the layer.
        weight: The weight's name in it.
        axis: The axis.
        role: ``out`` where the weight makes the channels, ``gate`` where it does so once for every gate of a
            recurrent layer, ``in`` where it takes them, ``scale`` in a normalization, ``through`` elsewhere.
        positions: Positions along the axis of each channel, shape ``(channels, positions of one)``.
    """

    layer: str
    weight: str
    axis: int
    role: str
    positions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that are alike: each is made, carried and taken by the same axes of the same weights.

    Attributes:
        channels: The channels, as classes of labels; each can go by itself.
        members: The axes that they run along.
        pinned: Why none of them can go; None if they can.
        width: Positions of one channel on the axis that makes it: 2 in a convolution of two groups.
        parameters: Parameters that would go with all of them.
        macs: Multiply-accumulates of a sample that would go with all of them.
    """

    channels: np.ndarray
    members: tuple[Member, ...]
    pinned: str | None
    width: int
    parameters: int
    macs: int

    @property
    def size(self) -> int:
        """How many channels there are."""
        return len(self.channels)

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the layers that make the channels."""
        return tuple(dict.fromkeys(member.layer for member in self.members if member.role in MAKES))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Paths of the layers that take them."""
        return tuple(dict.fromkeys(member.layer for member in self.members if member.role == "in"))

    def __str__(self) -> str:
        made, taken = " + ".join(self.producers) or "(given)", " + ".join(self.consumers) or "(nothing)"
        state = f"pinned: {self.pinned}" if self.pinned else f"{self.parameters:,} parameters, {self.macs:,} MACs"
        return f"{self.size:5} x {self.width}  {made} -> {taken}  ({state})"


@dataclass(frozen=True, kw_only=True)
class Groups(Sequence[Group]):
    """All groups of a model, in the order of its graph; printing it gives one line a group.

    Attributes:
        items: The groups.
        analysis: The labels that they were found from.
        parameters: Parameters of the model.
        macs: Multiply-accumulates of a sample, in layers with weights.
    """

    items: tuple[Group, ...]
    analysis: Analysis = field(repr=False)
    parameters: int
    macs: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.items)

    @property
    def pinned(self) -> dict[str, list[str]]:
        """Map each reason to the layers whose channels stay because of it."""
        found: dict[str, list[str]] = {}
        for group in self.items:
            if group.pinned:
                names = found.setdefault(group.pinned, [])
                names += [name for name in group.producers if name not in names]
        return found

    def __str__(self) -> str:
        free = sum(group.pinned is None for group in self.items)
        head = (
            f"{len(self.items)} groups, {free} of which can be cut; {self.parameters:,} parameters, {self.macs:,} MACs"
        )
        return "\n".join([head, *map(str, self.items)])


def groups(model: keras.Model) -> Groups:
    """Find the groups of channels of a model that can only be cut together.

    Channels are followed through additions, concatenation, grouped, depthwise and transposed convolution,
    normalizations, flattening, reshapes, gates, attention heads, embeddings, recurrent units, and through nested and
    shared layers. Outputs of the model, layers that are not known and operations that mix channels pin what they need.

    Args:
        model: A built functional, sequential or lifted model; it is not changed.

    Returns:
        The groups; print it, or look at each group's ``members`` and ``pinned``.

    Raises:
        ConfigError: If it is no built Keras model.
        UnsupportedModelError: For a subclassed model.

    Example:
        >>> import keras
        >>> from dwindle.pruning import groups
        >>> layers = [keras.Input((8,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(4, name="b")]
        >>> print(groups(keras.Sequential(layers)))
        2 groups, 1 of which can be cut; 82 parameters, 72 MACs
            6 x 1  a -> b  (78 parameters, 72 MACs)
            4 x 1  b -> (nothing)  (pinned: output `b` of the model)

    References:
        Fang et al. 2023, DepGraph, arXiv 2301.12900, whose groups come from rules between pairs of layers; ours come
        from labels that are carried through the operations themselves.
    """
    check_model(model)
    return grouped(model, analyse(model))


def grouped(model: keras.Model, analysis: Analysis) -> Groups:
    """Sort the channels of an analysis into groups."""
    sites = list(analysis.sites.values())
    places: dict[int, dict[tuple[int, int], np.ndarray]] = {}
    for number, site in enumerate(sites):
        for axis, labels in enumerate(site.axes):
            if labels is None:
                continue
            classes = analysis.labels.resolve(labels)
            order = np.argsort(classes, kind="stable")
            found, starts = np.unique(classes[order], return_index=True)
            for channel, positions in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
                places.setdefault(channel, {})[number, axis] = positions
    alike: dict[Any, list[int]] = {}
    for channel, held in places.items():
        key = (
            frozenset((*place, len(positions)) for place, positions in held.items()),
            analysis.labels.pinned(channel),
        )
        alike.setdefault(key, []).append(channel)
    counts = Counts(model, analysis)
    total = counts.of(np.zeros(0, np.int64))
    items = []
    for (_, pinned), channels in alike.items():
        channels.sort()
        members = tuple(
            Member(
                layer=sites[number].path, weight=sites[number].key, axis=axis, role=sites[number].roles[axis],
                positions=np.stack([places[channel][number, axis] for channel in channels]),
            )
            for number, axis in places[channels[0]]
        )  # fmt: skip
        if pinned is None and len(channels) == 1 and _alone(analysis, sites, channels[0]):
            pinned = "the only channel"
        array = np.array(channels)
        left = counts.of(array)
        made = [member.positions.shape[1] for member in members if member.role == "out"]
        items.append(
            Group(
                channels=array, members=members, pinned=pinned, width=max(made, default=1),
                parameters=total[0] - left[0], macs=total[1] - left[1],
            )
        )  # fmt: skip
    return Groups(items=tuple(items), analysis=analysis, parameters=total[0], macs=total[1])


def _alone(analysis: Analysis, sites: list[Any], channel: int) -> bool:
    """Whether some axis has this channel only, so that it can't go."""
    vectors = [labels for site in sites for labels in site.axes if labels is not None]
    return any((analysis.labels.resolve(vector) == channel).all() for vector in vectors)


class Counts:
    """Parameters and multiply-accumulates of a model without some of its channels.

    Args:
        model: The model.
        analysis: What `analyse` found.
    """

    def __init__(self, model: keras.Model, analysis: Analysis) -> None:
        known = 0
        self._size = analysis.labels.count
        self._vectors: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        self._products: list[tuple[bool, float, list[bytes]]] = []

        def key(labels: np.ndarray) -> bytes:
            classes = analysis.labels.resolve(labels)
            name = classes.tobytes()
            if name not in self._vectors:
                self._vectors[name] = np.unique(classes, return_counts=True)
            return name

        for site in analysis.sites.values():
            sizes = [size for size, labels in zip(site.variable.shape, site.axes, strict=True) if labels is None]
            vectors = [key(labels) for labels in site.axes if labels is not None]
            self._products.append((True, float(np.prod(sizes)), vectors))
            known += int(np.prod(site.variable.shape))
        self._products += [(False, factor, [key(labels) for labels in vectors]) for factor, vectors in analysis.macs]
        self._fixed = model.count_params() - known

    def of(self, removed: np.ndarray) -> tuple[int, int]:
        """Return the parameters and multiply-accumulates that are left without these channels."""
        gone = np.zeros(self._size, bool)
        gone[removed] = True
        sizes = {name: int(counts[~gone[classes]].sum()) for name, (classes, counts) in self._vectors.items()}
        parameters, macs = float(self._fixed), 0.0
        for is_weight, factor, vectors in self._products:
            value = factor
            for vector in vectors:
                value *= sizes[vector]
            if is_weight:
                parameters += value
            else:
                macs += value
        return round(parameters), round(macs)
