"""What the axes of each layer's weights are: one entry a layer class, and nothing a method.

A rule gets the layer's inputs as `Value`, names the labels along each axis of the layer's weights, says what a cut
changes in the layer's config and what a call costs, and returns the outputs. A new layer is one rule and one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dwindle.pruning.analysis import ENTRYWISE, Analysis, ConfigEdit, Kept, Site, Value, activation_name
from dwindle.weights import raw_variable

Labelled = np.ndarray | None


class Place:
    """Where a rule writes: a layer, or a layer inside a wrapper.

    Args:
        analysis: The analysis of the model.
        path: Path of the layer that the model's config names.
        keys: Attributes that lead to the inner layer.
        inside: Keys that lead to the inner layer's config in the outer one's.
    """

    def __init__(self, analysis: Analysis, path: str, keys: tuple[str, ...] = (), inside: tuple[str, ...] = ()) -> None:
        self.analysis, self.path, self.keys, self.inside = analysis, path, keys, inside
        self._edits: list[ConfigEdit] = []

    def within(self, key: str, *config: str) -> Place:
        """Return the place of an inner layer."""
        return Place(self.analysis, self.path, (*self.keys, key), (*self.inside, *config))

    def new(self, name: str, count: int) -> np.ndarray:
        """Return labels of a width of this layer: the same at each call."""
        key = (self.path, "/".join((*self.keys, name)))
        widths = self.analysis._widths
        if key not in widths:
            widths[key] = self.analysis.labels.new(count)
        return widths[key]

    def weight(self, layer: Any, name: str, *axes: tuple[Labelled, str]) -> None:
        """Say which labels each axis of a weight has, and its role; see `dwindle.pruning.channel_groups.Member`.

        Fewer axes than the weight has are its last ones. A weight that the layer does not have is left out.
        """
        variable = raw_variable(layer, name)
        if variable is None:
            return
        rank = len(variable.shape)
        full = [(None, "")] * (rank - len(axes)) + list(axes)
        labels = [vector if size > 1 or vector is None or len(vector) == 1 else None
                  for (vector, _), size in zip(full, variable.shape, strict=True)]  # fmt: skip
        key = (self.path, "/".join((*self.keys, name)))
        self.analysis.tie(
            ("weight", *key), tuple(labels), f"`{self.path}` is shared by tensors that can't be cut alike"
        )
        if key not in self.analysis.sites:
            self.analysis.sites[key] = Site(*key, variable, labels, tuple(role for _, role in full))

    def edit(self, change: ConfigEdit, what: str = "size") -> None:
        """Say what a cut changes in the layer's config; said again at another call, it counts once."""
        analysis, inside = self.analysis, self.inside
        before = analysis.edits.get(self.path)
        key = ("edit", self.path, inside, what)
        if key in analysis._ties:
            return
        analysis._ties[key] = []

        def nested(config: dict[str, Any], kept: Kept, keys: Sequence[str] = inside) -> dict[str, Any]:
            if not keys:
                return change(config, kept)
            return {**config, keys[0]: nested(config[keys[0]], kept, keys[1:])}

        def both(config: dict[str, Any], kept: Kept) -> dict[str, Any]:
            return nested(config if before is None else before(config, kept), kept)

        analysis.edits[self.path] = both

    def activated(self, activation: Any, labels: np.ndarray) -> None:
        """Pin a width whose activation does not work entry by entry, such as a softmax."""
        if activation is not None and activation_name(activation) not in ENTRYWISE:
            self.analysis.labels.pin(labels, f"activation `{activation_name(activation)}` of `{self.path}`")

    def pin_others(self, value: Value, *axes: int) -> None:
        """Pin the labels on all axes but these."""
        left = {axis % len(value.shape) for axis in axes}
        others = [axis for axis in range(len(value.shape)) if axis not in left]
        self.analysis.pin(value, f"`{self.path}` needs every position of it", others)


