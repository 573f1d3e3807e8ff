"""Which channels of a model can only be cut together: one walk over its graph that propagates labels.

Layers with weights say in a table (`dwindle.pruning.layer_rules`) which axes of their weights are those of their input
and which are new. Everything else is run (`dwindle.pruning.probing`). What is united on the way has to be cut
together; what an output of the model, a layer that is not known or an operation that mixes channels needs is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from dwindle.graphs import graph_config
from dwindle.graphs import outputs as output_names
from dwindle.pruning.analysis import ENTRYWISE, Analysis, Kept, Value, activation_name, removable
from dwindle.pruning.layer_rules import rule_of
from dwindle.pruning.places import Place
from dwindle.pruning.trials import Trial, revive, tensors_in, values_in

_ENTRYWISE_CLASSES = {
    "ReLU", "LeakyReLU", "ELU", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise",
    "GaussianDropout", "AlphaDropout", "ActivityRegularization", "Identity", "Relu", "Relu6", "Sigmoid", "Tanh", "Gelu",
    "Silu",
}  # fmt: skip
# Layers that run operators of a file, which are for as many channels as they had there.
_FROZEN_CLASSES = {"Island", "OnnxIsland"}


def analyse(model: keras.Model) -> Analysis:
    """Walk over the model's graph; see the module.

    An operation such as a reshape of ``(heads * width,)`` to ``(heads, width)`` leaves a choice: cut whole heads, or
    the same channels of each. Each kind of such operation is tried both ways, and the one kept that leaves more to cut.
    """
    cache: dict[Any, Any] = {}

    def walked(choices: Mapping[Any, int]) -> Analysis:
        analysis = Analysis(choices=choices, cache=cache)
        batches = {tensor.shape[0] for tensor in model.inputs} - {None}
        analysis.batch = int(next(iter(batches))) if batches else None
        walk = Walk(analysis)
        inputs = [
            Value.plain(_concrete(tensor.shape, analysis.batch), keras.backend.standardize_dtype(tensor.dtype))
            for tensor in model.inputs
        ]
        config = graph_config(model.get_config())
        outputs = walk.model(model, config, "", inputs)
        names = list(output_names(config))
        for name, value in zip(names, outputs, strict=False):
            analysis.pin(value, f"output `{name}` of the model")
        return analysis

    best = walked({})
    choices: dict[Any, int] = {}
    tried: set[Any] = set()
    while pending := [signature for signature in best.ambiguous if signature not in tried]:
        signature = pending[0]
        tried.add(signature)
        for option in best.ambiguous[signature]:
            other = walked({**choices, signature: option})
            if removable(other) > removable(best):
                best, choices = other, {**choices, signature: option}
    return best


def _concrete(shape: Sequence[int | None], batch: int | None) -> tuple[int, ...]:
    """Return a shape in which open axes have a size that most models take."""
    open_size = 16 if len(shape) < 4 else 64
    return (batch or 1, *(open_size if size is None else int(size) for size in shape[1:]))


class Walk:
    """Interprets the config of a model with labels in place of numbers.

    Args:
        analysis: Where the findings go.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis

    def model(self, model: Any, config: Mapping[str, Any], prefix: str, inputs: Sequence[Value]) -> list[Value]:
        """Walk over one model and return its outputs' labels."""
        if "output_layers" not in config:
            return self._sequential(model, config, prefix, inputs)
        operations = {operation.name: operation for operation in model.operations}
        values: dict[tuple[str, int, int], Value] = {}
        for (name, node, tensor), value in zip(_histories(config["input_layers"]), inputs, strict=True):
            self._input(f"{prefix}{name}", value)
            values[name, node, tensor] = value
        calls = [
            (entry, number, node)
            for entry in config["layers"]
            for number, node in enumerate(entry.get("inbound_nodes") or ())
        ]
        while calls:
            waiting = []
            for entry, number, node in calls:
                if any(history not in values for history in tensors_in(node)):
                    waiting.append((entry, number, node))
                    continue
                name = entry["config"].get("name") or entry["name"]
                found = self._call(operations[name], entry, prefix, number, node, values)
                for index, value in enumerate(found):
                    values[name, number, index] = value
            if len(waiting) == len(calls):
                raise AssertionError(f"the graph of `{model.name}` has a loop")
            calls = waiting
        return [values[history] for history in _histories(config["output_layers"])]

    def _sequential(self, model: Any, config: Mapping[str, Any], prefix: str, inputs: Sequence[Value]) -> list[Value]:
        layers = {layer.name: layer for layer in model.layers}
        found = list(inputs)
        for entry in config["layers"]:
            name = entry["config"]["name"]
            if name not in layers:
                self._input(f"{prefix}{name}", found[0])
                continue
            marker = {"class_name": "__keras_tensor__", "config": {"keras_history": ["", 0, 0]}}
            node = {"args": [marker], "kwargs": {}}
            found = self._call(layers[name], entry, prefix, 0, node, {("", 0, 0): found[0]})
        return found

    def _input(self, path: str, value: Value) -> None:
        self.analysis.tie(("input", path), value.axes, f"input `{path}` is called with tensors of several sizes")
        axes = value.axes

        def edit(config: dict[str, Any], kept: Kept) -> dict[str, Any]:
            shape = list(config["batch_shape"])
            for axis, labels in enumerate(axes):
                if labels is not None:
                    shape[axis] = len(kept(labels))
            return {**config, "batch_shape": shape}

        if any(labels is not None for labels in axes):
            self.analysis.edits.setdefault(path, edit)

    def _call(
        self, operation: Any, entry: Mapping[str, Any], prefix: str, number: int, node: Any, values: Mapping[Any, Value]
    ) -> list[Value]:
        path = f"{prefix}{operation.name}"
        inner = entry["config"]
        if isinstance(operation, keras.Model) and "layers" in inner:
            given = values_in(revive(node["args"], values), revive(node["kwargs"], values))
            return self.model(operation, inner, f"{path}/", given)
        rule = rule_of(operation)
        args, kwargs = revive(node["args"], values), revive(node["kwargs"], values)
        if rule is not None:
            place = Place(self.analysis, path)
            found = rule(place, operation, *args, **kwargs)
            return found if isinstance(found, list) else [found]
        given = values_in(args, kwargs)
        labelled = any(labels is not None for value in given for labels in value.axes)
        kind = type(operation).__name__
        known = type(operation).__module__.split(".")[0] in ("keras", "dwindle") and kind not in _FROZEN_CLASSES
        known = known and not isinstance(operation, keras.Model)
        if not labelled or not known or getattr(operation, "weights", None):
            for value in given:
                self.analysis.pin(value, f"layer `{path}` ({kind}) is not known to channel pruning")
            return self._unlabelled(operation, args, kwargs)
        if len(given) == 1 and (
            kind in _ENTRYWISE_CLASSES or (kind == "Activation" and activation_name(operation.activation) in ENTRYWISE)
        ):
            return [given[0]]
        return self._operate(operation, entry, path, number, node, values)

    def _unlabelled(self, operation: Any, args: Any, kwargs: Any) -> list[Value]:
        def symbol(leaf: Any) -> Any:
            return keras.KerasTensor(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Value) else leaf

        args, kwargs = keras.tree.map_structure(symbol, (args, kwargs))
        found = keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
        return [
            Value.plain(
                [1 if size is None else size for size in spec.shape], keras.backend.standardize_dtype(spec.dtype)
            )
            for spec in found
        ]

    def _operate(
        self, operation: Any, entry: Mapping[str, Any], path: str, number: int, node: Any, values: Mapping[Any, Value]
    ) -> list[Value]:
        """Find the labels of what an operation returns by running it."""
        given = values_in(revive(node["args"], values), revive(node["kwargs"], values))
        kind = type(operation).__name__
        if any(value.shape[0] not in (1, self.analysis.batch) for value in given if value.shape):
            # A trial runs samples that lie on the first axis.
            for value in given:
                self.analysis.pin(value, f"`{path}` ({kind}) has samples on another axis than the first")
            return self._unlabelled(operation, revive(node["args"], values), revive(node["kwargs"], values))
        try:
            return Trial(self.analysis, operation, entry, path, number, node, given, values).outputs()
        # Whatever an operation raises when it is given other numbers than it was made for, it can't be cut.
        except Exception as error:
            reason = f"`{path}` ({kind}) can't be tried on its own: {str(error).splitlines()[0][:100]}"
            for value in given:
                self.analysis.pin(value, reason)
            return self._unlabelled(operation, revive(node["args"], values), revive(node["kwargs"], values))


def _histories(data: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors that a config names as inputs or outputs, in the order in which Keras flattens them."""
    if isinstance(data, Mapping):
        for key in sorted(data):
            yield from _histories(data[key])
    elif len(data) == 3 and isinstance(data[0], str):
        yield (data[0], data[1], data[2])
    else:
        for part in data:
            yield from _histories(part)
