"""Attaching transforms to a model's weights, and baking them in: each makes a new model from the old one's config.

The new model is built from the config of the old one, in which the chosen layers are replaced, and every variable is
copied. The model that came in is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.transformed_layers import resolve
from dwindle.weights import Transform, check_model, copy_own_state, is_graph, raw_variable, rebuilding, walk_layers


def rebuild(
    model: keras.Model, edit: Callable[[str, dict[str, Any]], dict[str, Any]], *, copy_states: bool = True
) -> keras.Model:
    """Build a new model from the config of ``model``, with every layer's config passed through ``edit``.

    All raw variables are copied, and the states of transforms that are in both models.

    Args:
        model: A built functional or sequential model; it is not changed.
        edit: Called with a layer's path and serialized config; returns the config to use.
        copy_states: Whether states of transforms that both have are copied.

    Returns:
        A new model, not compiled.
    """
    check_model(model)

    def edit_config(config: dict[str, Any], prefix: str) -> dict[str, Any]:
        layers = []
        for entry in config["layers"]:
            inner = entry.get("config", {})
            if isinstance(inner, dict) and "layers" in inner:
                entry = {**entry, "config": edit_config(inner, f"{prefix}{inner['name']}/")}
            else:
                edited = edit(f"{prefix}{inner['name']}", entry)
                entry = {key: edited.get(key, entry.get(key)) for key in {**entry, **edited}}
            layers.append(entry)
        return {**config, "layers": layers}

    config = model.get_config()
    if "graph" in config:  # a lifted model keeps its functional config under this key
        config = {**config, "graph": edit_config(config["graph"], "")}
    else:
        config = edit_config(config, "")
    with rebuilding(model):
        new = type(model).from_config(config)
    if not new.built:
        new.build(model.input_shape)
    copy_variables(model, new, copy_states=copy_states)
    if hasattr(model, "float_file"):
        new.float_file = model.float_file
    return new


def full_precision(model: keras.Model) -> keras.Model:
    """Return a twin that computes in float32 where ``model`` is set to lower precision; ``model`` itself otherwise.

    Args:
        model: A functional or sequential model. A subclassed one is returned as it is.
    """
    lower = {"float16", "bfloat16"}
    if not any(getattr(layer, "compute_dtype", None) in lower for _, layer in walk_layers(model)):
        return model
    if not is_graph(model):
        return model

    def raised(config: Any) -> Any:
        if isinstance(config, dict):
            if config.get("class_name") == "DTypePolicy":
                return {**config, "config": {"name": "float32"}}
            return {key: raised(value) for key, value in config.items()}
        return [raised(value) for value in config] if isinstance(config, list) else config

    return rebuild(model, lambda _, entry: raised(entry))


def copy_variables(source: keras.Model, target: keras.Model, *, copy_states: bool = True) -> None:
    """Copy raw variables, and the states of transforms that both models have, from ``source`` to ``target``."""
    olds, news = dict(walk_layers(source)), dict(walk_layers(target))
    for path, new in news.items():
        old = olds[path]
        pairs = list(zip(_raw_variables(old), _raw_variables(new), strict=True))
        if copy_states:
            before, after = _states(old), _states(new)
            pairs += [(before[key], after[key]) for key in after if key in before]
        for from_variable, to_variable in pairs:
            # By way of NumPy: JAX's arrays would be shared, and training the twin would take the original's away.
            to_variable.assign(keras.ops.convert_to_numpy(from_variable))
        copy_own_state(old, new)


def _states(layer: Any) -> dict[tuple[str, str, str], Any]:
    found = {}
    for key, states in layer.__dict__.get("_dwindle_states", {}).items():
        for transform, state in zip(layer.__dict__["_dwindle_transforms"][key], states, strict=True):
            for name, variable in state.items():
                found[key, transform.kind, name] = variable
    return found


def _raw_variables(layer: Any) -> list[Any]:
    own = {id(variable) for variable in _states(layer).values()}
    return [variable for variable in layer.weights if id(variable) not in own]


def attached(model: keras.Model) -> dict[tuple[str, str], list[Transform]]:
    """Map ``(layer path, weight key)`` to the transforms that hang there."""
    return {
        (path, key): list(transforms)
        for path, layer in walk_layers(model)
        for key, transforms in layer.__dict__.get("_dwindle_transforms", {}).items()
    }


def attach(model: keras.Model, new: Mapping[tuple[str, str], Sequence[Transform]]) -> keras.Model:
    """Return a twin of ``model`` whose named weights carry the given transforms as well.

    A transform replaces one of its own kind on the same weight; otherwise they stack in the order of
    `Transform.order`.

    Args:
        model: A built model; it is not changed.
        new: Maps ``(layer path, weight key)`` to the transforms to add.

    Returns:
        A new model with the same names, inputs, outputs and variables, not compiled.
    """
    wanted: dict[str, dict[str, list[Transform]]] = {}
    for (path, key), transforms in new.items():
        wanted.setdefault(path, {})[key] = list(transforms)
    present: dict[str, dict[str, list[Transform]]] = {}
    for (path, key), transforms in attached(model).items():
        present.setdefault(path, {})[key] = transforms

    def edit(path: str, entry: dict[str, Any]) -> dict[str, Any]:
        if path not in wanted:
            return entry
        merged = {key: list(transforms) for key, transforms in present.get(path, {}).items()}
        for key, transforms in wanted[path].items():
            kinds = {transform.kind for transform in transforms}
            kept = [transform for transform in merged.get(key, []) if transform.kind not in kinds]
            stack = sorted([*kept, *transforms], key=lambda transform: transform.order)
            merged[key] = [transform.beside([t for t in stack if t is not transform]) for transform in stack]
        base = (
            entry["config"]["layer"]
            if path in present
            else {key: entry.get(key) for key in ("module", "class_name", "config", "registered_name")}
        )
        return _transformed_entry(base, merged)

    twin = rebuild(model, edit)
    layers = dict(walk_layers(twin))
    for (path, key), transforms in new.items():
        layer = layers[path]
        slot_states = layer.__dict__["_dwindle_states"][key]
        for transform, state in zip(layer.__dict__["_dwindle_transforms"][key], slot_states, strict=True):
            given = next((t for t in transforms if t.kind == transform.kind), None)
            if given is not None:
                shape = tuple(int(size) for size in _raw_of(layer, key).shape)
                for name, value in given.state(shape).items():
                    state[name].assign(value)
        _refit(layer, key, {transform.kind for transform in transforms})
    return twin


def _refit(layer: Any, key: str, new: set[str]) -> None:
    """Tell the transforms that were there before of new ones in front of them."""
    pairs = layer.transforms_and_states(key)
    for transform, state in pairs:
        if transform.kind not in new and any(t.kind in new and t.order < transform.order for t, _ in pairs):
            others = [t for t, _ in pairs if t is not transform]
            transform.refit(layer.effective_before(key, order=transform.order), state, others)


def _raw_of(layer: Any, key: str) -> Any:
    owner, weight = resolve(layer, key)
    return raw_variable(owner, weight)


def _transformed_entry(base: dict[str, Any], transforms: Mapping[str, Sequence[Transform]]) -> dict[str, Any]:
    return {
        "module": "dwindle.transformed_layers",
        "class_name": base["class_name"],
        "registered_name": "dwindle>Transformed",
        "config": {
            "name": base["config"]["name"],
            "layer": base,
            "transforms": {key: [t.to_dict() for t in ts] for key, ts in transforms.items()},
        },
    }


def effective_weights(model: keras.Model) -> dict[tuple[str, str], np.ndarray]:
    """Map ``(layer path, weight key)`` to the transformed weight, for every weight with transforms."""
    return {
        (path, key): keras.ops.convert_to_numpy(layer.effective(key)) + 0.0  # a masked weight may be -0
        for path, layer in walk_layers(model)
        for key in layer.__dict__.get("_dwindle_transforms", {})
    }


def weight_value(model: keras.Model, path: str, key: str) -> np.ndarray:
    """Return the weight that the layer computes with, transformed or not, as float32."""
    layer = dict(walk_layers(model))[path]
    if key in layer.__dict__.get("_dwindle_transforms", {}):
        value = layer.effective(key)
    else:
        value = _raw_of(layer, key)
    return np.asarray(keras.ops.convert_to_numpy(value), dtype=np.float32)


def strip(model: keras.Model) -> keras.Model:
    """Return a plain twin of ``model``: no transforms, their effect baked into the weights."""
    baked = effective_weights(model)
    touched = {path for path, _ in baked}
    twin = rebuild(model, lambda path, entry: entry["config"]["layer"] if path in touched else entry, copy_states=False)
    layers = dict(walk_layers(twin))
    for (path, key), value in baked.items():
        _raw_of(layers[path], key).assign(value)
    # Weights that are one in the file of a lifted model go on being one.
    tied = {key: [t for t in transforms if t.kind == "tied"] for key, transforms in attached(model).items()}
    tied = {key: transforms for key, transforms in tied.items() if transforms}
    return attach(twin, tied) if tied else twin
