"""What the axes of each layer's weights are: one entry a layer class, and nothing a method.

A rule gets the layer's inputs as `Value`, names the labels along each axis of the layer's weights, says what a cut
changes in the layer's config and what a call costs, and returns the outputs. A new layer is one rule and one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dwindle.pruning.analysis import Kept, Value
from dwindle.pruning.places import Labelled, Place, counted, size_of, unknown
from dwindle.pruning.sequence_rules import (
    bidirectional,
    grouped_query_attention,
    multi_head_attention,
    recurrent,
)
from dwindle.weights import raw_variable


def dense(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Kernel ``(in, units)``."""
    out = place.new("units", layer.units)
    place.weight(layer, "kernel", (x.axes[-1], "in"), (out, "out"))
    place.weight(layer, "bias", (out, "out"))
    place.activated(layer.activation, out)
    place.edit(counted("units", out))
    place.analysis.cost(float(np.prod(x.shape[1:-1])), size_of(x, -1), (layer.units, out))
    return x.relabelled(-1, out, layer.units)


def _channels(layer: Any) -> int:
    return -1 if layer.data_format == "channels_last" else 1


def _out(layer: Any, x: Value, axis: int, labels: Labelled) -> Value:
    shape = tuple(int(size) for size in layer.compute_output_shape(x.shape))
    return Value(shape, x.dtype, tuple(labels if a == axis % len(shape) else None for a in range(len(shape))))


def _positions(value: Value, axis: int) -> float:
    return float(np.prod(value.shape[1:])) / value.shape[axis]


