"""From an ONNX file to a Keras model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from dwindle.errors import UnsupportedModelError
from dwindle.files import LARGEST_CONFIG_BYTES
from dwindle.lifting.onnx.building import Builder
from dwindle.lifting.onnx.graph import Graph, read_graph, set_shapes
from dwindle.lifting.onnx.verifying import check


def lift_onnx(
    source: Any,
    *,
    inputs: Mapping[str, Sequence[int | None]] | Sequence[int | None] | None = None,
    layout: str = "source",
    name: str | None = None,
) -> keras.Model:
    """Make a trainable Keras model from an ONNX file.

    Inside, images have their channels last, whatever the file says; transposes are pushed through and cancelled, and
    ``model.notes`` counts those that are left. Layers are named after the file's nodes. A node without an entry in the
    table of operators runs in ONNX Runtime, as it is and without a gradient, and ``model.notes`` names it.

    Args:
        source: Path of an ``.onnx`` file, or an `onnx.ModelProto`.
        inputs: Shapes of inputs whose lengths are open, by name, or the shape of the only input. None stands for a
            length that stays open.
        layout: ``"source"`` keeps the order of the axes of inputs and outputs; ``"channels_last"`` makes them
            ``(batch, ..., channels)`` where they have at least three axes and the file has channels second.
        name: Name of the model; that of the graph by default.

    Returns:
        A functional model with stock layers where Keras has them. A first axis of length 1 becomes one of any length
        where the graph allows it.

    Raises:
        ConfigError: If ``inputs`` does not fit.
        UnsupportedModelError: If the file is damaged, or has a node that neither an entry nor ONNX Runtime can do.
        VerificationError: If the model does not predict what ONNX Runtime predicts.
        MissingDependencyError: If the `onnx` package is not installed.
    """
    graph = read_graph(source)
    set_shapes(graph, inputs)
    if not graph.inputs:
        raise UnsupportedModelError("the graph has no inputs: there is nothing to run it on")
    builder, model = _opened(graph, layout, name)
    builder.forget_constants()  # the layers have them, and comparing takes memory of its own
    model.notes = (check(builder, model, source), *model.notes)
    return model


def _opened(graph: Graph, layout: str, name: str | None) -> tuple[Builder, keras.Model]:
    """Return the model for any number of samples, or for one where the graph does not allow more.

    Where neither can be, nodes that are used in a way that has no entry stay as they are.
    """
    first: UnsupportedModelError | None = None
    closed = _one_sample(graph)
    for lenient in (False, True):
        for one_sample in (False, True):
            tried = closed if one_sample else graph
            if tried is None:
                continue
            try:
                builder, model = build(tried, open_batch=not one_sample, layout=layout, name=name, lenient=lenient)
            except UnsupportedModelError as error:
                first = first or error
                continue
            if one_sample:
                model.notes = (*model.notes, f"takes one sample at a time: {first}")
            return builder, model
    raise first or UnsupportedModelError("the graph can't be built")


def _one_sample(graph: Graph) -> Graph | None:
    """Return the graph with one sample a call; None where no input has samples on its first axis."""
    shapes = [(name, (1, *shape[1:]) if shape and not isinstance(shape[0], int) else shape, dtype)
              for name, shape, dtype in graph.inputs]  # fmt: skip
    return replace(graph, inputs=shapes) if any(shape for _, shape, _ in shapes) else None


def build(
    graph: Graph, *, open_batch: bool, layout: str, name: str | None, lenient: bool = False
) -> tuple[Builder, keras.Model]:
    """Return the model of a graph, and what built it; nothing is compared yet."""
    builder = Builder(graph, open_batch=open_batch, channels_last=layout == "channels_last", lenient=lenient)
    inputs, outputs = builder.run()
    ends = [found[0] if len(found) == 1 else found for found in (inputs, outputs)]
    model = keras.Model(*ends, name=_valid(name or graph.name))
    notes = list(builder.notes)
    if builder.islands and (length := len(model.to_json())) > LARGEST_CONFIG_BYTES:
        notes.append(
            "a .keras could not be read: with what stays as in the file, its config would have "
            f"{length} bytes, and the largest that is read has {LARGEST_CONFIG_BYTES}"
        )
    if builder.transposes:
        left = f"{builder.transposes} transpose{'s' * (builder.transposes > 1)}"
        notes.append(f"{left} left, of {sum(node.kind == 'Transpose' for node in graph.nodes)} in the file")
    model.notes = tuple(notes)
    return builder, model


def _valid(name: str) -> str:
    found = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in name).strip("_.-")
    return found or "onnx"
