"""Network slimming's training: a penalty that drives the scales of channels that matter little to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from dwindle.attaching import rebuild
from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.weights import select, walk_layers


def slim(model: keras.Model, strength: float = 1e-4, layers: str | Sequence[str] | None = None) -> keras.Model:
    """Return a twin whose training loss has ``strength * sum |gamma|`` over its batch normalizations.

    Train it, then prune with ``criterion="batchnorm-scale"``. The penalty is Keras' own regularizer, so that it is
    saved with the model; a ``strength`` of 0 takes it away again.

    Args:
        model: A built functional or sequential model; it is not changed.
        strength: Factor of the penalty, at least 0; the paper takes 1e-5 to 1e-4.
        layers: Shell-style patterns of the batch normalizations. None: all that have a scale.

    Returns:
        A new model with the same weights, not compiled.

    Raises:
        ConfigError: For a negative strength, or a pattern that matches nothing.
        UnsupportedModelError: If the model has no batch normalization with a scale.

    Example:
        >>> import keras
        >>> from dwindle.pruning.slimming import slim
        >>> layers = [keras.Input((4,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
        >>> [round(float(loss), 3) for loss in slim(keras.Sequential(layers), 0.01).losses]
        [0.04]

    References:
        Liu et al. 2017, Network slimming, arXiv 1708.06519, eq. 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not strength >= 0:
        raise ConfigError(f"`strength` is {strength!r}; it must be 0 or above, such as 1e-4")
    scaled = [
        path for path, layer in walk_layers(model) if isinstance(layer, keras.layers.BatchNormalization) and layer.scale
    ]
    if not scaled:
        raise UnsupportedModelError(f"`model` ({model.name}) has no batch normalization with a scale")
    chosen = set(select(scaled, layers))
    regularizer = keras.saving.serialize_keras_object(keras.regularizers.L1(strength)) if strength else None

    def edit(path: str, entry: dict[str, Any]) -> dict[str, Any]:
        if path not in chosen:
            return entry
        return {**entry, "config": {**entry["config"], "gamma_regularizer": regularizer}}

    return rebuild(model, edit)
