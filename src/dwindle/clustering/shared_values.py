"""Weights that share a few values: a table, and for each weight the number of its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.clustering import soft_assignment
from dwindle.clustering.initial_values import nearest
from dwindle.clustering.tables import Tables
from dwindle.weights import Transform

GRADIENTS = ("sum", "mean")
#: Weights from which look-ups are compiled.
COMPILED_FROM = 16384
#: Kinds of transforms that hold zeros where they are.
ZERO_KINDS = ("mask", "keep_zeros")


class SharedValues(Transform):
    """Give each weight the value that its number names: ``w'_i = v[a_i]``, so that a table holds at most k values.

    Values and assignments are trained together. A value gets the gradients of its weights, ``dL/dv_j = sum_(a_i = j)
    dL/dw'_i``; the raw weight gets ``dL/dw'_i`` as if there were no table (straight-through) and goes to the value
    nearest to it every ``reassign`` steps. Zero is one of the values, and stays, where the weight is pruned.

    Args:
        clusters: k, the values of a table.
        tile: Rows and columns of the kernel, as a matrix of inputs by outputs, that share a table; 0 for all.
        outputs: Axes of the weight that count outputs.
        gradient: ``"sum"`` or ``"mean"`` of its weights' gradients for a value.
        reassign: Training steps between assignments; 0 keeps them, and trains the values alone.
        entropy: What training adds to the loss for each bit that an entropy coder spends on the numbers.
        temperature: Of soft assignments in training, see `dwindle.clustering.soft_assignment`; 0 for hard ones.
        guard: Whether a mask may set more weights to zero between assignments.
        values: Shape ``(tables, k)``, ascending, and
        numbers: the number of each weight's value, to begin with; not part of the config.
        zero: Whether 0 is one of the values of each table and stays so; not part of the config.

    References:
        Han et al. 2016, Deep Compression, arXiv 1510.00149, section 3, equation 3 (sum); Cho et al. 2022, DKM, arXiv
        2108.12659 (soft).
    """

    kind: ClassVar[str] = "shared"
    order: ClassVar[int] = 20

    def __init__(
        self,
        *,
        clusters: int,
        tile: Sequence[int] = (0, 0),
        outputs: Sequence[int] = (-1,),
        gradient: str = "sum",
        reassign: int = 100,
        entropy: float = 0.0,
        temperature: float = 0.0,
        guard: bool = False,
        values: np.ndarray | None = None,
        numbers: np.ndarray | None = None,
        zero: bool = False,
    ) -> None:
        self.clusters = clusters
        self.tile = (int(tile[0]), int(tile[1]))
        self.outputs = tuple(outputs)
        self.gradient = gradient
        self.reassign = reassign
        self.entropy = entropy
        self.temperature = temperature
        self.guard = guard
        self.values = values
        self.numbers = numbers
        self.zero = zero
        self.trained = () if temperature > 0 else ("values",)

    def tables(self, shape: Sequence[int]) -> Tables:
        """Return which weights of a tensor share a table."""
        return Tables(shape=tuple(int(size) for size in shape), outputs=self.outputs, tile=self.tile)

    @property
    def one_grid(self) -> bool:
        """Whether a table reaches over output channels, which then need one scale to have k values as integers."""
        return self.tile[1] != 1

    @cached_property
    def _number_type(self) -> type[np.unsignedinteger[Any]] | type[np.signedinteger[Any]]:
        return np.uint8 if self.clusters <= 256 else np.int32

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return values, numbers, how often each number occurs, and which values are trained."""
        tables = self.tables(shape)
        count = tables.count
        values = np.zeros((count, self.clusters), np.float32) if self.values is None else self.values
        numbers = np.zeros(shape, np.int64) if self.numbers is None else self.numbers
        free = np.ones((count, self.clusters), np.float32)
        if self.zero:
            free[np.arange(count), np.abs(values).argmin(axis=1)] = 0
        return {
            "values": np.asarray(values, np.float32),
            "free": free,
            "numbers": numbers.astype(self._number_type),
            "counts": _counts(numbers, tables, self.clusters),
            "calls": np.zeros((1,), np.int32),
        }

    def prepare(self, raw: Any, state: Mapping[str, Any]) -> None:
        """Leave raw weights alone where assignments stay."""
        del state
        if not self.reassign:
            raw.trainable = False

    def beside(self, others: Sequence[Transform]) -> Transform:
        """Return the transform with a guard if one of the others is a mask that changes."""
        changing = any(getattr(other, "schedule", None) is not None for other in others if other.kind in ZERO_KINDS)
        if changing == self.guard:
            return self
        return SharedValues(
            **{**self.get_config(), "guard": changing}, values=self.values, numbers=self.numbers, zero=self.zero
        )

    def refit(self, weight: np.ndarray, state: Mapping[str, Any], others: Sequence[Transform]) -> None:
        """Make zero a value where pruning has come, and assign anew."""
        table = keras.ops.convert_to_numpy(state["values"]) * keras.ops.convert_to_numpy(state["free"])
        free = keras.ops.convert_to_numpy(state["free"]).copy()
        if any(other.kind in ZERO_KINDS for other in others):
            for row, mask in zip(table, free, strict=True):
                if mask.all():
                    place = np.abs(row).argmin()
                    row[place], mask[place] = 0, 0
        self.assign(np.asarray(weight, np.float32), table, free, state)

    def assign(self, weight: np.ndarray, table: np.ndarray, free: np.ndarray, state: Mapping[str, Any]) -> None:
        """Set values and which of them are trained, and give each weight the nearest."""
        tables = self.tables(weight.shape)
        groups = []
        for points, row, mask in zip(tables.groups(weight), table, free, strict=True):
            order = np.lexsort((mask, row))  # of equals, the zero that stays comes first
            groups.append(order[nearest(points, row[order])])
        numbers = tables.joined(groups)
        state["values"].assign(table)
        state["free"].assign(free)
        state["numbers"].assign(numbers.astype(self._number_type))
        state["counts"].assign(_counts(numbers, tables, self.clusters))

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the shared value of each weight."""
        ops = keras.ops
        training = bool(layer.__dict__.get("_dwindle_training", False))
        table = self._table(state)
        if self.temperature > 0:
            if training:
                return soft_assignment.softened(weight, table, self.tables(weight.shape), self.temperature)
            return self._looked_up(weight, table, self._nearest(weight, table, state))
        numbers = _read(ops.convert_to_tensor(state["numbers"]))
        shares = ops.ones_like(table)
        if self.gradient == "mean":
            shares = 1.0 / ops.maximum(ops.convert_to_tensor(state["counts"]), 1.0)
        if not training:
            return self._looked_up(weight, table, numbers)
        return self._shared(weight, table, numbers, shares)

    def _table(self, state: Mapping[str, Any]) -> Any:
        ops = keras.ops
        return ops.cast(ops.convert_to_tensor(state["values"]), "float32") * ops.convert_to_tensor(state["free"])

    def _flat(self, numbers: Any) -> Any:
        """Return the place of each weight's value in the table of all tables."""
        found = keras.ops.cast(numbers, "int32")
        if self.tile == (0, 0):
            return found
        for part in self.tables(numbers.shape).parts():
            if part.any():
                found = found + part * np.int32(self.clusters)
        return found

    def _looked_up(self, weight: Any, table: Any, numbers: Any) -> Any:
        ops = keras.ops
        found = ops.cast(ops.take(ops.reshape(table, (-1,)), self._flat(numbers)), weight.dtype)
        return ops.where(ops.equal(weight, 0), ops.zeros_like(found), found) if self.guard else found

    def _shared(self, weight: Any, table: Any, numbers: Any, shares: Any) -> Any:
        """Return the values with their gradients: straight through for the weight, summed up for the table."""
        ops = keras.ops
        look_up = compiled(self._looked_up, weight)

        def shared(weight: Any, table: Any) -> tuple[Any, Any]:
            def gradient(*args: Any, upstream: Any = None) -> Any:
                slope = args[0] if upstream is None else upstream
                return slope, compiled(self._gathered, weight)(slope, weight, numbers) * shares

            return look_up(weight, table, numbers), gradient

        return ops.custom_gradient(shared)(_read(weight), _read(table))

    def _gathered(self, slope: Any, weight: Any, numbers: Any) -> Any:
        ops = keras.ops
        if self.guard:
            slope = ops.where(ops.equal(weight, 0), ops.zeros_like(slope), slope)
        slope = ops.reshape(ops.cast(slope, "float32"), (-1,))
        tables = self.tables(weight.shape).count
        flat = ops.reshape(self._flat(numbers), (-1,))
        return ops.reshape(ops.segment_sum(slope, flat, tables * self.clusters), (tables, self.clusters))

    def update(self, weight: Any, state: Mapping[str, Any]) -> None:
        """Assign anew where it is due; take the table of soft assignments one step on."""
        ops = keras.ops
        weight = ops.stop_gradient(_read(ops.convert_to_tensor(weight)))
        if self.temperature > 0:
            table = soft_assignment.refined(weight, self._table(state), self.tables(weight.shape), self.temperature)
            state["values"].assign(ops.stop_gradient(table))
            return
        if not self.reassign:
            return
        calls, names = state["calls"], ("numbers", "counts")
        before = [ops.convert_to_tensor(state[name].value) for name in names]
        table, free = self._table(state), _read(ops.convert_to_tensor(state["free"]))
        due = ops.reshape(ops.equal(ops.mod(calls.value + 1, self.reassign), 0), ())
        after = ops.cond(due, lambda: list(compiled(self._assigned, weight)(weight, table, free)), lambda: before)
        for name, value in zip(names, after, strict=True):
            state[name].assign(value)
        calls.assign(calls.value + 1)

    def _assigned(self, weight: Any, table: Any, free: Any) -> tuple[Any, Any]:
        numbers = self._nearest(weight, table, {"free": free})
        ones = keras.ops.ones_like(keras.ops.cast(weight, "float32"))
        return numbers, self._gathered(ones, ones, numbers)

    def _nearest(self, weight: Any, table: Any, state: Mapping[str, Any]) -> Any:
        """Return the number of the nearest value, by halving: the values of a table need not be in order."""
        ops = keras.ops
        size = 1 << (self.clusters - 1).bit_length()
        order = ops.argsort(table, axis=-1)
        ranked = ops.take_along_axis(table, order, axis=-1)
        edges = (ranked[:, 1:] + ranked[:, :-1]) / 2
        tables = int(table.shape[0])
        edges = ops.concatenate([edges, ops.full((tables, size - self.clusters + 1), float("inf"))], axis=-1)
        edges, order = ops.reshape(edges, (-1,)), ops.reshape(order, (-1,))
        weight = ops.cast(weight, "float32")
        # Added one after the other: their sum would be a constant of the weight's size at each use.
        parts = self.tables(weight.shape).parts() if tables > 1 else ()

        def in_table(place: Any, width: int) -> Any:
            for part in parts:
                place = place + part * np.int32(width)
            return place

        place, step = ops.zeros_like(ops.cast(weight, "int32")), size // 2
        table_of = in_table(place, 1)
        while step:
            passed = weight > ops.take(edges, in_table(place, size) + np.int32(step - 1))
            place, step = place + ops.cast(passed, "int32") * step, step // 2
        found = ops.cast(ops.take(order, in_table(place, self.clusters)), "int32")
        free = ops.convert_to_tensor(state["free"])
        kept = ops.cast(ops.take(ops.argmin(free, axis=-1), table_of), "int32")
        has_zero = ops.take(ops.min(free, axis=-1), table_of) < 0.5
        found = ops.where(ops.logical_and(ops.equal(weight, 0), has_zero), kept, found)
        return ops.cast(found, np.dtype(self._number_type).name)

    def penalty(self, weight: Any, state: Mapping[str, Any]) -> Any | None:
        """Return what the bits of the numbers cost."""
        if not self.entropy:
            return None
        ops = keras.ops
        numbers, counts = (_read(ops.convert_to_tensor(state[name])) for name in ("numbers", "counts"))
        table = ops.stop_gradient(self._table(state))
        return self.entropy * compiled(self._bits, weight)(_read(ops.convert_to_tensor(weight)), table, numbers, counts)

    def _bits(self, weight: Any, table: Any, numbers: Any, counts: Any) -> Any:
        """Return ``sum -log2 p(w)``: exact at the values, linear between two neighbours."""
        ops = keras.ops
        bits = -ops.log2((counts + 0.5) / (ops.sum(counts, axis=-1, keepdims=True) + 0.5 * self.clusters))
        order = ops.argsort(table, axis=-1)
        back = ops.argsort(order, axis=-1)
        ranked, costs = ops.take_along_axis(table, order, axis=-1), ops.take_along_axis(bits, order, axis=-1)
        gaps = ranked[:, 1:] - ranked[:, :-1]
        slopes = ops.where(gaps > 0, (costs[:, 1:] - costs[:, :-1]) / ops.where(gaps > 0, gaps, 1.0), 0.0)
        none = ops.zeros_like(ranked[:, :1])
        right = ops.take_along_axis(ops.concatenate([slopes, none], axis=-1), back, axis=-1)
        left = ops.take_along_axis(ops.concatenate([none, slopes], axis=-1), back, axis=-1)
        flat = self._flat(numbers)

        def of_weight(values: Any) -> Any:
            return ops.stop_gradient(ops.take(ops.reshape(values, (-1,)), flat))

        offset = ops.cast(weight, "float32") - of_weight(table)
        slope = ops.where(offset > 0, of_weight(right), of_weight(left))
        return ops.sum(of_weight(bits) + ops.where(ops.equal(weight, 0), 0.0, slope) * offset)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` takes, without values and numbers."""
        return {
            "clusters": self.clusters, "tile": list(self.tile), "outputs": list(self.outputs),
            "gradient": self.gradient, "reassign": self.reassign, "entropy": self.entropy,
            "temperature": self.temperature, "guard": self.guard,
        }  # fmt: skip


def _counts(numbers: np.ndarray, tables: Tables, clusters: int) -> np.ndarray:
    places = numbers.astype(np.int64) + tables.numbers().astype(np.int64) * clusters
    found = np.bincount(places.reshape(-1), minlength=tables.count * clusters)
    return found.reshape(tables.count, clusters).astype(np.float32)


def _read(value: Any) -> Any:
    """Return a tensor even where TensorFlow passes its variable on, whose gradient would be asked for by name."""
    return keras.ops.reshape(value, value.shape)


def compiled(function: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    """Return the function fused into one kernel where TensorFlow builds a graph and the weight is large.

    A look-up of single numbers takes TensorFlow's own kernel eight times as long as XLA's loop, which some tenths of a
    second of compiling pay for in large weights only.
    """
    if keras.backend.backend() != "tensorflow" or math.prod(weight.shape) < COMPILED_FROM:
        return function
    import tensorflow as tf

    return function if tf.executing_eagerly() else tf.function(function, jit_compile=True)


def entropy_bits(counts: np.ndarray) -> float:
    """Return the bits that an ideal coder spends on numbers that occur so often, a row a table."""
    total = 0.0
    for row in np.asarray(counts, np.float64):
        used = row[row > 0]
        total -= float((used * np.log2(used / used.sum())).sum())
    return total if math.isfinite(total) else 0.0
