"""The rules of layers over sequences: recurrent ones and attention; see `dwindle.pruning.layer_rules`."""

from __future__ import annotations

from typing import Any

import numpy as np

from dwindle.pruning.analysis import Kept, Value
from dwindle.pruning.places import Place, counted, size_of, unknown

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


def recurrent(place: Place, layer: Any, x: Value, initial_state: Any = None, **_: Any) -> list[Value]:
    """Kernel ``(in, gates * units)``, recurrent kernel ``(units, gates * units)``, gate after gate."""
    place.pin_others(x, -1)
    units, gates, labels = layer.units, GATES[type(layer).__name__], place.analysis.labels
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
    place.analysis.cost(steps * gates, size_of(x, -1), (units, out))
    place.analysis.cost(steps * gates, (units, out), (units, out))
    last = Value((x.shape[0], units), layer.compute_dtype, (None, out))
    first = (
        Value((x.shape[0], steps, units), layer.compute_dtype, (None, None, out)) if layer.return_sequences else last
    )
    return [first, *([last] * (2 if gates == 4 else 1) if layer.return_state else [])]


def bidirectional(place: Place, layer: Any, x: Value, initial_state: Any = None, **_: Any) -> list[Value]:
    """Two recurrent layers of one width: what Keras builds behind them counts on it."""
    if type(layer.forward_layer).__name__ not in GATES or initial_state is not None:
        return unknown(place, layer, x)
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


def multi_head_attention(
    place: Place, layer: Any, query: Value, value: Value, key: Value | None = None, **options: Any
) -> list[Value]:
    """Kernels ``(in, heads, width)`` and ``(heads, width, out)``: whole heads go, and channels of the values."""
    key = value if key is None else key
    given = (query, value, key)
    out_shape = layer.get_config().get("output_shape")
    if getattr(layer, "use_gate", False) or not (out_shape is None or len(np.atleast_1d(out_shape)) == 1):
        return unknown(place, layer, *given)
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
        cost(float(np.prod(one.shape[1:-1])), size_of(one, -1), (count, heads), (sizes[name], inner))
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


def grouped_query_attention(
    place: Place, layer: Any, query: Value, value: Value, key: Value | None = None, **options: Any
) -> list[Value]:
    """As `multi_head_attention`: a head of keys and values goes with all the query heads that share it."""
    key = value if key is None else key
    given = (query, value, key)
    if getattr(layer, "use_gate", False):
        return unknown(place, layer, *given)
    for one in given:
        place.pin_others(one, -1)
    shared, count, width = layer.num_key_value_heads, layer.num_query_heads, layer.head_dim
    few = place.new("heads", shared)
    heads = np.repeat(few, count // shared)
    cost, outer = place.analysis.cost, query.shape[-1]
    for name, one, size, vector in (
        ("query", query, count, heads),
        ("key", key, shared, few),
        ("value", value, shared, few),
    ):
        part, owner = place.within(f"_{name}_dense"), getattr(layer, f"_{name}_dense")
        part.weight(owner, "kernel", (one.axes[-1], "in"), (vector, "out"), (None, ""))
        part.weight(owner, "bias", (vector, "out"), (None, ""))
        cost(float(np.prod(one.shape[1:-1])) * width, size_of(one, -1), (size, vector))
    out = place.new("output", outer)
    part = place.within("_output_dense")
    part.weight(layer._output_dense, "kernel", (heads, "in"), (None, ""), (out, "out"))
    part.weight(layer._output_dense, "bias", (out, "out"))
    if query.axes[-1] is None:  # the layer makes as many channels as it takes
        place.analysis.labels.pin(out, f"`{place.path}` makes as many as it takes")
    else:
        place.analysis.labels.unite(out, query.axes[-1])
    targets, sources = query.shape[1], value.shape[1]
    cost(2.0 * targets * sources * width, (count, heads))
    cost(float(targets * width), (count, heads), (outer, out))
    place.edit(counted("num_query_heads", heads), "query heads")
    place.edit(counted("num_key_value_heads", few), "heads")
    results = [query.relabelled(-1, out, outer)]
    if options.get("return_attention_scores"):
        shape = (query.shape[0], count, targets, sources)
        results.append(Value(shape, query.dtype, (None, heads, None, None)))
    return results