def counted(name: str, labels: np.ndarray, times: int = 1) -> ConfigEdit:
    """Return the edit that sets a config's size to the number of labels that stay."""
    return lambda config, kept: {**config, name: len(kept(labels)) // times}


def _size(value: Value, axis: int) -> tuple[int, Labelled]:
    return value.shape[axis], value.axes[axis]


def dense(place: Place, layer: Any, x: Value, **_: Any) -> Value:
    """Kernel ``(in, units)``."""
    out = place.new("units", layer.units)
    place.weight(layer, "kernel", (x.axes[-1], "in"), (out, "out"))
    place.weight(layer, "bias", (out, "out"))
    place.activated(layer.activation, out)
    place.edit(counted("units", out))
    place.analysis.cost(float(np.prod(x.shape[1:-1])), _size(x, -1), (layer.units, out))
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
    place.analysis.cost(_positions(x, axis) * float(np.prod(layer.kernel_size)), _size(x, axis), (layer.filters, out))
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
    place.analysis.cost(_positions(result, axis) * float(np.prod(layer.kernel_size)) * multiplier, _size(x, axis))
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
    place.analysis.cost(positions * float(np.prod(layer.kernel_size)) * multiplier, _size(x, axis))
    place.analysis.cost(positions * multiplier, _size(x, axis), (layer.filters, out))
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


_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


def recurrent(place: Place, layer: Any, x: Value, initial_state: Any = None, **_: Any) -> list[Value]:
    """Kernel ``(in, gates * units)``, recurrent kernel ``(units, gates * units)``, gate after gate."""
    place.pin_others(x, -1)
    units, gates, labels = layer.units, _GATES[type(layer).__name__], place.analysis.labels
    out = place.new("units", units)
    cell, gated = place.within("cell"), np.tile(out, gates)
    cell.weight(layer.cell, "kernel", (x.axes[-1], "in"), (gated, "gate"))
    cell.weight(layer.cell, "recurrent_kernel", (out, "in"), (gated, "gate"))
    cell.weight(layer.cell, "bias", (gated, "gate"))
    for name in ("activation", "recurrent_activation"):
        place.activated(getattr(layer.cell, name, None), out)
    states = initial_state if isinstance(initial_state, list | tuple) else [initial_state]
    for state in states:
        if isinstance(state, Value):
            if state.axes[-1] is None:
                labels.pin(out, f"`{place.path}` starts with a state that can't be cut")
            else:
                labels.unite(state.axes[-1], out)
    place.edit(counted("units", out))
    steps = x.shape[1]
    place.analysis.cost(steps * gates, _size(x, -1), (units, out))
    place.analysis.cost(steps * gates, (units, out), (units, out))
    last = Value((x.shape[0], units), layer.compute_dtype, (None, out))
    first = (
        Value((x.shape[0], steps, units), layer.compute_dtype, (None, None, out)) if layer.return_sequences else last
    )
    return [first, *([last] * (2 if gates == 4 else 1) if layer.return_state else [])]


def bidirectional(place: Place, layer: Any, x: Value, initial_state: Any = None, **_: Any) -> list[Value]:
    """Two recurrent layers of one width: what Keras builds behind them counts on it."""
    if type(layer.forward_layer).__name__ not in _GATES or initial_state is not None:
        return _unknown(place, layer, x)
    forward = recurrent(place.within("forward_layer", "layer", "config"), layer.forward_layer, x)
    backward = recurrent(place.within("backward_layer", "backward_layer", "config"), layer.backward_layer, x)
    a, b = (found[0].axes[-1] for found in (forward, backward))
    if a is None or b is None:
        raise AssertionError("recurrent layers label their units")
    place.analysis.labels.unite(a, b)
    if layer.merge_mode is None:
        merged = [forward[0], backward[0]]
    elif layer.merge_mode == "concat":
        merged = [forward[0].relabelled(-1, np.concatenate([a, b]), len(a) + len(b))]
    else:
        merged = [forward[0]]
    return [*merged, *forward[1:], *backward[1:]]


def time_distributed(place: Place, layer: Any, x: Value, **_: Any) -> list[Value]:
    """The inner layer, at every step."""
    rule = rule_of(layer.layer)
    if rule is None:
        return _unknown(place, layer, x)
    place.pin_others(x, *range(2, len(x.shape)))
    costs = place.analysis.macs
    before = len(costs)
    step = Value((x.shape[0], *x.shape[2:]), x.dtype, (x.axes[0], *x.axes[2:]))
    found = rule(place.within("layer", "layer", "config"), layer.layer, step)
    costs[before:] = [(factor * x.shape[1], vectors) for factor, vectors in costs[before:]]
    one = found[0] if isinstance(found, list) else found
    return [Value((one.shape[0], x.shape[1], *one.shape[1:]), one.dtype, (None, None, *one.axes[1:]))]


def multi_head_attention(
    place: Place, layer: Any, query: Value, value: Value, key: Value | None = None, **options: Any
) -> list[Value]:
    """Kernels ``(in, heads, width)`` and ``(heads, width, out)``: whole heads go, and channels of the values."""
    key = value if key is None else key
    given = (query, value, key)
    out_shape = layer.get_config().get("output_shape")
    if getattr(layer, "use_gate", False) or not (out_shape is None or len(np.atleast_1d(out_shape)) == 1):
        return _unknown(place, layer, *given)
    for one in given:
        place.pin_others(one, -1)
    mask = options.get("attention_mask")
    if isinstance(mask, Value):
        place.pin_others(mask)
    heads, width = place.new("heads", layer.num_heads), place.new("value_dim", layer.value_dim)
    count, sizes = layer.num_heads, {"query": layer.key_dim, "key": layer.key_dim, "value": layer.value_dim}
    cost = place.analysis.cost
    for name, one in (("query", query), ("key", key), ("value", value)):
        inner = width if name == "value" else None
        part, owner = place.within(f"{name}_dense"), getattr(layer, f"{name}_dense")
        part.weight(owner, "kernel", (one.axes[-1], "in"), (heads, "out"), (inner, "out" if inner is not None else ""))
        part.weight(owner, "bias", (heads, "out"), (inner, "out" if inner is not None else ""))
        cost(float(np.prod(one.shape[1:-1])), _size(one, -1), (count, heads), (sizes[name], inner))
    outer = query.shape[-1] if out_shape is None else int(np.atleast_1d(out_shape)[0])
    out = place.new("output", outer)
    part = place.within("output_dense")
    part.weight(layer.output_dense, "kernel", (heads, "in"), (width, "in"), (out, "out"))
    part.weight(layer.output_dense, "bias", (out, "out"))
    targets, sources = float(np.prod(query.shape[1:-1])), float(np.prod(value.shape[1:-1]))
    cost(targets * sources * layer.key_dim, (count, heads))
    cost(targets * sources, (count, heads), (layer.value_dim, width))
    cost(targets, (count, heads), (layer.value_dim, width), (outer, out))
    entering = query.axes[-1]

    def edit(config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        size = len(kept(out))
        now = query.shape[-1] if entering is None else len(kept(entering))
        return {
            **config, "num_heads": len(kept(heads)), "value_dim": len(kept(width)),
            "output_shape": None if out_shape is None and size == now else [size],
        }  # fmt: skip

    place.edit(edit)
    results = [query.relabelled(-1, out, outer)]
    if options.get("return_attention_scores"):
        shape = (query.shape[0], count, *query.shape[1:-1], *value.shape[1:-1])
        results.append(Value(shape, query.dtype, (None, heads, *(None,) * (len(shape) - 2))))
    return results


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


def _unknown(place: Place, layer: Any, *values: Value) -> list[Value]:
    for value in values:
        place.pin_others(value)
        place.analysis.pin(value, f"layer `{place.path}` ({type(layer).__name__}) is not known to channel pruning")
    shapes = [value.shape for value in values]
    shape = layer.compute_output_shape(*shapes)
    shapes = [shape] if isinstance(shape[0], int | type(None)) else list(shape)
    return [Value.plain([1 if size is None else size for size in one], values[0].dtype) for one in shapes]


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
    "MultiHeadAttention": multi_head_attention,
    "ConstantOperand": constant_operand, "Gather": gather,
}  # fmt: skip


def rule_of(layer: Any) -> Rule | None:
    """Return the rule of a stock layer, or of one of dwindle's own; None for any other, subclasses included."""
    cls = type(layer)
    return RULES.get(cls.__name__) if cls.__module__.split(".")[0] in ("keras", "dwindle") else None
