"""Soft assignments: in training each weight is a mixture of all values, weighted by how near they are (DKM).

``a_ij = softmax_j(-(w_i - v_j)^2 / (temperature h^2))`` with ``h`` the mean distance of neighbouring values;
``v_j' = sum_i a_ij w_i / sum_i a_ij``; the layer computes with ``sum_j a_ij v_j'``, and gradients go through all of it.
Memory and time grow with weights times values.

Reference: Cho et al. 2022, DKM: Differentiable k-means clustering layer for neural network compression, arXiv
2108.12659, section 3.2. We divide distances by the spacing, so that one temperature suits all layers, and take one step
of k-means a training step, going on from the last.
"""

from __future__ import annotations

from typing import Any

import keras

from dwindle.clustering.tables import Tables


def attention(weight: Any, table: Any, tables: Tables, temperature: float) -> Any:
    """Return ``a``, of the weight's shape and one axis more."""
    ops = keras.ops
    clusters = int(table.shape[-1])
    spread = ops.max(table, axis=-1, keepdims=True) - ops.min(table, axis=-1, keepdims=True)
    width = ops.maximum(spread / max(1, clusters - 1), 1e-9)
    rows = ops.take(ops.concatenate([table, width], axis=-1), tables.numbers(), axis=0)
    values, width = rows[..., :-1], rows[..., -1:]
    distance = (ops.expand_dims(ops.cast(weight, "float32"), -1) - values) / width
    return ops.softmax(-distance * distance / temperature, axis=-1)


def refined(weight: Any, table: Any, tables: Tables, temperature: float) -> Any:
    """Return the table after one step of soft k-means; a value that is 0 exactly stays."""
    return _refined(attention(weight, table, tables, temperature), weight, table, tables)


def _refined(shares: Any, weight: Any, table: Any, tables: Tables) -> Any:
    ops = keras.ops
    clusters = int(table.shape[-1])
    numbers = tables.numbers().reshape(-1)
    shares = ops.reshape(shares, (-1, clusters))
    flat = ops.reshape(ops.cast(weight, "float32"), (-1, 1))
    mass = ops.segment_sum(shares, numbers, tables.count)
    total = ops.segment_sum(shares * flat, numbers, tables.count)
    moved = ops.where(mass > 1e-6, total / ops.maximum(mass, 1e-6), table)
    return ops.where(ops.equal(table, 0), table, moved)


def softened(weight: Any, table: Any, tables: Tables, temperature: float) -> Any:
    """Return the mixture that training computes with; weights that are 0 stay so."""
    ops = keras.ops
    shares = attention(weight, ops.stop_gradient(table), tables, temperature)
    moved = _refined(shares, weight, ops.stop_gradient(table), tables)
    mixed = ops.sum(shares * ops.take(moved, tables.numbers(), axis=0), axis=-1)
    return ops.where(ops.equal(weight, 0), ops.zeros_like(weight), ops.cast(mixed, weight.dtype))
