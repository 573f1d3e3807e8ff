"""The reference that cutting is tested against: the whole model, in which the channels that go are masked to zero."""

from __future__ import annotations

import keras
import numpy as np
import zoo

from dwindle.pruning.channels import ChannelPlan
from dwindle.weights import walk_layers

ops = keras.ops


def masked_model(plan: ChannelPlan) -> keras.Model:
    """Return the model that was planned for with zeros in every weight that makes or takes a removed channel.

    Normalizations over channels take their statistics over those that stay.
    """
    config = plan.model.get_config()
    if "graph" in config:
        model = keras.Model.from_config(config["graph"])
        model = keras.Model(keras.tree.flatten(model.input)[0], keras.tree.flatten(model.output)[0])
    else:
        model = type(plan.model).from_config(config)
    if not model.built:
        model.build(plan.model.input_shape)
    layers, originals = dict(walk_layers(model)), dict(walk_layers(plan.model))
    values = {path: [np.array(ops.convert_to_numpy(v)) for v in layer.variables] for path, layer in originals.items()}
    for group in plan.groups:
        gone = np.isin(group.channels, plan.removed)
        for member in group.members:
            owner = originals[member.layer]
            for part in member.weight.split("/")[:-1]:
                owner = getattr(owner, part)
            name = member.weight.split("/")[-1]
            variable = vars(owner).get(name, vars(owner).get(f"_{name}"))
            number = next(n for n, v in enumerate(originals[member.layer].variables) if v is variable)
            np.moveaxis(values[member.layer][number], member.axis, 0)[member.positions[gone].ravel()] = 0.0
    for path, layer in layers.items():
        for variable, value in zip(layer.variables, values[path], strict=True):
            variable.assign(value)
    for path, axes in plan.groups.analysis.normalized.items():
        classes = plan.groups.analysis.labels.resolve(axes[-1])
        layers[path].call = _over_kept(layers[path], np.flatnonzero(~np.isin(classes, plan.removed)))
    return model


def _over_kept(layer, kept):
    kind = type(layer).__name__

    def call(x, **_):
        width = x.shape[-1]
        some = ops.take(x, kept, axis=-1)
        if kind == "UnitNormalization":
            some = some / ops.sqrt(ops.sum(some**2, axis=-1, keepdims=True))
        elif kind == "RMSNormalization":
            some = some / ops.sqrt(ops.mean(some**2, axis=-1, keepdims=True) + layer.epsilon)
            some = some * ops.take(layer.scale, kept)
        else:
            parts = layer.groups if kind == "GroupNormalization" else 1
            shape = ops.shape(some)
            split = ops.reshape(some, (*shape[:-1], parts, len(kept) // parts))
            axes = (
                (-1,)
                if kind == "LayerNormalization"
                else tuple(a for a in range(1, len(shape) + 1) if a != len(shape) - 1)
            )
            mean = ops.mean(split, axis=axes, keepdims=True)
            variance = ops.mean((split - mean) ** 2, axis=axes, keepdims=True)
            some = ops.reshape((split - mean) / ops.sqrt(variance + layer.epsilon), shape)
            some = some * ops.take(layer.gamma, kept) + ops.take(layer.beta, kept)
        return ops.matmul(some, np.eye(width, dtype=np.float32)[kept])

    return call


def difference(plan: ChannelPlan, inputs: list[np.ndarray]) -> float:
    """Return the largest difference of the cut model from the masked one, relative to the largest output."""
    expected, found = (
        [ops.convert_to_numpy(value) for value in keras.tree.flatten(model(zoo.feed(model, inputs), training=False))]
        for model in (masked_model(plan), plan.apply())
    )
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in zip(expected, found, strict=True))
