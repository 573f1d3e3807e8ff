"""Biases on a coarse grid: a pruned network has more bytes in its float biases than one would think."""

from __future__ import annotations

import keras
import numpy as np

from dwindle.attaching import attach
from dwindle.errors import ConfigError
from dwindle.weights import check_model, raw_variable, walk_layers

FEWEST_BITS, MOST_BITS = 2, 16


def round_biases(model: keras.Model, bits: int = 6) -> keras.Model:
    """Return a twin of ``model`` whose biases are multiples of a step, one step for each layer.

    ``b' = s round(b / s)``, with ``s`` the power of two for which the largest bias of the layer is at most
    ``2^(bits - 1)`` steps. Packed, a float32 bias takes more than three bytes, and one on a grid about ``bits`` bits.
    It does not hold the grid in training: call it last, and measure.

    Args:
        model: A built functional or sequential model; it is not changed, and shared or pruned weights stay so.
        bits: 2 to 16. 6: no bias changes by more than a 64th of the layer's largest.

    Returns:
        A new model, not compiled.

    Raises:
        ConfigError: If ``bits`` is out of range.
        UnsupportedModelError: For a subclassed model.

    Example:
        >>> import keras, numpy as np
        >>> from dwindle.clustering import round_biases
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        >>> model.set_weights([np.ones((2, 3)), np.array([0.93, -0.21, 0.02])])
        >>> round_biases(model, bits=4).layers[0].bias.numpy().tolist()
        [0.875, -0.25, 0.0]
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not FEWEST_BITS <= bits <= MOST_BITS:
        raise ConfigError(f"`bits` is {bits!r}; it must be a whole number from {FEWEST_BITS} to {MOST_BITS}, such as 6")
    check_model(model)
    twin = attach(model, {})
    for _, layer in walk_layers(twin):
        bias = raw_variable(layer, "bias")
        if bias is not None:
            bias.assign(_rounded(keras.ops.convert_to_numpy(bias), bits))
    return twin


def _rounded(bias: np.ndarray, bits: int) -> np.ndarray:
    largest = float(np.abs(bias).max(initial=0))
    if not 0 < largest < float("inf"):
        return bias
    step = 2.0 ** (int(np.frexp(largest)[1]) - bits + 1)
    return (np.rint(bias / step) * step + 0.0).astype(bias.dtype)  # no negative zero