def convolution(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Kernel ``(..., in / groups, filters)``.

    In a grouped convolution each group loses channels at the same places, so that groups stay of one size; where a
    group has a single input channel, whole groups go.
    """
    axis, groups, filters = _channels(layer), layer.groups, layer.filters
    place.pin_others(x, axis)
    entering = x.axes[axis]
    labels = place.analysis.labels
    per_group = x.shape[axis] // groups
    out: Labelled
    if groups > 1 and per_group == 1:
        out = None if entering is None else np.repeat(entering, filters // groups)
        inner = None
        if entering is not None:
            place.edit(counted("groups", entering), "groups")
    elif groups > 1:
        out = np.tile(place.new("filters", filters // groups), groups)
        inner = None if entering is None else entering[:per_group]
        if entering is not None:
            labels.unite(np.tile(entering[:per_group], groups), entering)
    else:
        out, inner = place.new("filters", filters), entering
    place.weight(layer, "kernel", (inner, "in"), (out, "out"))
    place.weight(layer, "bias", (out, "out"))
    if out is not None:
        place.activated(layer.activation, out)
        place.edit(counted("filters", out))
    result = _out(layer, x, axis, out)
    place.analysis.cost(
        _positions(result, axis) * float(np.prod(layer.kernel_size)), (per_group, inner), (filters, out)
    )
    return result


def transposed(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Kernel ``(..., filters, in)``."""
    axis = _channels(layer)
    place.pin_others(x, axis)
    out = place.new("filters", layer.filters)
    place.weight(layer, "kernel", (out, "out"), (x.axes[axis], "in"))
    place.weight(layer, "bias", (out, "out"))
    place.activated(layer.activation, out)
    place.edit(counted("filters", out))
    place.analysis.cost(_positions(x, axis) * float(np.prod(layer.kernel_size)), size_of(x, axis), (layer.filters, out))
    return _out(layer, x, axis, out)


def depthwise(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Kernel ``(..., channels, multiplier)``."""
    axis, multiplier = _channels(layer), layer.depth_multiplier
    place.pin_others(x, axis)
    through = x.axes[axis]
    out = None if through is None else np.repeat(through, multiplier)
    place.weight(layer, "kernel", (through, "through"), (None, ""))
    place.weight(layer, "bias", (out, "through"))
    if out is not None:
        place.activated(layer.activation, out)
    result = _out(layer, x, axis, out)
    place.analysis.cost(_positions(result, axis) * float(np.prod(layer.kernel_size)) * multiplier, size_of(x, axis))
    return result


def separable(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Depthwise kernel ``(..., channels, multiplier)``, pointwise ``(..., channels * multiplier, filters)``."""
    axis, multiplier = _channels(layer), layer.depth_multiplier
    place.pin_others(x, axis)
    through = x.axes[axis]
    middle = None if through is None else np.repeat(through, multiplier)
    out = place.new("filters", layer.filters)
    place.weight(layer, "depthwise_kernel", (through, "through"), (None, ""))
    place.weight(layer, "pointwise_kernel", (middle, "in"), (out, "out"))
    place.weight(layer, "bias", (out, "out"))
    place.activated(layer.activation, out)
    place.edit(counted("filters", out))
    result = _out(layer, x, axis, out)
    positions = _positions(result, axis)
    place.analysis.cost(positions * float(np.prod(layer.kernel_size)) * multiplier, size_of(x, axis))
    place.analysis.cost(positions * multiplier, size_of(x, axis), (layer.filters, out))
    return result


def normalization(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """One entry a channel in each weight; the statistics are those of the channels that stay."""
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    vectors = [(x.axes[axis], "scale") for axis in axes]
    for name in ("gamma", "beta", "scale", "moving_mean", "moving_variance"):
        place.weight(layer, name, *vectors)
    if type(layer).__name__ != "BatchNormalization" and any(vector is not None for vector in x.axes):
        place.analysis.normalized[place.path] = x.axes
    return x


def group_normalization(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """As `normalization`; every group of channels loses the same places."""
    vector, groups = x.axes[layer.axis], layer.groups
    if vector is not None and groups not in (-1, 1):
        size = len(vector) // groups
        if size == 1:
            place.edit(counted("groups", vector))
        else:
            place.analysis.labels.unite(np.tile(vector[:size], groups), vector)
    return normalization(place, layer, x)


def prelu(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Slopes ``input_shape[1:]``, 1 along shared axes."""
    place.weight(layer, "alpha", *[(vector, "through") for vector in x.axes[1:]])
    return x


def embedding(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Table ``(rows, output_dim)``."""
    place.pin_others(x)
    out = place.new("output_dim", layer.output_dim)
    place.weight(layer, "embeddings", (None, ""), (out, "out"))
    place.edit(counted("output_dim", out))
    return Value((*x.shape, layer.output_dim), layer.compute_dtype, (*(None,) * len(x.shape), out))


def einsum_dense(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Any kernel: letters of the input are its labels, letters that only kernel and output have are new."""
    left, result = layer.equation.replace(" ", "").split("->")
    data, kernel = left.split(",")

    def spread(letters: str, rank: int) -> list[str]:
        if "..." not in letters:
            return list(letters)
        before, after = letters.split("...")
        missing = rank - len(before) - len(after)
        return [*before, *[f"{number}" for number in range(-missing, 0)], *after]

    shape = tuple(int(size) for size in layer.compute_output_shape(x.shape))
    entering, leaving = spread(data, len(x.shape)), spread(result, len(shape))
    of: dict[str, Labelled] = dict(zip(entering, x.axes, strict=True))
    sizes = dict(zip(entering, x.shape, strict=True)) | dict(zip(leaving, shape, strict=True))
    for letter in leaving:
        if letter not in of and letter in kernel:
            of[letter] = place.new(letter, sizes[letter])
    roles = {letter: "in" if letter in entering else "out" for letter in kernel}
    place.weight(layer, "kernel", *[(of.get(letter), roles[letter]) for letter in kernel])
    out = [of.get(letter) for letter in leaving]
    bias = raw_variable(layer, "bias")
    if bias is not None:
        place.weight(layer, "bias", *[(vector, "out") for vector in out[len(out) - len(bias.shape) :]])
    new = [vector for letter, vector in of.items() if vector is not None and letter not in entering]
    for vector in new:
        place.activated(layer.activation, vector)

    def edit(config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        given = config["output_shape"]
        target = [given] if isinstance(given, int) else list(given)
        offset = len(out) - len(target)
        target = [
            size if size is None or out[offset + at] is None else len(kept(out[offset + at]))  # type: ignore[arg-type]
            for at, size in enumerate(target)
        ]
        return {**config, "output_shape": target}

    place.edit(edit)
    letters = [letter for letter in sizes if letter != entering[0]]
    place.analysis.cost(1.0, *[(sizes[letter], of.get(letter)) for letter in letters])
    return Value(shape, x.dtype, tuple(out))


def time_distributed(place: Place, layer: Any, x: Value, **_: Any) -> list[Value]:
    """The inner layer, at every step."""
    rule = rule_of(layer.layer)
    if rule is None:
        return unknown(place, layer, x)
    place.pin_others(x, *range(2, len(x.shape)))
    costs = place.analysis.macs
    before = len(costs)
    step = Value((x.shape[0], *x.shape[2:]), x.dtype, (x.axes[0], *x.axes[2:]))
    found = rule(place.within("layer", "layer", "config"), layer.layer, step)
    costs[before:] = [(factor * x.shape[1], vectors) for factor, vectors in costs[before:]]
    one = found[0] if isinstance(found, list) else found
    return [Value((one.shape[0], x.shape[1], *one.shape[1:]), one.dtype, (None, None, *one.axes[1:]))]


def layer_scale(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """The scale of a residual branch in `keras.applications`: one factor a channel."""
    vector = x.axes[-1]
    place.weight(layer, "gamma", (vector, "scale"))
    if vector is not None:
        place.edit(counted("projection_dim", vector))
    return x


def constant_operand(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """A constant of a lifted model, which broadcasts against the input."""
    labels, size = place.analysis.labels, tuple(layer.shape)
    rank = max(len(x.shape), len(size))
    axes, shape = list(x.axes), list(x.shape)
    if rank != len(x.shape):
        place.pin_others(x)
        place.analysis.pin(x, f"`{place.path}` adds axes")
        full = np.broadcast_shapes(x.shape, size)
        return Value.plain(full, x.dtype)
    constant: list[Labelled] = []
    for axis in range(rank - len(size), rank):
        own = size[axis - (rank - len(size))]
        vector = axes[axis]
        if own > 1 and shape[axis] == 1:  # the input is the one that broadcasts
            if vector is not None:
                labels.pin(vector, "the only channel")
            vector = place.new(f"axis{axis}", own)
            axes[axis], shape[axis] = vector, own
        constant.append(vector if own > 1 else None)
    place.weight(layer, "value", *[(vector, "through") for vector in constant])

    def edit(config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        new = [old if vector is None else len(kept(vector)) for old, vector in zip(size, constant, strict=True)]
        return {**config, "shape": new}

    place.edit(edit)
    return Value(tuple(shape), x.dtype, tuple(axes))


def gather(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """A lifted model's embedding."""
    place.pin_others(x)
    if len(layer.width) != 1:
        return Value.plain((*x.shape, *layer.width), layer.compute_dtype)
    out = place.new("width", layer.width[0])
    place.weight(layer, "embeddings", (None, ""), (out, "out"))
    place.edit(lambda config, kept: {**config, "width": [len(kept(out))]})
    return Value((*x.shape, layer.width[0]), layer.compute_dtype, (*(None,) * len(x.shape), out))


Rule = Callable[..., "Value | list[Value]"]

RULES: dict[str, Rule] = {
    "Dense": dense, "EinsumDense": einsum_dense, "Embedding": embedding,
    "Conv1D": convolution, "Conv2D": convolution, "Conv3D": convolution,
    "Conv1DTranspose": transposed, "Conv2DTranspose": transposed, "Conv3DTranspose": transposed,
    "DepthwiseConv1D": depthwise, "DepthwiseConv2D": depthwise,
    "SeparableConv1D": separable, "SeparableConv2D": separable,
    "BatchNormalization": normalization, "LayerNormalization": normalization, "RMSNormalization": normalization,
    "UnitNormalization": normalization, "GroupNormalization": group_normalization, "PReLU": prelu,
    "LSTM": recurrent, "GRU": recurrent, "SimpleRNN": recurrent,
    "Bidirectional": bidirectional, "TimeDistributed": time_distributed,
    "MultiHeadAttention": multi_head_attention, "GroupedQueryAttention": grouped_query_attention,
    "LayerScale": layer_scale,
    "ConstantOperand": constant_operand, "Gather": gather,
}  # fmt: skip


def rule_of(layer: Any) -> Rule | None:
    """Return the rule of a stock layer, or of one of dwindle's own; None for any other, subclasses included."""
    cls = type(layer)
    if cls.__name__ == "TimeDistributed" and rule_of(layer.layer) is None and not layer.weights:
        return None  # it can be tried as a whole
    return RULES.get(cls.__name__) if cls.__module__.split(".")[0] in ("keras", "dwindle") else None
