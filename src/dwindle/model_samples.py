"""Samples in the form that a model takes, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dwindle.data import Data, Split, fit_to_model, read_data


def fitted(model: keras.Model, data: Any) -> Data:
    """Return what `dwindle.data.read_data` reads, shaped as the model takes it.

    Raises:
        DataError: If it does not fit.
    """
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in model.inputs]
    return fit_to_model(
        read_data(data), [tuple(tensor.shape[1:]) for tensor in model.inputs], None, input_dtypes=dtypes
    )


def samples_for(model: keras.Model, data: Any, count: int, *, judge: bool = False) -> Split:
    """Return at most ``count`` samples, spread over all, shaped as the model takes them.

    Args:
        model: A model whose inputs are known.
        data: What `dwindle.data.read_data` reads, a `Split`, or a list of arrays, one for each input.
        count: At most this many.
        judge: Take the samples that figures are measured on (test, else validation); else those for training, where
            there are any.

    Raises:
        DataError: If they do not fit.
    """
    if isinstance(data, list) and data and all(isinstance(item, np.ndarray) for item in data):
        data = Split(x=tuple(data), y=None)
    if isinstance(data, Split):
        data = Data(train=None, val=None, test=data, source="arrays", class_names=None, sha256="")
    found = fitted(model, data)
    split = found.evaluation() if judge or found.train is None else found.train
    return split.take(count)


def outputs_of(model: keras.Model, x: Sequence[np.ndarray], *, batch_size: int = 64) -> list[np.ndarray]:
    """Return a model's outputs for samples, one array for each output.

    Nothing is compiled, which pays where a model is run once or twice.

    Args:
        model: Any model.
        x: One array for each input, shape ``(n, ...)``.
        batch_size: Samples that are run together.
    """
    structure = model.input if isinstance(getattr(model, "input", None), dict) else None
    parts: list[list[np.ndarray]] = []
    for start in range(0, len(x[0]), batch_size):
        given: Any = [keras.ops.convert_to_tensor(array[start : start + batch_size]) for array in x]
        if structure is not None:
            given = keras.tree.pack_sequence_as(structure, given)
        elif len(given) == 1 and not isinstance(getattr(model, "input", None), list | tuple):
            given = given[0]
        made = keras.tree.flatten(model(given, training=False))
        parts.append([np.asarray(keras.ops.convert_to_numpy(value)) for value in made])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def output_change(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return how far outputs are from what they were: KL divergence of probabilities, relative MSE of others."""
    total = 0.0
    for before, after in zip(expected, found, strict=True):
        p, q = np.asarray(before, np.float64), np.asarray(after, np.float64)
        if p.shape[-1] > 1 and p.min() >= 0 and np.allclose(p.sum(axis=-1), 1.0, atol=1e-3):
            total += float((p * (np.log(p + 1e-12) - np.log(q + 1e-12))).sum(axis=-1).mean())
        else:
            total += float(((p - q) ** 2).mean() / max(float(p.var()), 1e-30))
    return total
