"""Smaller twins of a model: the students that distillation trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from dwindle.attaching import attached
from dwindle.errors import ConfigError, UnsupportedModelError, check_choice
from dwindle.finalizing import finalize
from dwindle.graphs import graph_config, outputs, sources
from dwindle.pruning.channels import prune_channels
from dwindle.pruning.depth import drop_blocks
from dwindle.seeding import seeded
from dwindle.weights import check_model, copy_own_state, rebuilding, walk_layers

STARTS = ("random", "teacher")

_WIDTHS = {
    "Dense": "units", "Conv1D": "filters", "Conv2D": "filters", "Conv3D": "filters", "SeparableConv1D": "filters",
    "SeparableConv2D": "filters", "Conv1DTranspose": "filters", "Conv2DTranspose": "filters", "LSTM": "units",
    "GRU": "units", "SimpleRNN": "units",
}  # fmt: skip


def shrink(
    model: keras.Model,
    width: float = 0.5,
    depth: float = 1.0,
    input_size: int | tuple[int, int] | None = None,
    *,
    start: str = "random",
    criterion: str | None = None,
    data: Any = None,
    multiple: int = 1,
    seed: int = 0,
) -> keras.Model:
    """Return a narrower or shallower twin of a functional or sequential model, to be trained with the model as teacher.

    Every layer's channel or unit count is multiplied by ``width`` and rounded, except where it makes a model output.
    With ``start="teacher"`` the twin has the model's blocks and channels that matter most, with their weights; with
    ``"random"`` the same shapes and new weights. Statistics of layers that nothing trains, such as `Normalization`,
    stay.

    Args:
        model: A built model; it is not changed.
        width: Factor of the widths, in (0, 1]. 1 with a random start is an untrained twin, as born-again networks are.
        depth: Share of the residual blocks that stays, in (0, 1]; see `dwindle.pruning.depth.drop_blocks`.
        input_size: Height and width of smaller images that the twin takes; one number for both. `distill` resizes the
            images that it is trained on. None: as the model.
        start: ``"random"`` or ``"teacher"``.
        criterion: Which channels matter, as in `dwindle.pruning.channels.prune_channels`. None: ``"l2"``.
        data: Samples for criteria that need them, and by which blocks are chosen.
        multiple: Round widths to a multiple of this; 8 suits many kernels.
        seed: Seeds new weights.

    Returns:
        A new model with the same inputs (but for their size) and output shapes, not compiled. Its ``notes`` say what
        stays as it was and why, and which layers could not start from the model's weights.

    Raises:
        ConfigError: If a value is out of range.
        UnsupportedModelError: If no smaller graph fits together, or there is no residual block to leave out.

    Example:
        >>> import keras, dwindle as dw
        >>> layers = [keras.Input((8,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(4, name="b")]
        >>> dw.shrink(keras.Sequential(layers), width=0.5).get_layer("a").units
        3

    References:
        Furlanello et al. 2018, Born-Again Networks, arXiv 1805.04770 (``width=1``).
    """
    for name, value in (("width", width), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(f"`{name}` is {value!r}; it must be a factor in (0, 1], such as 0.5")
    check_choice("start", start, STARTS)
    check_model(model)
    if any(transform.kind != "tied" for transforms in attached(model).values() for transform in transforms):
        model = finalize(model)
    small, notes = model, []
    if depth < 1:
        small = drop_blocks(small, fraction=1 - depth, data=data)
        notes += list(small.notes)
    if start == "random":
        small, more = _narrower(small, width, multiple, seed, input_size)
    else:
        small, more = _started(small, width, multiple, seed, input_size, criterion or "l2", data)
    if [tuple(t.shape) for t in small.outputs] != [tuple(t.shape) for t in model.outputs]:
        raise UnsupportedModelError(f"`{model.name}` changes its output shape when its layers get narrower")
    small.notes = (*notes, *more)
    return small


def _started(
    model: keras.Model, width: float, multiple: int, seed: int, input_size: Any, criterion: str, data: Any
) -> tuple[keras.Model, list[str]]:
    """Return a twin of the channels that matter most, with their weights."""
    notes: list[str] = []
    small = model
    if width < 1:
        small = prune_channels(model, 1 - width, criterion=criterion, multiple=multiple, data=data, seed=seed)
        notes += list(small.notes)
    twin = _fresh(small, seed, input_size)
    olds = dict(walk_layers(small))
    for path, layer in walk_layers(twin):
        pairs = list(zip(olds[path].variables, layer.variables, strict=True))
        if all(tuple(old.shape) == tuple(new.shape) for old, new in pairs):
            for old, new in pairs:
                new.assign(keras.ops.convert_to_numpy(old))
            copy_own_state(olds[path], layer)
        else:
            notes.append(f"{path} starts from new weights: its shape depends on the size of the input")
    return twin, notes


def _narrower(
    model: keras.Model, width: float, multiple: int, seed: int, input_size: Any
) -> tuple[keras.Model, list[str]]:
    """Return a narrower twin with new weights: every layer by itself where that fits together, else by groups."""
    if width == 1:
        return _fresh(model, seed, input_size), []
    config, changed = _edited(model, width, multiple)
    try:
        if not changed:
            raise UnsupportedModelError(f"`{model.name}` has no layer that could be made {width:g} as wide")
        twin = _fresh(model, seed, input_size, config)
        if [tuple(t.shape) for t in twin.outputs] == [tuple(t.shape) for t in model.outputs]:
            return twin, []
    except ConfigError:
        raise
    except Exception as error:
        reason = f"`{model.name}` can't be made {width:g} as wide: {str(error).splitlines()[0]}"
    else:
        reason = f"`{model.name}` changes its output shape when its layers get narrower"
    try:
        cut = prune_channels(model, 1 - width, multiple=multiple)
    except UnsupportedModelError:
        raise UnsupportedModelError(reason) from None
    return _fresh(cut, seed, input_size), list(cut.notes)


def _fresh(model: keras.Model, seed: int, input_size: Any, config: Mapping[str, Any] | None = None) -> keras.Model:
    """Return a model with new weights, from a model's config or an edited one, for inputs of another size."""
    whole = model.get_config()
    # A lifted model's student is no longer tied to the file that it was lifted from.
    lifted = "graph" in whole
    data = _unbuilt(dict(graph_config(whole)) if config is None else dict(config))
    data = {key: value for key, value in data.items() if key != "build_input_shape"}
    shape = model.input_shape
    if input_size is not None:
        data, shape = _resized(model, data, input_size)
    with seeded(seed), rebuilding(model):
        cls = keras.Model if lifted else type(model)
        if lifted:  # which lists its inputs and outputs even where there is one
            ends = {name: data[name] for name in ("input_layers", "output_layers")}
            data |= {name: value[0] if len(value) == 1 else value for name, value in ends.items()}
        twin = cls.from_config(data)
        if not twin.built:
            twin.build(shape)
    olds = dict(walk_layers(model))
    for path, layer in walk_layers(twin):
        before = olds.get(path)
        if before is None or not layer.variables or before.trainable_variables or not before.trainable:
            continue
        copy_own_state(before, layer)
    return twin


def _resized(model: keras.Model, config: dict[str, Any], input_size: Any) -> tuple[dict[str, Any], Any]:
    """Return a config whose images have another height and width, and their shape."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in size):
        raise ConfigError(f"`input_size` is {input_size!r}; it must be (height, width), or one number for both")
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4:
        raise ConfigError(
            f"`input_size` is for a model of one image input (batch, height, width, channels), and `{model.name}` "
            f"takes {', '.join(str(tuple(tensor.shape)) for tensor in model.inputs)}"
        )
    shape = (None, *size, model.inputs[0].shape[-1])
    layers = []
    for entry in config["layers"]:
        if entry.get("class_name") == "InputLayer":
            inner = {key: value for key, value in entry["config"].items() if key != "batch_input_shape"}
            entry = {**entry, "config": {**inner, "batch_shape": list(shape)}}
        layers.append(entry)
    return {**config, "layers": layers}, shape


def _edited(model: keras.Model, width: float, multiple: int) -> tuple[dict[str, Any], bool]:
    """Return the config with every layer's width multiplied, and whether any has changed."""
    whole = model.get_config()
    pinned = _pinned(whole)
    changed = []

    def edit(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        layers = []
        for entry in config["layers"]:
            inner = entry.get("config", {})
            if isinstance(inner, dict) and "layers" in inner:
                entry = {**entry, "config": edit(inner, f"{prefix}{inner['name']}/")}
            elif (key := _WIDTHS.get(entry.get("class_name", ""))) and f"{prefix}{inner['name']}" not in pinned:
                groups = int(inner.get("groups", 1) or 1)
                step = multiple * groups if groups > 1 else multiple
                size = min(inner[key], max(step, round(inner[key] * width / step) * step))
                changed.append(size != inner[key])
                entry = {**entry, "config": {**inner, key: size}}
            layers.append(entry)
        return {**config, "layers": layers}

    return edit(graph_config(whole), ""), any(changed)


def _unbuilt(data: Any) -> Any:
    """Return a config without the shapes that layers were built for."""
    if isinstance(data, Mapping):
        return {key: _unbuilt(value) for key, value in data.items() if key != "build_config"}
    return type(data)(_unbuilt(value) for value in data) if isinstance(data, list | tuple) else data


def _pinned(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Return the paths of the layers whose width is that of a model output."""
    config = graph_config(config)
    before = sources(config)
    entries = {entry["config"]["name"]: entry for entry in config["layers"]}
    pinned: set[str] = set()

    def back(name: str, seen: set[str]) -> None:
        if name in seen:
            return
        seen.add(name)
        entry = entries[name]
        inner = entry["config"]
        if isinstance(inner, dict) and "layers" in inner:
            found = _pinned(inner, f"{prefix}{name}/")
            pinned.update(found)
            if found:
                return
        elif entry.get("class_name") in _WIDTHS:
            pinned.add(f"{prefix}{name}")
            return
        for source in before[name]:
            back(source, seen)

    for output in outputs(config):
        back(output, set())
    return pinned
