"""Structures: which weights go together.

A structure splits a weight into *units*: single weights, or blocks of them. Masks remove whole units, the least
important first. The same code runs on NumPy arrays and on tensors: ``xp`` is ``numpy`` or ``keras.ops``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dwindle.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Element:
    """Single weights."""

    kind: ClassVar[str] = "element"
    #: Whether a unit is one weight.
    single: ClassVar[bool] = True

    def misfit(self, shape: Sequence[int], outputs: Sequence[int]) -> str | None:
        """Return why a weight can't have this structure, or None."""
        del shape, outputs
        return None

    def units(self, shape: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the number of units of a weight."""
        del outputs
        return int(np.prod(shape))

    def removable(self, shape: Sequence[int], outputs: Sequence[int]) -> int:
        """Return how many units can go: all but one, so that no weight becomes nothing."""
        return max(0, self.units(shape, outputs) - 1)

    def rate(self, xp: Any, importance: Any, outputs: Sequence[int]) -> Any:
        """Return the importance of each unit, ``(units,)``, from that of each weight."""
        del outputs
        return xp.reshape(importance, (-1,))

    def spread(self, xp: Any, units: Any, shape: Sequence[int], outputs: Sequence[int]) -> Any:
        """Return an array of the weight's shape from one value a unit."""
        del outputs
        return xp.reshape(units, tuple(shape))

    def blocked(self, xp: Any, rating: Any, shape: Sequence[int], outputs: Sequence[int]) -> Any | None:
        """Return which units must stay, ``(units,)`` boolean; None where any may go."""
        del xp, rating, shape, outputs
        return None

    def members(self, shape: Sequence[int], outputs: Sequence[int]) -> np.ndarray | None:
        """Return the weights of each unit, ``(units, weights)``, as indices; None where units are weights."""
        del shape, outputs
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"kind": self.kind}


