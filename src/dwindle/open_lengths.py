"""Open lengths of inputs, besides the number of samples: a model is rebuilt for chosen ones, its weights the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

import keras

from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.graph_editing import copy_by_path, functional_config
from dwindle.weights import is_graph, rebuilding

Shape = tuple[int | None, ...]


def by_name(given: Mapping[str, Sequence[Any]] | Sequence[Any], names: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """Return shapes by the names of the inputs that they are for.

    Args:
        given: Name to shape, or the shape of the only input.
        names: Names of all inputs.

    Raises:
        ConfigError: If a name is missing or not known.
    """
    listed = ", ".join(f"`{name}`" for name in names)
    if not isinstance(given, Mapping):
        if len(names) != 1:
            raise ConfigError(f"the model has the inputs {listed}; pass inputs={{name: shape, ...}}")
        given = {next(iter(names)): given}
    if unknown := set(given) - set(names):
        raise ConfigError(f"the model has no input `{min(unknown)}`; it has {listed}")
    for name, shape in given.items():
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise ConfigError(
                f"the shape of input `{name}` is {shape!r}; it must be a tuple, such as (None, 224, 224, 3)"
            )
    return {name: tuple(shape) for name, shape in given.items()}


def require_fit(name: str, own: Shape | None, given: tuple[Any, ...], where: str) -> None:
    """Refuse a shape that chooses anything but open lengths of samples.

    Args:
        name: The input's.
        own: The input's shape, number of samples first; None: it is of any.
        given: The chosen one, of which lengths may be open too.
        where: What has the input, in words.

    Raises:
        ConfigError: If it does not fit.
    """
    if own is None:
        own = (None,) * len(given)
    open_first = bool(given) and given[0] == own[0] if own else not given
    if not (open_first and len(given) == len(own)) or not all(
        have == length or (have is None and isinstance(length, Integral) and int(length) > 0)
        for have, length in zip(own[1:], given[1:], strict=True)
    ):
        raise ConfigError(
            f"input `{name}` has the shape {own} in {where}; {given} does not fit it: only lengths that are None "
            "there, but for the first, the number of samples, can be chosen"
        )


def open_inputs(model: keras.Model) -> dict[str, Shape]:
    """Return the shape of each input with an open length besides the number of samples, by the input's name."""
    inputs = getattr(model, "inputs", None) or []
    return {tensor.name: tuple(tensor.shape) for tensor in inputs if None in tuple(tensor.shape)[1:]}


def with_lengths(model: keras.Model, inputs: Mapping[str, Sequence[Any]] | Sequence[Any]) -> keras.Model:
    """Return a model whose inputs have the given shapes, with the weights of one that leaves them open.

    Args:
        model: A built functional or sequential model; it is not changed.
        inputs: Shapes by the names of inputs, or the shape of the only input, number of samples first; None stands for
            a length that stays open.

    Returns:
        A new functional model, not compiled; ``model`` itself where nothing was open.

    Raises:
        ConfigError: If a name or a shape does not fit, or the model's layers don't take it.
        UnsupportedModelError: If the model is no graph.
    """
    if not is_graph(model):
        raise UnsupportedModelError(
            f"`{model.name}` is a subclassed model, whose shapes can't be changed; wrap it: keras.Model(x, model(x)) "
            "with x = keras.Input(shape)"
        )
    own = {tensor.name: tuple(tensor.shape) for tensor in model.inputs}
    wanted = by_name(inputs, own)
    for name, shape in wanted.items():
        require_fit(name, own[name], shape, "the model")
    if all(own[name] == shape for name, shape in wanted.items()):
        return model
    config = functional_config(model)
    shapes = {layer: wanted[name] for name, layer in _input_layers(model).items() if name in wanted}
    layers = []
    for entry in config["layers"]:
        if (name := entry["config"]["name"]) in shapes:
            entry = {**entry, "config": {**entry["config"], "batch_shape": shapes[name]}}
        layers.append(entry)
    try:
        with rebuilding(model):
            new = keras.Model.from_config({**config, "layers": layers})
    except (TypeError, ValueError) as error:
        if any(isinstance(layer, keras.layers.Lambda) for layer in model._flatten_layers()):
            raise UnsupportedModelError(
                f"`{model.name}` has a Lambda layer, and can't be built anew for other lengths; write a layer class in "
                "its place, or make the model with inputs of fixed lengths"
            ) from None
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"`{model.name}` does not take inputs of the shape {_in_words(wanted)}: {said}") from None
    copy_by_path(model, new)
    if notes := getattr(model, "notes", ()):
        new.notes = notes
    return new


def _input_layers(model: keras.Model) -> dict[str, str]:
    """Return the layer that makes each input, by the input's name, which is another where none was given."""
    graph = model if any(isinstance(one, keras.layers.InputLayer) for one in model.layers) else None
    layers = (graph or keras.Model(model.inputs, model.outputs)).layers
    made = {id(layer.output): layer.name for layer in layers if isinstance(layer, keras.layers.InputLayer)}
    return {tensor.name: made.get(id(tensor), tensor.name) for tensor in model.inputs}


def with_lengths_of(model: keras.Model, samples: Sequence[Any]) -> tuple[keras.Model, list[str]]:
    """Return a model whose inputs have the lengths of samples where it leaves them open, and notes that say so.

    Args:
        model: A built model.
        samples: One array for each input, of a shape that the model takes.
    """
    found = open_inputs(model)
    if not found or not is_graph(model):
        return model, []
    chosen: dict[str, Shape] = {
        tensor.name: (tensor.shape[0], *array.shape[1:])
        for tensor, array in zip(model.inputs, samples, strict=True)
        if tensor.name in found
    }
    notes = [
        f"input `{name}` has the lengths {shape[1:]} of `data`; the model leaves them open: {found[name][1:]}"
        for name, shape in chosen.items()
    ]
    return with_lengths(model, chosen), notes


def refuse_open_lengths(shapes: Mapping[str, Sequence[int | None]], *, graph: bool) -> None:
    """Refuse inputs of open lengths, which no LiteRT file has.

    Args:
        shapes: Shape of each input of a model by its name.
        graph: Whether the model is a graph, which can be built anew.

    Raises:
        UnsupportedModelError: If one is open besides the number of samples.
    """
    for name, shape in shapes.items():
        if None in tuple(shape)[1:]:
            usual = 224 if len(shape) == 4 else 128
            example = (shape[0], *(usual if length is None else length for length in shape[1:]))
            if not graph:
                raise UnsupportedModelError(
                    f"input `{name}` has open lengths, {tuple(shape)}, and a .tflite needs all but the first; wrap the "
                    f"model: keras.Model(x, model(x)) with x = keras.Input({example[1:]})"
                )
            written = ",".join("?" if length is None else str(length) for length in example)
            raise UnsupportedModelError(
                f"input `{name}` has open lengths, {tuple(shape)}, and a .tflite needs all but the first; choose them "
                f"with dw.load(model, inputs={{{name!r}: {example}}}) (--input {name}={written}), or pass `data` that "
                "has them"
            )


def _in_words(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{shape} (`{name}`)" for name, shape in shapes.items())
