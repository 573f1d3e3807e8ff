"""Sparse constants of LiteRT files as dense arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema


def densify(parameters: Any, values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the dense array that a sparse constant stands for.

    A sparse constant is a tree: one level for each axis in the order of traversal, then one for each block, all of
    them either dense (every place) or compressed (``indices[segments[p]:segments[p + 1]]`` below node ``p``). Its
    values are the leaves, in order.

    Args:
        parameters: The tensor's ``SparsityParametersT``.
        values: The leaves.
        shape: The tensor's shape.

    Raises:
        ValueError: If there are not as many values as leaves, or a block is compressed inside, on which LiteRT crashes.

    References:
        The format's description is that of TACO (Chou et al. 2018, arXiv 1804.10112).
    """
    order = [int(axis) for axis in parameters.traversalOrder]
    divided = [] if parameters.blockMap is None else [int(axis) for axis in parameters.blockMap]
    count, path = 1, np.zeros((1, 0), np.int64)
    for level in parameters.dimMetadata:
        if level.format == schema.DimensionType.DENSE:
            places = np.tile(np.arange(level.denseSize), count)
            parents = np.repeat(np.arange(count), level.denseSize)
        else:
            segments = np.asarray(level.arraySegments.values).astype(np.int64)
            places = np.asarray(level.arrayIndices.values).astype(np.int64)
            parents = np.repeat(np.arange(count), np.diff(segments))
        path = np.concatenate([path[parents], places[:, None]], axis=1)
        count = len(path)
    if count != len(values):
        raise ValueError(f"a sparse constant of {len(values)} values for {count} places")
    found: list[Any] = [0] * len(shape)
    for level, axis in sorted(enumerate(order), key=lambda item: item[1]):
        if axis < len(shape):
            found[axis] = path[:, level]
        else:  # a block, inside of the axis that it divides
            if parameters.dimMetadata[level].format != schema.DimensionType.DENSE:
                raise ValueError("a sparse constant whose blocks are compressed inside")
            size = int(parameters.dimMetadata[level].denseSize)
            found[divided[axis - len(shape)]] = found[divided[axis - len(shape)]] * size + path[:, level]
    dense = np.zeros(tuple(shape), values.dtype)
    dense[tuple(found)] = values
    return dense