@dataclass(frozen=True)
class Blocks(Element):
    """Blocks of ``rows`` inputs by ``columns`` outputs.

    They tile the kernel seen as a matrix, inputs by outputs: a convolution's inputs are its taps times its input
    channels, ``(height, width, in)`` flattened. Blocks at the edge may be partial. A block is as important as its
    weights are on average.

    Args:
        rows: Inputs of a block.
        columns: Outputs of a block.
    """

    kind: ClassVar[str] = "blocks"
    single: ClassVar[bool] = False
    rows: int
    columns: int

    def misfit(self, shape: Sequence[int], outputs: Sequence[int]) -> str | None:
        """Return why a weight can't have this structure, or None."""
        inputs, channels = _matrix(shape, outputs)
        if self.rows > inputs or self.columns > channels:
            return f"it is a matrix of {inputs} inputs by {channels} outputs, smaller than a block"
        return None

    def units(self, shape: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the number of blocks."""
        down, across = self._tiles(shape, outputs)
        return down * across

    def rate(self, xp: Any, importance: Any, outputs: Sequence[int]) -> Any:
        """Return the mean importance of each block."""
        shape = tuple(int(size) for size in importance.shape)
        inputs, channels = _matrix(shape, outputs)
        down, across = self._tiles(shape, outputs)
        matrix = xp.reshape(_outputs_last(xp, importance, outputs), (inputs, channels))
        padded = xp.pad(matrix, ((0, down * self.rows - inputs), (0, across * self.columns - channels)))
        total = xp.sum(xp.reshape(padded, (down, self.rows, across, self.columns)), axis=(1, 3))
        real = np.outer(_tile_sizes(inputs, self.rows), _tile_sizes(channels, self.columns)).astype(np.float32)
        return xp.reshape(total / real, (-1,))

    def spread(self, xp: Any, units: Any, shape: Sequence[int], outputs: Sequence[int]) -> Any:
        """Return an array of the weight's shape from one value a block."""
        inputs, channels = _matrix(shape, outputs)
        tiles = xp.reshape(units, self._tiles(shape, outputs))
        matrix = xp.repeat(xp.repeat(tiles, self.rows, axis=0), self.columns, axis=1)[:inputs, :channels]
        return _outputs_back(xp, matrix, shape, outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"kind": self.kind, "rows": self.rows, "columns": self.columns}

    def members(self, shape: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """Return the weights of each block as indices; a partial block names its first more than once."""
        inputs, channels = _matrix(shape, outputs)
        down, across = self._tiles(shape, outputs)
        indices = np.arange(inputs * channels, dtype=np.int32).reshape(tuple(shape))
        matrix = _outputs_last(np, indices, outputs).reshape(inputs, channels)
        padding = ((0, down * self.rows - inputs), (0, across * self.columns - channels))
        padded = np.pad(matrix, padding, constant_values=-1).reshape(down, self.rows, across, self.columns)
        blocks: np.ndarray = padded.transpose(0, 2, 1, 3).reshape(down * across, -1)
        return np.where(blocks < 0, blocks[:, :1], blocks)

    def _tiles(self, shape: Sequence[int], outputs: Sequence[int]) -> tuple[int, int]:
        inputs, channels = _matrix(shape, outputs)
        return -(-inputs // self.rows), -(-channels // self.columns)


@dataclass(frozen=True)
class Pattern(Element):
    """``zeros`` zeros in each ``group`` neighbouring weights along the input channels.

    The last group is filled up with zeros, which count. Under a schedule the groups fill up little by little: a weight
    may go as long as its group has fewer zeros, and the least important of those go first.

    Args:
        zeros: How many of a group become 0.
        group: Size of a group.

    References:
        Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv 2104.08378 (2:4).
    """

    kind: ClassVar[str] = "pattern"
    zeros: int
    group: int

    def misfit(self, shape: Sequence[int], outputs: Sequence[int]) -> str | None:
        """Return why a weight can't have this structure, or None."""
        channels = self._split(shape, outputs)[1]
        if channels <= self.group - self.zeros:
            return f"it has {channels} input channels, and filled up with zeros they have the pattern already"
        return None

    def removable(self, shape: Sequence[int], outputs: Sequence[int]) -> int:
        """Return how many weights go."""
        before, channels, after = self._split(shape, outputs)
        whole, rest = divmod(channels, self.group)
        return before * after * (whole * self.zeros + max(0, rest - (self.group - self.zeros)))

    def blocked(self, xp: Any, rating: Any, shape: Sequence[int], outputs: Sequence[int]) -> Any:
        """Return which weights are not among the ``zeros`` least important of their group."""
        before, channels, after = self._split(shape, outputs)
        groups = -(-channels // self.group)
        moved = xp.reshape(_outputs_last(xp, xp.reshape(rating, tuple(shape)), outputs), (before, channels, after))
        padding = ((0, 0), (0, groups * self.group - channels), (0, 0))
        padded = xp.pad(moved, padding, constant_values=-np.inf)
        members = xp.reshape(padded, (before, groups, self.group, after))
        ranks = []
        for own in range(self.group):
            lower = [
                (members[:, :, other] <= members[:, :, own])
                if other < own
                else (members[:, :, other] < members[:, :, own])
                for other in range(self.group)
                if other != own
            ]
            # Padding comes first whatever its place.
            ranks.append(sum(xp.where(flag, 1, 0) for flag in lower))
        place = xp.reshape(xp.stack(ranks, axis=2), (before, groups * self.group, after))[:, :channels]
        return xp.reshape(_outputs_back(xp, place, shape, outputs), (-1,)) >= self.zeros

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"kind": self.kind, "zeros": self.zeros, "group": self.group}

    def _split(self, shape: Sequence[int], outputs: Sequence[int]) -> tuple[int, int, int]:
        """Return the sizes (taps, input channels, outputs) of the weight with its outputs moved last."""
        inputs, channels = _matrix(shape, outputs)
        own = [shape[axis] for axis in range(len(shape)) if axis not in set(outputs)]
        last = own[-1] if own else 1
        return inputs // last, last, channels


# Structures that can be saved; a new one adds one line here and its spelling to `structure_of`.
STRUCTURES: dict[str, type[Element]] = {"element": Element, "blocks": Blocks, "pattern": Pattern}

_SPELLINGS = ("element", "channel", "2:4")


def structure_of(value: Any) -> Element:
    """Return the structure that a user's ``structure`` names.

    Args:
        value: ``"element"``, ``(rows, columns)``, ``"zeros:group"``, or a structure.

    Raises:
        ConfigError: If it is none of these.
    """
    if isinstance(value, Element):
        return value
    if value == "element":
        return Element()
    if isinstance(value, tuple | list):
        if len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value):
            return Blocks(*value)
        raise ConfigError(f"`structure` is {value!r}; a block is (rows, columns), two whole numbers of 1 or more")
    found = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if found is not None:
        zeros, group = int(found[1]), int(found[2])
        if 0 < zeros < group <= 64:
            return Pattern(zeros, group)
        raise ConfigError(
            f"`structure` is {value!r}: {zeros} zeros of every {group} weights; it takes at least 1 zero, fewer than "
            "the group, and groups of at most 64"
        )
    raise ConfigError(
        f"`structure` is {value!r}; it must be `element`, a block (rows, columns), a pattern such as `2:4` (2 zeros of "
        f"4), or `channel`{did_you_mean(value, _SPELLINGS)}"
    )


def structure_from_dict(data: Mapping[str, Any]) -> Element:
    """Make a structure from its ``to_dict``."""
    config = dict(data)
    return STRUCTURES[config.pop("kind")](**config)


def _matrix(shape: Sequence[int], outputs: Sequence[int]) -> tuple[int, int]:
    channels = int(np.prod([shape[axis] for axis in outputs]))
    return int(np.prod(shape)) // channels, channels


def _order(rank: int, outputs: Sequence[int]) -> tuple[int, ...]:
    return (*(axis for axis in range(rank) if axis not in set(outputs)), *outputs)


def _outputs_last(xp: Any, weight: Any, outputs: Sequence[int]) -> Any:
    order = _order(len(weight.shape), outputs)
    return weight if order == tuple(range(len(order))) else xp.transpose(weight, order)


def _outputs_back(xp: Any, values: Any, shape: Sequence[int], outputs: Sequence[int]) -> Any:
    """Undo `_outputs_last` on an array whose axes were merged."""
    order = _order(len(shape), outputs)
    moved = xp.reshape(values, tuple(shape[axis] for axis in order))
    return moved if order == tuple(range(len(order))) else xp.transpose(moved, tuple(np.argsort(order).tolist()))


def _tile_sizes(size: int, tile: int) -> np.ndarray:
    return np.minimum(tile, size - np.arange(0, size, tile))
