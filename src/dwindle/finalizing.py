"""Finalizing: techniques become ordinary weights."""

from __future__ import annotations

import keras

from dwindle.attaching import effective_weights, strip
from dwindle.errors import ConfigError
from dwindle.weights import walk_layers


def finalize(model: keras.Model) -> keras.Model:
    """Return a plain twin of ``model``: techniques baked into ordinary weights, stock layers only.

    Masked weights are zeros, weights of a model in quantized training lie on their grid. Rounding of activations
    is left out, since a plain model has none. A model without techniques comes back as a copy.

    Args:
        model: A model from `prune`, `quantize` or any other; it is not changed.

    Returns:
        A new model, not compiled.

    Raises:
        ConfigError: If ``model`` is no built Keras model.
        UnsupportedModelError: For a subclassed model.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"`model` is a {type(model).__name__}; it must be a keras.Model")
    student = getattr(model, "student", None)
    if isinstance(student, keras.Model):
        return finalize(student)
    if getattr(model, "quantization", None):
        from dwindle.exporting.onnx.islands import islands_in, put_together, taken_apart
        from dwindle.lifting.lifted import build_lifted

        if islands_in(model):
            parts = taken_apart(model)
            return put_together(parts, finalize(parts.body))
        plain = build_lifted(model.to_float_file(), grids=None, name=model.name)
        layers = dict(walk_layers(plain))
        for (path, key), value in effective_weights(model).items():
            next(v for v in layers[path].weights if v.name == key).assign(value)
        return plain
    return strip(model)
