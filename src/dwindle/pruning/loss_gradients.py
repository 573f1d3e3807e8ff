"""Gradients of a loss by a model's weights, batch by batch, on any backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.data import Split
from dwindle.errors import ConfigError, DataError
from dwindle.model_samples import fitted


def labelled_samples(model: keras.Model, data: Any, samples: int, needed_by: str) -> Split:
    """Return labelled training samples in the form that the model takes.

    Args:
        model: The model.
        data: Anything that `dwindle.read_data` takes.
        samples: At most how many, spread over the data.
        needed_by: What asks for them, for the message.

    Raises:
        ConfigError: If there are no data.
        DataError: If the data have no labels or do not fit.
    """
    if data is None:
        raise ConfigError(f"`data` is None, and {needed_by} needs labelled samples, such as (x, y)")
    found = fitted(model, data)
    split = found.train or found.val or found.test
    if split is None or split.y is None:
        raise DataError(f"data `{found.source}` has no labels, and {needed_by} needs them")
    return split.take(samples)


def loss_of(model: keras.Model, split: Split, loss: Any) -> Any:
    """Return the loss to differentiate: the one given, or the one that suits labels and outputs.

    Whole-number labels: cross-entropy, on probabilities if the model's outputs are (they sum to 1), else on logits.
    Other labels: the mean squared error.

    Raises:
        ConfigError: If the model has several outputs, for which no one loss can be told.
    """
    if loss is not None:
        return keras.losses.get(loss)
    if len(model.outputs) != 1:
        raise ConfigError(
            f"`loss` is None, and `{model.name}` has {len(model.outputs)} outputs; pass a function of both"
        )
    if split.y is None or split.y.dtype.kind not in "iub":
        return keras.losses.MeanSquaredError()
    few = keras.ops.convert_to_numpy(model(_inputs(model, split.take(8)), training=False))
    if few.shape[-1] == 1:
        return keras.losses.BinaryCrossentropy(from_logits=bool(few.min() < 0 or few.max() > 1))
    sure = few.min() >= 0 and np.allclose(few.sum(axis=-1), 1, atol=1e-3)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not sure)


def loss_gradients(
    model: keras.Model, split: Split, loss: Callable[[Any, Any], Any], *, batch: int, variables: Sequence[Any]
) -> list[np.ndarray]:
    """Return the gradient of each batch's loss by each variable, shape ``(batches, *variable)``.

    The model runs as in inference: moving averages stay, dropout is off.
    """
    found: list[list[np.ndarray]] = [[] for _ in variables]
    for begin in range(0, len(split), batch):
        part = split.pick(slice(begin, begin + batch))
        values = _GRADIENTS[keras.backend.backend()](model, _inputs(model, part), part.y, loss, variables)
        for held, value in zip(found, values, strict=True):
            held.append(value)
    return [np.stack(held) for held in found]


def _inputs(model: keras.Model, split: Split) -> Any:
    given = [keras.ops.convert_to_tensor(array) for array in split.x]
    structure = getattr(model, "input", None)  # a sequential model that was rebuilt from its config has none
    return keras.tree.pack_sequence_as(structure, given) if isinstance(structure, list | dict) else given[0]


def _tensorflow(model: Any, x: Any, y: Any, loss: Any, variables: Sequence[Any]) -> list[np.ndarray]:
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        raw = [variable.value for variable in variables]
        tape.watch(raw)
        value = loss(y, model(x, training=False))
    found = tape.gradient(value, raw, unconnected_gradients="zero")
    return [np.asarray(tf.convert_to_tensor(gradient)) for gradient in found]


def _torch(model: Any, x: Any, y: Any, loss: Any, variables: Sequence[Any]) -> list[np.ndarray]:
    torch = importlib.import_module("torch")

    raw = [variable.value for variable in variables]
    wanted = [tensor.requires_grad for tensor in raw]
    try:
        for tensor in raw:
            tensor.requires_grad_(True)
        value = loss(keras.ops.convert_to_tensor(y), model(x, training=False))
        found = torch.autograd.grad(value, raw, allow_unused=True)
    finally:
        for tensor, before in zip(raw, wanted, strict=True):
            tensor.requires_grad_(before)
    return [
        np.zeros(tuple(tensor.shape), np.float32) if gradient is None else gradient.detach().cpu().numpy()
        for tensor, gradient in zip(raw, found, strict=True)
    ]


def _jax(model: Any, x: Any, y: Any, loss: Any, variables: Sequence[Any]) -> list[np.ndarray]:
    jax = importlib.import_module("jax")

    chosen = {id(variable): number for number, variable in enumerate(variables)}

    def value(values: list[Any]) -> Any:
        def of(variable: Any) -> Any:
            return values[chosen[id(variable)]] if id(variable) in chosen else variable.value

        trained = [of(variable) for variable in model.trainable_variables]
        fixed = [of(variable) for variable in model.non_trainable_variables]
        outputs, _ = model.stateless_call(trained, fixed, x, training=False)
        return loss(y, outputs)

    return [np.asarray(gradient) for gradient in jax.grad(value)([variable.value for variable in variables])]


_GRADIENTS: dict[str, Callable[..., list[np.ndarray]]] = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
