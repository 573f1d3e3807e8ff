"""Quantized training: a trainable model that computes what the quantized file computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dwindle.errors import ConfigError, DataError
from dwindle.lifting.flatbuffer import read_graph
from dwindle.lifting.lifted import LiftedModel, build_lifted
from dwindle.quantization.calibration import Ranges, calibrate
from dwindle.quantization.schemes import Scheme, resolve_scheme
from dwindle.quantization.writing import read_grids, write_quantized

CALIBRATION_SAMPLES = 512


def quantize(
    model: keras.Model, scheme: str | Scheme = "int8", data: Any = None, *, keep_zeros: bool = True
) -> LiftedModel:
    """Return a trainable twin of ``model`` that computes what its quantized file will compute.

    The model is converted to a float file and lifted back, so BatchNorm is folded and activations are fused as in
    the file. The quantizer then writes a quantized file, and the twin rounds exactly where that file does: weights
    per output channel, activations on fixed ranges from calibration. Train it with plain ``fit``, then `export`
    it: the file gets the trained weights.

    Args:
        model: Any Keras model that converts; it is not changed. Masks and shared values are baked in first.
        scheme: ``"int8"`` or ``"int8-dynamic"`` (weights only).
        data: Calibration samples, a few hundred: array, list of arrays (one per input), `Data`, or anything that
            `dwindle.data.read_data` reads. Needed for ``"int8"``.
        keep_zeros: Whether zeros of a pruned weight stay zero in training.

    Returns:
        A functional model, not compiled.

    Raises:
        ConfigError: For a scheme without integers.
        DataError: If calibration data is missing or does not fit.
        UnsupportedModelError: If an operator of the model can't be made trainable yet.

    References:
        Jacob et al. 2018, arXiv 1712.05877.
    """
    from dwindle.exporting.convert import float_file

    chosen = resolve_scheme(scheme)
    if chosen.is_float:
        raise ConfigError(f"`scheme` is `{chosen.name}`, which has no integers to train for; use `int8`")
    content = float_file(model)
    ranges = None
    if chosen.needs_data:
        ranges = calibrate(content, calibration_samples(input_shapes(model, content), data))
    return simulate(content, chosen, ranges, name=model.name, keep_zeros=keep_zeros)


def simulate(
    content: bytes, scheme: Scheme, ranges: Ranges | None, *, name: str, keep_zeros: bool = True
) -> LiftedModel:
    """Build the trainable model of the quantized file that ``scheme`` and ``ranges`` give for a float file."""
    from dwindle.attaching import attach
    from dwindle.weights import KeepZeros

    grids = read_grids(content, write_quantized(content, scheme, ranges))
    stored = None if ranges is None else {tensor: list(pair) for tensor, pair in ranges.items()}
    twin = build_lifted(content, grids=grids, name=name, quantization={"scheme": scheme.to_dict(), "ranges": stored})
    if keep_zeros:
        zeros = {}
        for link in twin.links:
            layer = twin.get_layer(link.layer)
            if link.variable in layer.__dict__.get("_dwindle_transforms", {}):
                value = layer.effective_before(link.variable, order=0)
                # A few exact zeros happen by chance; a pruned weight has many, and not only zeros.
                if 0.01 <= float((value == 0).mean()) < 1:
                    zeros[link.layer, link.variable] = [KeepZeros(mask=(value != 0).astype(np.float32))]
        if zeros:
            twin = attach(twin, zeros)
    return twin


def input_shapes(model: keras.Model, content: bytes) -> list[tuple[int | None, ...]]:
    """Return the shape of each input without the batch axis: the model's, else that of its float file."""
    tensors = getattr(model, "inputs", None) or read_graph(content).inputs
    return [tuple(tensor.shape[1:]) for tensor in tensors]


def calibration_samples(
    shapes: Sequence[tuple[int | None, ...]], data: Any, *, limit: int = CALIBRATION_SAMPLES
) -> tuple[np.ndarray, ...]:
    """Return calibration arrays, one per input, at most ``limit`` samples.

    Args:
        shapes: What `input_shapes` returns.
        data: What the user passed.
        limit: How many samples are taken.

    Raises:
        DataError: If there are none, or they do not fit the model's inputs.
    """
    if data is None:
        raise DataError(
            "this scheme needs calibration data for the ranges of activations, and `data` is None; "
            "pass a few hundred training samples (no labels needed), or use scheme `int8-dynamic`"
        )
    arrays = _arrays(data)
    if len(arrays) != len(shapes):
        raise DataError(f"calibration data has {len(arrays)} arrays and the model has {len(shapes)} inputs")
    for array, shape in zip(arrays, shapes, strict=True):
        if array.ndim != len(shape) + 1 or any(
            want is not None and have != want for have, want in zip(array.shape[1:], shape, strict=True)
        ):
            raise DataError(
                f"calibration samples have shape {array.shape[1:]} and the model's input has {shape}; "
                "pass them as the model takes them, with a leading sample axis"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError("calibration data has NaN or infinite values; remove those samples")
    return tuple(array[:limit] for array in arrays)


def _arrays(data: Any) -> tuple[np.ndarray, ...]:
    from dwindle.data import Data, Split, read_data

    if isinstance(data, np.ndarray):
        return (data,)
    if isinstance(data, list) and all(isinstance(item, np.ndarray) for item in data):
        return tuple(data)
    if isinstance(data, Split):
        return data.x
    found = data if isinstance(data, Data) else read_data(data)
    split = found.train or found.evaluation()
    return split.x
