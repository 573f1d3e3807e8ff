"""Building the smaller model: the config with other sizes, and of each weight what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from dwindle.attaching import copy_variables, effective_weights
from dwindle.graphs import graph_config
from dwindle.pruning.analysis import Analysis, Kept
from dwindle.transformed_layers import resolve
from dwindle.weights import copy_own_state, raw_variable, rebuilding, walk_layers


def keeper(analysis: Analysis, removed: np.ndarray) -> Kept:
    """Return the function from labels to the positions that stay when some channels go."""
    gone = np.zeros(analysis.labels.count, bool)
    gone[removed] = True
    return lambda labels: np.flatnonzero(~gone[analysis.labels.resolve(labels)])


def cut(model: keras.Model, analysis: Analysis, removed: np.ndarray) -> keras.Model:
    """Build the model without some channels.

    Args:
        model: The model that was analysed; it is not changed.
        analysis: What `analyse` found.
        removed: The channels to remove: classes of labels.

    Returns:
        A new model of the same layers and names, not compiled. A lifted model becomes a plain functional one, which is
        no longer tied to the file that it came from.
    """
    kept = keeper(analysis, removed)
    config = dict(graph_config(model.get_config()))
    lifted = hasattr(model, "float_file")
    cls = keras.Model if lifted else type(model)
    with rebuilding(model):
        new = cls.from_config(_edited(_single(config) if lifted else config, "", analysis, kept))
    if not new.built:
        new.build(model.input_shape)
    _copy(model, new, analysis, kept)
    return new


def untied(model: keras.Model) -> keras.Model:
    """Return the plain graph of a lifted model whose layers share constants, each with weights of its own."""
    baked = effective_weights(model)
    paths = {path for path, _ in baked}
    config = dict(graph_config(model.get_config()))
    config["layers"] = [
        {**entry, **entry["config"]["layer"]} if entry["config"].get("name") in paths else entry
        for entry in config["layers"]
    ]
    with rebuilding(model):
        twin = keras.Model.from_config(_single(config))
    copy_variables(model, twin, copy_states=False)
    layers = dict(walk_layers(twin))
    for (path, key), value in baked.items():
        owner, name = resolve(layers[path], key)
        variable = raw_variable(owner, name)
        if variable is not None:
            variable.assign(value)
    return twin


def _single(config: dict[str, Any]) -> dict[str, Any]:
    """Return a lifted model's graph, which lists its inputs and outputs even where there is one, without that list."""
    ends = {name: config[name] for name in ("input_layers", "output_layers")}
    return config | {name: value[0] if len(value) == 1 else value for name, value in ends.items()}


def _edited(config: Mapping[str, Any], prefix: str, analysis: Analysis, kept: Kept) -> dict[str, Any]:
    layers = []
    for entry in config["layers"]:
        entry = _unbuilt(entry)
        inner = entry["config"]
        path = f"{prefix}{inner.get('name') or entry.get('name')}"
        if "layers" in inner:
            entry["config"] = _edited(inner, f"{path}/", analysis, kept)
        elif path in analysis.edits:
            entry["config"] = analysis.edits[path](dict(inner), kept)
        if any((path, number) in analysis.node_edits for number in range(len(entry.get("inbound_nodes") or ()))):
            entry["inbound_nodes"] = [
                analysis.node_edits[path, number](node, kept) if (path, number) in analysis.node_edits else node
                for number, node in enumerate(entry["inbound_nodes"])
            ]
        layers.append(entry)
    # A sequential model without an input layer remembers the shape that it was built for.
    return {key: value for key, value in config.items() if key != "build_input_shape"} | {"layers": layers}


def _unbuilt(data: Any) -> Any:
    """Return a config without the shapes that layers, and layers inside layers, were built for."""
    if isinstance(data, Mapping):
        return {key: _unbuilt(value) for key, value in data.items() if key != "build_config"}
    return type(data)(_unbuilt(value) for value in data) if isinstance(data, list | tuple) else data


def _copy(model: keras.Model, new: keras.Model, analysis: Analysis, kept: Kept) -> None:
    axes = {id(site.variable): site.axes for site in analysis.sites.values()}
    layers = dict(walk_layers(new))
    for path, old in walk_layers(model):
        for before, after in zip(old.variables, layers[path].variables, strict=True):
            value = keras.ops.convert_to_numpy(before)
            for axis, labels in enumerate(axes.get(id(before), ())):
                if labels is not None:
                    value = np.take(value, kept(labels), axis=axis)
            after.assign(value)
        copy_own_state(old, layers[path])
