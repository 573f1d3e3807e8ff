"""Running one operation of a graph: what it does to labels, and whether it can be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from dwindle.pruning.analysis import Analysis, Kept, Value, taken
from dwindle.pruning.operation_edits import edit_of
from dwindle.pruning.probing import NOTHING, SEVERAL, agrees, dependence, in_batches, options

_LOW = ("float16", "bfloat16")


class Trial:
    """Runs one call of an operation without weights: first to find the labels of its outputs, then with half cut."""

    def __init__(
        self, analysis: Analysis, operation: Any, entry: Mapping[str, Any], path: str, number: int, node: Any,
        given: list[Value], values: Mapping[Any, Value],
    ) -> None:  # fmt: skip
        self.analysis, self.operation, self.entry, self.path = analysis, operation, entry, path
        self.number, self.node, self.given, self.values = number, node, given, values
        self.kind = type(operation).__name__
        self.batch = analysis.batch
        self.dtypes: list[str] = []

    def _runner(self, config: dict[str, Any], node: Any) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        cls = type(self.operation)
        operation = self.operation
        # A layer of its own, so that the model's keeps no trace; one that can't be made anew is the model's problem.
        if isinstance(operation, keras.layers.Layer) or config is not self.entry["config"]:
            operation = cls.from_config(dict(config))

        def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
            left = iter(arrays)

            def filled(leaf: Any) -> Any:
                if not isinstance(leaf, Value):
                    return leaf
                return keras.ops.convert_to_tensor(next(left), dtype=leaf.dtype)

            args = keras.tree.map_structure(filled, revive(node["args"], self.values))
            kwargs = keras.tree.map_structure(filled, revive(node["kwargs"], self.values))
            found = keras.tree.flatten(operation(*args, **kwargs))
            self.dtypes = [keras.backend.standardize_dtype(value.dtype) for value in found]
            return [
                np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32") if dtype in _LOW else value))
                for value, dtype in zip(found, self.dtypes, strict=True)
            ]

        return run

    def outputs(self) -> list[Value]:
        """Return the outputs with their labels; labels that the trial shows can't be cut are pinned."""
        labels = self.analysis.labels
        run = self._runner(self.entry["config"], self.node)
        shapes = [value.shape for value in self.given]
        sample = in_batches(run, [np.ones((self.batch or 1, *shape[1:]), np.float32) for shape in shapes], self.batch)
        axes: list[list[list[tuple[int, np.ndarray]]]] = [[[] for _ in value.shape] for value in sample]
        summed: list[np.ndarray] = []
        for index, value in enumerate(self.given):
            for axis, vector in enumerate(value.axes):
                if vector is None:
                    continue
                classes, codes = np.unique(labels.resolve(vector), return_inverse=True)
                if len(classes) == 1:
                    labels.pin(vector, "the only channel")
                    continue
                found = self._dependence(run, shapes, index, axis, codes + 1)
                if any((codes == SEVERAL).any() for codes in found):
                    summed.append(vector)
                    continue
                for output, moved in enumerate(found):
                    if (moved != NOTHING).any():
                        self._carry(classes, moved, axes[output], index, value.shape)
        for other in summed[1:]:  # what is summed over in two tensors, as a product of matrices does, goes together
            if len(other) == len(summed[0]):
                labels.unite(other, summed[0])
        results = [
            Value(
                (1, *sampled.shape[1:]), str(sampled.dtype),
                tuple(self._merged(found, size) for found, size in zip(per_axis, sampled.shape, strict=True)),
            )
            for sampled, dtype, per_axis in zip(sample, self.dtypes, axes, strict=True)
        ]  # fmt: skip
        self._try(run, results)
        return results

    def _noise(self) -> float:
        """Return what the operation's results err by, relative to their size."""
        policy = getattr(self.operation, "compute_dtype", "float32")
        return 1e-2 if policy in _LOW or any(dtype in _LOW for dtype in self.dtypes) else 1e-5

    def _dependence(
        self, run: Any, shapes: list[tuple[int, ...]], index: int, axis: int, codes: np.ndarray
    ) -> list[np.ndarray]:
        config = {key: value for key, value in self.entry["config"].items() if key != "name"}
        constants = keras.tree.map_structure(
            lambda leaf: leaf if isinstance(leaf, str | int | float | type(None)) else repr(leaf),
            _blank((self.node["args"], self.node["kwargs"])),
        )
        key = (
            self.kind,
            self.given[index].dtype,
            repr(config),
            repr(constants),
            tuple(shapes),
            index,
            axis,
            codes.tobytes(),
        )
        if key not in self.analysis.cache:
            self.analysis.cache[key] = dependence(run, shapes, index, axis, codes, self.batch, self._noise())
        found: list[np.ndarray] = self.analysis.cache[key]
        return found

    def _carry(
        self, classes: np.ndarray, codes: np.ndarray, axes: list[list[tuple[int, np.ndarray]]], index: int,
        shape: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Put the labels of one input axis on the output axis that carries them."""
        labels = self.analysis.labels
        found = options(codes)
        if not found:
            labels.pin(classes, f"`{self.path}` ({self.kind}) needs them all")
            return
        axis = found[0]
        if len(found) > 1:
            signature = (self.kind, shape[1:], codes.shape, len(classes))
            self.analysis.ambiguous.setdefault(signature, found)
            axis = self.analysis.choices.get(signature, axis)
        across = np.moveaxis(codes, axis - 1, 0).reshape(codes.shape[axis - 1], -1)
        highest = across.max(axis=1)
        vector = np.where(highest == NOTHING, -1, classes[highest - 1])
        for row in across[((across != highest[:, None]) & (across != NOTHING)).any(axis=1)]:
            there = classes[np.unique(row[row != NOTHING]) - 1]
            labels.unite(there, np.full(len(there), there[0]))
        taken = next((other for owner, other in axes[axis] if owner == index), None)
        if taken is not None:
            # Two axes of one tensor become one, as in a flatten: only one of them can be cut.
            labels.pin(classes, f"`{self.path}` ({self.kind}) joins two axes of channels")
            return
        axes[axis].append((index, vector))

    def _merged(self, found: list[tuple[int, np.ndarray]], size: int) -> np.ndarray | None:
        if not found:
            return None
        labels = self.analysis.labels
        vector = np.full(size, -1, np.int64)
        for _, other in found:
            both = (vector >= 0) & (other >= 0)
            labels.unite(vector[both], other[both])
            vector = np.where(vector >= 0, vector, other)
        missing = vector < 0
        if missing.any():
            new = labels.new(int(missing.sum()))
            labels.pin(new, f"`{self.path}` ({self.kind}) adds them")
            vector[missing] = new
        return vector

    def _try(self, run: Any, results: list[Value]) -> None:
        """Cut half of the channels and compare; pin them all if the operation then gives something else."""
        labels = self.analysis.labels
        vectors = [vector for value in self.given for vector in value.axes if vector is not None]
        edit = edit_of(self.kind, self.node)
        if edit is not None:
            for index, value in enumerate(self.given):
                self.analysis.tie(
                    ("operation", self.path, index), value.axes, f"`{self.path}` is used in several sizes"
                )
        free = labels.free(np.concatenate(vectors))
        if len(free):
            removed = np.random.default_rng(0).permutation(free)[: max(1, len(free) // 2)]
            for vector in vectors:  # an axis keeps one position at least
                classes = np.unique(labels.resolve(vector))
                if np.isin(classes, removed).all():
                    removed = removed[removed != classes[0]]

            def kept(vector: np.ndarray) -> np.ndarray:
                return np.flatnonzero(~np.isin(labels.resolve(vector), removed))

            if not len(removed) or not self._same(run, results, kept):
                plain = len(self.given) > 1 and any(all(v is None for v in value.axes) for value in self.given)
                why = "joins them with a tensor that can't be cut" if plain else "mixes them or counts on their number"
                for vector in vectors:
                    labels.pin(vector, f"`{self.path}` ({self.kind}) {why}")
        if edit is not None:
            given, config, node = self.given, edit.config, edit.node
            if config is not None:
                self.analysis.edits.setdefault(self.path, lambda old, kept: config(old, given, results, kept))
            if node is not None:
                self.analysis.node_edits[self.path, self.number] = lambda old, kept: node(old, given, results, kept)

    def _same(self, run: Any, results: list[Value], kept: Kept) -> bool:
        generator = np.random.default_rng(1)
        full = []
        for value in self.given:
            array = generator.normal(size=(self.batch or 2, *value.shape[1:])).astype(np.float32)
            for axis, vector in enumerate(value.axes):
                if vector is not None:
                    mask = np.zeros(len(vector), np.float32)
                    mask[kept(vector)] = 1
                    array = array * mask.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
            full.append(array)
        expected = [taken(found, value, kept) for found, value in zip(run(full), results, strict=True)]
        config, node = self.entry["config"], self.node
        edit = edit_of(self.kind, self.node)
        if edit is not None:
            config = edit.config(dict(config), self.given, results, kept) if edit.config else config
            node = edit.node(node, self.given, results, kept) if edit.node else node
        cut = [taken(array, value, kept) for array, value in zip(full, self.given, strict=True)]
        try:
            found = self._runner(config, node)(cut)
        # A wrong size can raise anything, which says just that the channels can't be cut.
        except Exception:
            return False
        return all(agrees(a, b, self._noise()) for a, b in zip(found, expected, strict=True))


def revive(data: Any, values: Mapping[Any, Value]) -> Any:
    """Deserialize the arguments of a call, with `Value` in place of tensors."""
    if isinstance(data, Mapping):
        if data.get("class_name") == "__keras_tensor__":
            name, node, tensor = data["config"]["keras_history"]
            return values[name, node, tensor]
        if "class_name" in data:
            return keras.saving.deserialize_keras_object(dict(data))
        return {key: revive(value, values) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(revive(value, values) for value in data)
    return data


def _blank(data: Any) -> Any:
    """Return serialized arguments with nothing in place of tensors."""
    if isinstance(data, Mapping):
        if data.get("class_name") == "__keras_tensor__":
            return "tensor"
        return {key: _blank(value) for key, value in data.items()}
    return [_blank(value) for value in data] if isinstance(data, list | tuple) else data


def values_in(args: Any, kwargs: Any) -> list[Value]:
    """Return the tensors among the arguments of a call, in the order in which Keras flattens them."""
    return [leaf for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, Value)]


def tensors_in(data: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors that the serialized arguments of a call name."""
    if isinstance(data, Mapping):
        if data.get("class_name") == "__keras_tensor__":
            name, node, tensor = data["config"]["keras_history"]
            yield name, node, tensor
        else:
            for value in data.values():
                yield from tensors_in(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from tensors_in(value)
