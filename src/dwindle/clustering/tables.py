"""Which weights share a table of values: all of a tensor, those of a channel, or those of a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A weight as a matrix of inputs by outputs, cut into tiles that have a table each.

    Attributes:
        shape: Shape of the weight.
        outputs: Its axes that count outputs.
        tile: Rows and columns of a tile; 0 for all of them.
    """

    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    tile: tuple[int, int] = (0, 0)

    def _axis(self, axes: Sequence[int], size: int) -> np.ndarray:
        """Return the number of the tile along one side, shaped to broadcast against the weight."""
        extent = [length if axis in axes else 1 for axis, length in enumerate(self.shape)]
        places = np.arange(math.prod(extent), dtype=np.int32).reshape(extent)
        return places // size if size else np.zeros_like(places)

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two int32 arrays whose broadcast sum is the number of each weight's table."""
        axes = {axis % len(self.shape) for axis in self.outputs}
        columns = self._axis(sorted(axes), self.tile[1])
        rows = self._axis([axis for axis in range(len(self.shape)) if axis not in axes], self.tile[0])
        return rows * np.int32(columns.max() + 1), columns

    @property
    def count(self) -> int:
        """How many tables there are."""
        rows, columns = self.parts()
        return int(rows.max() + columns.max()) + 1

    def numbers(self) -> np.ndarray:
        """Return the number of each weight's table, of the weight's shape."""
        rows, columns = self.parts()
        return np.broadcast_to(rows + columns, self.shape)

    def groups(self, weight: np.ndarray) -> list[np.ndarray]:
        """Return the weights of each table, flat, in the order of the tensor."""
        order, ends = self._order()
        return np.split(weight.reshape(-1)[order], ends)

    def joined(self, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor of what `groups` took apart."""
        order, _ = self._order()
        flat = np.concatenate(list(groups))
        found = np.empty_like(flat)
        found[order] = flat
        return found.reshape(self.shape)

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        numbers = self.numbers().reshape(-1)
        order = np.argsort(numbers, kind="stable")
        return order, np.cumsum(np.bincount(numbers))[:-1]
