"""Recurrent layers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dwindle.lifting.constants import Repeated
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.registry import (
    Context,
    Inputs,
    is_constant,
    moving,
    number,
    operator,
    optional,
    unsupported,
)
from dwindle.lifting.onnx.values import Moving

ops = keras.ops

_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@operator("LSTM", "GRU", "RNN")
def _recurrent(context: Context, node: Node, inputs: Inputs) -> Any:
    value, kernel, recurrent = moving(node, inputs[0]), inputs[1], inputs[2]
    bias = optional(inputs, 3)
    if not all(is_constant(given) for given in (kernel, recurrent)) or isinstance(bias, Moving):
        raise unsupported(node, "computes its weights")
    given = node.attributes
    units, directions = given["hidden_size"], kernel.shape[0]
    names = [name.capitalize() for name in given.get("activations") or _DEFAULTS[node.kind] * directions]
    activation = _check(node, inputs, value, names, directions)
    batch_first = given.get("layout", 0) == 1
    time, batch = (1, 0) if batch_first else (0, 1)
    tensor = context.arranged(value, (batch, time, 2))
    way = given.get("direction", "forward")
    sequences, states = [], []
    for number_ in range(directions):
        backwards = way == "reverse" or number_ == 1
        weights = _weights(node, kernel[number_], recurrent[number_], None if bias is None else bias[number_], units)
        layer = _layer(context, node, units, activation, backwards)
        initial = _initial(context, node, inputs, tensor, number_, batch_first)
        if not layer.built:
            layer.build(tuple(tensor.shape))
        layer.set_weights(weights)
        found = layer(tensor, initial_state=initial) if initial is not None else layer(tensor)
        sequence, *state = found
        sequences.append(ops.flip(sequence, axis=1) if backwards else sequence)
        states.append(state)
    # (batch, time, directions, units), whose ONNX axes are (time, directions, batch, units) or layout 1's.
    joined = ops.expand_dims(sequences[0], 2) if directions == 1 else ops.stack(sequences, axis=2)
    results = [context.value(joined, (0, 1, 2, 3) if batch_first else (2, 0, 1, 3))]
    for place in range(len(states[0])):
        parts = [state[place] for state in states]
        stacked = ops.expand_dims(parts[0], 1) if directions == 1 else ops.stack(parts, axis=1)
        results.append(context.value(stacked, (0, 1, 2) if batch_first else (1, 0, 2)))
    return results


def _check(node: Node, inputs: Inputs, value: Moving, names: list[str], directions: int) -> str:
    """Return the activation, after a check that Keras' layers do what the node asks for."""
    given, kinds = node.attributes, _DEFAULTS[node.kind]
    lengths, peepholes = optional(inputs, 4), optional(inputs, 7)
    time = value.sizes[1 if given.get("layout", 0) == 1 else 0]
    if lengths is not None and not (is_constant(lengths) and (lengths == time).all()):
        raise unsupported(node, "has sequences of several lengths")
    if peepholes is not None and (not is_constant(peepholes) or peepholes.any()):
        raise unsupported(node, "has peepholes")
    if given.get("clip") or given.get("input_forget"):
        raise unsupported(node, "clips its gates, or ties two of them")
    if given.get("activation_alpha") or given.get("activation_beta"):
        raise unsupported(node, "has activations with factors")
    if node.kind == "RNN" and len(set(names)) == 1 and names[0] in ("Tanh", "Relu", "Sigmoid"):
        return names[0].lower()
    if names != kinds * directions:
        raise unsupported(node, f"has the activations {', '.join(names)}")
    return "tanh"


def _layer(context: Context, node: Node, units: int, activation: str, backwards: bool) -> Any:
    options: dict[str, Any] = {"return_sequences": True, "return_state": True, "go_backwards": backwards}
    if node.kind == "GRU":
        options["reset_after"] = bool(node.attributes.get("linear_before_reset", 0))
    if node.kind == "RNN":
        options["activation"] = activation
    factory = {"LSTM": keras.layers.LSTM, "GRU": keras.layers.GRU, "RNN": keras.layers.SimpleRNN}[node.kind]
    return context.layer(factory, node, units=units, **options)


def _weights(node: Node, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray | None, units: int) -> list[Any]:
    """Return kernel, recurrent kernel and bias as Keras has them; ONNX's LSTM gates are i, o, f, c."""
    order = {"LSTM": (0, 2, 3, 1), "GRU": (0, 1, 2), "RNN": (0,)}[node.kind]
    columns = np.concatenate([np.arange(gate * units, (gate + 1) * units) for gate in order])
    kernel, recurrent = kernel[columns].T, recurrent[columns].T
    own, other = (np.zeros(len(columns), np.float32),) * 2 if bias is None else np.split(bias, 2)
    own, other = own[columns], other[columns]
    if node.kind == "GRU" and node.attributes.get("linear_before_reset", 0):
        return [kernel, recurrent, np.stack([own, other])]
    return [kernel, recurrent, own + other]


def _initial(context: Context, node: Node, inputs: Inputs, tensor: Any, direction: int, batch_first: bool) -> Any:
    """Return the first states, None where they are zero."""
    given = [optional(inputs, place) for place in ((5, 6) if node.kind == "LSTM" else (5,))]
    if all(state is None or (is_constant(state) and not state.any()) for state in given):
        return None
    found = []
    for state in given:
        if state is None:
            state = np.zeros((1, 1, node.attributes["hidden_size"]), np.float32)
        if is_constant(state):
            one = state.transpose(1, 0, 2) if batch_first else state
            one = one[min(direction, len(one) - 1)]
            if len(one) > 1 and tensor.shape[0] is None:
                raise unsupported(node, "has another first state for each sample")
            if len(one) == 1:
                layer = context.layer(Repeated, node, shape=one.shape[1:])
                found.append(context.filled(layer, tensor, value=one[0]))
            else:
                found.append(ops.convert_to_tensor(one))
            continue
        order = (0, 1, 2) if batch_first else (1, 0, 2)
        count = number(node, state.sizes[1 if batch_first else 0])
        found.append(context.arranged(state, order)[:, min(direction, count - 1)])
    return found
