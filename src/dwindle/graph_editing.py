"""Editing the graph of a model in its config, and reading values of tensors inside of it.

A tensor inside a functional model is named as Keras' own config does: ``(layer, call, output)``, where ``call`` counts
the calls of a layer that is used several times. Nothing here touches the model that came in: a new one is built from
the edited config, and variables are copied by the layer's path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.weights import copy_own_state, rebuilding, walk_layers

Ref = tuple[str, int, int]
_TENSOR = "__keras_tensor__"


def functional_config(model: keras.Model) -> dict[str, Any]:
    """Return the config of a model's graph as a functional one; a sequential model's layers get their wires.

    Args:
        model: A built functional, sequential or lifted model.
    """
    config = model.get_config()
    found: dict[str, Any] = config.get("graph", config)
    if "output_layers" in found:
        return found
    return dict(keras.Model(model.inputs, model.outputs, name=model.name).get_config())


def refs_in(value: Any) -> Iterator[Ref]:
    """Yield the tensors in the serialized arguments of a call."""
    if isinstance(value, Mapping):
        if value.get("class_name") == _TENSOR:
            yield _ref(value["config"]["keras_history"])
        else:
            for part in value.values():
                yield from refs_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from refs_in(part)


def replace_refs(value: Any, function: Callable[[Ref], Ref]) -> Any:
    """Return serialized arguments of a call in which every tensor is replaced."""
    if isinstance(value, Mapping):
        if value.get("class_name") == _TENSOR:
            history = list(function(_ref(value["config"]["keras_history"])))
            return {**value, "config": {**value["config"], "keras_history": history}}
        return {key: replace_refs(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_refs(part, function) for part in value]
    return value


def _ref(history: Sequence[Any]) -> Ref:
    return str(history[0]), int(history[1]), int(history[2])


def output_refs(config: Mapping[str, Any]) -> list[Ref]:
    """Return the tensors that a functional config gives out, in their order."""
    found: list[Ref] = []
    _replace_ends(config["output_layers"], lambda ref: (found.append(ref), ref)[1])  # type: ignore[func-returns-value]
    return found


def input_refs(config: Mapping[str, Any]) -> list[Ref]:
    """Return the tensors that a functional config takes, in their order."""
    found: list[Ref] = []
    _replace_ends(config["input_layers"], lambda ref: (found.append(ref), ref)[1])  # type: ignore[func-returns-value]
    return found


def _replace_ends(value: Any, function: Callable[[Ref], Ref]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_ends(part, function) for key, part in value.items()}
    if len(value) == 3 and isinstance(value[0], str):
        return list(function(_ref(value)))
    return [_replace_ends(part, function) for part in value]


def calls(config: Mapping[str, Any]) -> dict[tuple[str, int], list[Ref]]:
    """Map each call ``(layer, number)`` of a functional config to the tensors that it takes."""
    return {
        (entry["config"]["name"], number): list(refs_in(node))
        for entry in config["layers"]
        for number, node in enumerate(entry.get("inbound_nodes") or [{}])
    }


def redirected(config: Mapping[str, Any], targets: Mapping[Ref, Ref]) -> dict[str, Any]:
    """Return a functional config in which every use of a tensor is one of another; calls that nobody needs are gone.

    Args:
        config: A functional config.
        targets: Which tensor stands in for which. Chains are followed.
    """

    def follow(ref: Ref) -> Ref:
        while ref in targets:
            ref = targets[ref]
        return ref

    made = calls(config)
    ends = [follow(ref) for ref in output_refs(config)]
    needed = {(ref[0], ref[1]) for ref in input_refs(config)}
    waiting = [(ref[0], ref[1]) for ref in ends]
    while waiting:
        call = waiting.pop()
        if call not in needed:
            needed.add(call)
            waiting += [follow(ref)[:2] for ref in made[call]]
    kept: dict[str, list[int]] = {}
    for name, number in made:
        if (name, number) in needed:
            kept.setdefault(name, []).append(number)

    def moved(ref: Ref) -> Ref:
        name, number, place = follow(ref)
        return name, kept[name].index(number), place

    layers = []
    for entry in config["layers"]:
        name = entry["config"]["name"]
        if name in kept:
            nodes = entry.get("inbound_nodes") or []
            nodes = [replace_refs(nodes[number], moved) for number in kept[name] if number < len(nodes)]
            layers.append({**entry, "inbound_nodes": nodes})
    return {**config, "layers": layers, "output_layers": _replace_ends(config["output_layers"], moved)}


def rebuilt(
    model: keras.Model,
    edit: Callable[[str, dict[str, Any]], dict[str, Any]],
    *,
    changed: Iterable[str] = (),
) -> keras.Model:
    """Build a new model from the config of ``model``, with the config of every graph in it passed through ``edit``.

    Args:
        model: A built model; it is not changed. What a lifted model gives is no longer tied to its file.
        edit: Called with a graph's path (empty, or ``nested/``) and its config, whose inner graphs are edited already.
        changed: Paths of layers whose variables the caller sets.

    Returns:
        A new model, not compiled, with the variables of the old one in all other layers that both have.
    """

    def edited(config: dict[str, Any], prefix: str) -> dict[str, Any]:
        layers = []
        for entry in config["layers"]:
            inner = entry.get("config", {})
            if isinstance(inner, dict) and "layers" in inner:
                entry = {**entry, "config": edited(inner, f"{prefix}{inner['name']}/"), "build_config": None}
                entry.pop("build_config")
            layers.append(entry)
        return edit(prefix, {**config, "layers": layers})

    config = model.get_config()
    with rebuilding(model):
        if "graph" in config:
            new = keras.Model.from_config(edited(dict(config["graph"]), ""))
        else:
            new = type(model).from_config(edited(config, ""))
    if not new.built:
        new.build(model.input_shape)
    copy_by_path(model, new, skip=changed)
    return new


def copy_by_path(source: keras.Model, target: keras.Model, *, skip: Iterable[str] = ()) -> None:
    """Copy all variables of the layers that two models have under the same path, but for those of ``skip``."""
    olds, left = dict(walk_layers(source)), set(skip)
    for path, new in walk_layers(target):
        if path in olds and path not in left:
            for from_variable, to_variable in zip(olds[path].variables, new.variables, strict=True):
                to_variable.assign(keras.ops.convert_to_numpy(from_variable))
            copy_own_state(olds[path], new)


class Taps:
    """Reads tensors inside of a model, those of nested models too.

    Args:
        model: A built functional, sequential or lifted model; it is not changed.
        wanted: Which tensors of each graph, by the graph's path (empty, or ``nested/``). A nested model that is called
            several times gives one value for each call.

    Example:
        ``Taps(model, {"": [("conv", 0, 0)]}).read(x)`` is ``{("", ("conv", 0, 0)): [array]}``.
    """

    def __init__(self, model: keras.Model, wanted: Mapping[str, Sequence[Ref]]) -> None:
        self._wanted = list(dict.fromkeys(wanted.get("", ())))
        self._inner: list[tuple[str, list[list[Ref]], Taps]] = []
        config = functional_config(model)
        made = calls(config)
        refs = list(self._wanted)
        for layer in model.layers:
            path = f"{layer.name}/"
            below = {key[len(path) :]: value for key, value in wanted.items() if key.startswith(path) and value}
            if below and isinstance(layer, keras.Model):
                fed = [taken for (name, _), taken in made.items() if name == layer.name]
                self._inner.append((path, fed, Taps(layer, below)))
                refs += [ref for taken in fed for ref in taken]
        self._refs = list(dict.fromkeys(refs))
        self._model = None
        if self._refs:
            given = [list(ref) for ref in input_refs(config)]
            config = {**config, "input_layers": given, "output_layers": [list(ref) for ref in self._refs]}
            # Nested models stay whole: only what the tapped tensors need is computed.
            with rebuilding(model):
                self._model = keras.Model.from_config(redirected(config, {}))
            copy_by_path(model, self._model)

    def read(self, inputs: Sequence[np.ndarray]) -> dict[tuple[str, Ref], list[np.ndarray]]:
        """Return the values for a batch, keyed by ``(path of the graph, tensor)``; a list entry for each call.

        Args:
            inputs: One array for each input of the model, in its order.
        """
        if self._model is None:
            return {}
        made = keras.tree.flatten(self._model([keras.ops.convert_to_tensor(x) for x in inputs], training=False))
        values = [keras.ops.convert_to_numpy(value) for value in made]
        by_ref = dict(zip(self._refs, values, strict=True))
        found = {("", ref): [by_ref[ref]] for ref in self._wanted}
        for path, each, taps in self._inner:
            for taken in each:
                for (below, ref), more in taps.read([by_ref[source] for source in taken]).items():
                    found.setdefault((f"{path}{below}", ref), []).extend(more)
        return found
