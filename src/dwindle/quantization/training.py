"""Quantized training: a trainable model that computes what the quantized file computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import keras
import numpy as np

from dwindle.attaching import attach, attached
from dwindle.data import Split
from dwindle.errors import ConfigError, DataError, UnsupportedModelError, check_choice
from dwindle.lifting.flatbuffer import read_graph
from dwindle.lifting.lifted import LiftedModel, build_lifted
from dwindle.lifting.shared_constants import unshared
from dwindle.open_lengths import open_inputs, with_lengths_of
from dwindle.quantization.assignment import assign, widened
from dwindle.quantization.calibration import METHODS, Ranges, calibrate
from dwindle.quantization.equalizing import equalize as equalized
from dwindle.quantization.fake_quantization import RANGES
from dwindle.quantization.mixing import JUDGED_SAMPLES, judging_samples, within_budget, within_drop
from dwindle.quantization.refining import (
    ROUNDINGS,
    clipped_bounds,
    correct_biases,
    input_statistics,
    not_refined,
    round_weights,
)
from dwindle.quantization.schemes import Scheme, for_layers, resolve_scheme
from dwindle.quantization.writing import read_grids, write_quantized
from dwindle.weights import KeepZeros, Transform, model_slots

CALIBRATION_SAMPLES = 512
CLIPPINGS = ("none", "mse")


def quantize(
    model: keras.Model,
    scheme: str | Scheme | Mapping[str, Any] = "int8",
    data: Any = None,
    *,
    layers: str | Sequence[str] | None = None,
    ranges: str = "fixed",
    calibration: str = "min-max",
    clipping: str = "none",
    rounding: str = "nearest",
    equalize: bool = False,
    correct_bias: bool = False,
    budget: str | int | None = None,
    max_drop: str | float | None = None,
    keep_zeros: bool = True,
    keep_values: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> LiftedModel:
    """Return a trainable twin of ``model`` that computes what its quantized file will compute.

    The model is converted to a float file and lifted back, so BatchNorm is folded and activations are fused as in
    the file. The quantizer then writes a quantized file, and the twin rounds exactly where that file does: weights
    per output channel, activations on ranges from calibration. Train it with plain ``fit``, then `export` it: the
    file gets the trained weights and ranges. Nodes that stayed as in an ONNX file stay so in the twin, and what lies
    around them is quantized; no gradient passes them, and it can be exported as ``.onnx`` only.

    Args:
        model: Any Keras model that converts; it is not changed. Masks and shared values are baked in first. Where its
            inputs leave lengths open, those of ``data`` are taken.
        scheme: A scheme's name, a `Scheme`, or a mapping from layer or operator patterns to schemes; see
            `dwindle.quantization.resolve_scheme`.
        data: Calibration samples, a few hundred: array, list of arrays (one per input), `Data`, or anything that
            `dwindle.data.read_data` reads. Needed for schemes with integer activations.
        layers: Shell-style patterns of the layers or operators to quantize; the rest stays float. None: all.
        ranges: How the ranges of activations, and the steps of weights, behave in training. ``"fixed"``: activations as
            calibrated, weights by their largest. ``"moving"``: activations by a moving average of each batch's ends.
            ``"learned"``: both trained by gradient (learned step size).
        calibration: ``"min-max"``, ``"percentile"``, ``"mse"`` or ``"entropy"``; see `dwindle.quantization.calibrate`.
        clipping: ``"none"``, or ``"mse"``: grids of weights end where the squared error is least, not at the largest.
        rounding: How weights are rounded: to the ``"nearest"`` step, as ``"adaround"`` learns, or as ``"gptq"``
            compensates. The latter two look at ``data`` and help most at 4 and 2 bits without training.
        equalize: Whether the ranges of consecutive kernels are brought together first, channel by channel.
        correct_bias: Whether biases take up the shift of means that rounded weights make, as seen on ``data``.
        budget: A file size, such as ``"60KB"``: weights that matter least get fewer bits than ``scheme`` says until
            the file is that small. Measured on ``data``, without labels.
        max_drop: A loss, such as ``"1%"`` or 0.01, instead of ``budget``: as many weights as possible get fewer bits
            before the written file loses more. Measured on the validation samples of ``data`` where it has them (at
            most 2,000), before ``clipping``, ``rounding`` and ``correct_bias``: the loss of accuracy where there are
            labels, else the share of samples whose class is not the float file's.
        keep_zeros: Whether zeros of a pruned weight stay zero in training.
        keep_values: Whether the weights of a clustered layer go on sharing their values in training.
        progress: Called with ``(done, all)`` steps of calibration and of the budget's search.

    Returns:
        A functional model, not compiled. ``notes`` says what could not be made trainable or as narrow as asked.

    Raises:
        ConfigError: For a scheme without integers, or one that the model's layers can't have.
        DataError: If calibration data is missing or does not fit.
        UnsupportedModelError: If the file keeps a state between runs, or nodes of an ONNX file take one sample only.

    References:
        Jacob et al. 2018, arXiv 1712.05877; Esser et al. 2020 (learned step size), arXiv 1902.08153.
    """
    from dwindle.exporting.convert import float_file
    from dwindle.exporting.onnx.islands import put_together

    chosen = for_layers(resolve_scheme(scheme), layers)
    check_choice("ranges", ranges, RANGES)
    check_choice("calibration", calibration, METHODS)
    if chosen.is_float:
        raise ConfigError(f"`scheme` is `{chosen.name}`, which has no integers to train for; use `int8`")
    check_choice("clipping", clipping, CLIPPINGS)
    check_choice("rounding", rounding, ROUNDINGS)
    if budget is not None and max_drop is not None:
        raise ConfigError("`budget` and `max_drop` both choose the layers' bits; pass one of them")
    model, fixed = with_lengths_in(data, model)
    parts, data = _parts(model, data, max_drop)
    model = model if parts is None else parts.body
    content = unshared(float_file(model))
    assign(read_graph(content), chosen)  # a layer that does not exist is said before any work
    looks = {"rounding": rounding != "nearest", "correct_bias": correct_bias, "budget": budget, "max_drop": max_drop}
    samples = _looked_at(model, content, chosen, data, looks)
    if equalize:
        content = equalized(content)
    bits = chosen.activations if chosen.is_static else 8
    found = calibrate(content, samples, method=calibration, bits=bits, progress=progress) if chosen.needs_data else None
    if budget is not None:
        chosen = within_budget(content, chosen, found, samples, budget, progress=progress)
    if max_drop is not None:
        judged = _judged(model, content, data)
        chosen = within_drop(content, chosen, found, samples, max_drop, judged=judged, progress=progress)
    original, bounds = content, {}
    choices = assign(read_graph(content), chosen)
    if clipping == "mse":
        bounds = clipped_bounds(read_graph(content), choices)
    content, bounds = _refined(content, choices, bounds, samples, rounding, correct_bias)
    if found is not None and content != original:
        found = calibrate(content, samples, method=calibration, bits=bits)
    twin = simulate(
        content, chosen, found, name=model.name, keep_zeros=keep_zeros, keep_values=keep_values,
        clusters=_clusters(model), training_ranges=ranges, weight_bounds=bounds,
        notes=[*fixed, *not_refined(read_graph(content), choices, rounding=rounding, clipping=clipping)],
    )  # fmt: skip
    return twin if parts is None else put_together(parts, twin)


def _parts(model: keras.Model, data: Any, max_drop: Any) -> tuple[Any, Any]:
    """Return a model's nodes of an ONNX file apart from the rest, None where it has none, and samples for the rest."""
    from dwindle.exporting.onnx.islands import islands_in, taken_apart

    if not islands_in(model):
        return None, data
    parts = taken_apart(model)
    names = ", ".join(f"`{island.name}`" for island in parts.islands)
    if max_drop is not None:
        raise ConfigError(
            f"`max_drop` is judged on a LiteRT file, which can't hold {names} of the model; pass `budget` instead"
        )
    if parts.one_sample:
        raise UnsupportedModelError(
            f"`{parts.model.name}` takes one sample at a time, since {names} of its ONNX file do, and can't be trained "
            "on batches; pass dw.export the scheme"
        )
    if data is not None:
        data = parts.samples(calibration_samples([tuple(tensor.shape[1:]) for tensor in model.inputs], data))
    return parts, data


def _looked_at(
    model: keras.Model, content: bytes, scheme: Scheme, data: Any, looks: Mapping[str, Any]
) -> tuple[np.ndarray, ...]:
    """Return the samples that calibration, or an argument of `quantize` that is set, looks at; none where none does."""
    looking = [argument for argument, value in looks.items() if value is not None and value is not False]
    if not looking and not scheme.needs_data:
        return ()
    if data is None and not scheme.needs_data:
        raise DataError(f"`{looking[0]}` looks at `data`, which is None; pass a few hundred training samples")
    return calibration_samples(input_shapes(model, content), data)


def _refined(
    content: bytes, choices: Any, bounds: Any, samples: Any, rounding: str, correct_bias: bool
) -> tuple[bytes, Any]:
    """Return a file with rounded weights and corrected biases, as far as asked for, and the ends of its grids."""
    method, original = ROUNDINGS[rounding], content
    if method is None and not correct_bias:
        return content, bounds
    statistics = input_statistics(content, samples, moments=method is not None)
    if method is not None:
        content, bounds = round_weights(content, choices, bounds, statistics, method)
    if correct_bias:
        content = correct_biases(content, original, choices, bounds, statistics)
    return content, bounds


def _judged(model: keras.Model, content: bytes, data: Any) -> Split:
    """Return the samples on which a loss is measured, in the form that the model takes."""
    judged = judging_samples(data).take(JUDGED_SAMPLES)
    return replace(judged, x=calibration_samples(input_shapes(model, content), judged, limit=JUDGED_SAMPLES))


def simulate(
    content: bytes,
    scheme: Scheme,
    ranges: Ranges | None,
    *,
    name: str,
    keep_zeros: bool = True,
    keep_values: bool = True,
    clusters: int = 0,
    training_ranges: str = "fixed",
    weight_bounds: Mapping[str, np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> LiftedModel:
    """Build the trainable model of the quantized file that ``scheme`` and ``ranges`` give for a float file."""
    graph = read_graph(content)
    grids = read_grids(content, write_quantized(content, scheme, ranges, weight_bounds=weight_bounds))
    for operation, choice in zip(graph.operations, assign(graph, scheme), strict=True):
        for tensor in operation.inputs:
            if tensor is not None and tensor.name in grids.weights:
                bound = (weight_bounds or {}).get(tensor.name)
                grids.weights[tensor.name] = replace(
                    grids.weights[tensor.name], power_of_two=choice.power_of_two, bound=bound
                )
    stored = None if ranges is None else {tensor: list(pair) for tensor, pair in ranges.items()}
    twin = build_lifted(
        content, grids=grids, name=name, quantization={"scheme": scheme.to_dict(), "ranges": stored},
        notes=[*widened(graph, scheme), *notes], ranges=training_ranges,
    )  # fmt: skip
    held = kept_zeros(twin) if keep_zeros else {}
    for key, shared in (kept_values(twin, clusters) if keep_values else {}).items():
        held.setdefault(key, []).append(shared)
    return cast(LiftedModel, attach(twin, held)) if held else twin


def kept_zeros(twin: LiftedModel) -> dict[tuple[str, str], list[Transform]]:
    """Return what holds the zeros of pruned weights: a few zeros come by chance, these have many and not only."""
    found: dict[tuple[str, str], list[Transform]] = {}
    for key, value in _rounded_weights(twin):
        if 0.01 <= float((value == 0).mean()) < 1:
            found[key] = [KeepZeros(mask=(value != 0).astype(np.float32))]
    return found


def kept_values(twin: LiftedModel, most: int) -> dict[tuple[str, str], Transform]:
    """Return what holds the values of clustered weights together."""
    from dwindle.clustering import held

    slots = {(path, slot.key): slot for path, listed in model_slots(twin).items() for slot in listed}
    found = (
        (key, held(value, slots[key].channel_axes, most=most)) for key, value in _rounded_weights(twin) if key in slots
    )
    return {key: shared for key, shared in found if shared is not None}


def _clusters(model: keras.Model) -> int:
    """Return the values of the largest table that a model's weights share; 0 where they don't."""
    transforms = [transform for stack in attached(model).values() for transform in stack] if model.layers else []
    return max((getattr(transform, "clusters", 0) for transform in transforms), default=0)


def _rounded_weights(twin: LiftedModel) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Yield the weights that carry transforms of their own, as they come out of the float file."""
    for link in twin.links:
        layer = twin.get_layer(link.layer)
        kinds = {transform.kind for transform in layer.__dict__.get("_dwindle_transforms", {}).get(link.variable, ())}
        if kinds and "tied" not in kinds:
            yield (link.layer, link.variable), layer.effective_before(link.variable, order=0)


def input_shapes(model: keras.Model, content: bytes) -> list[tuple[int | None, ...]]:
    """Return the shape of each input without the batch axis: the model's, else that of its float file."""
    tensors = getattr(model, "inputs", None) or read_graph(content).inputs
    return [tuple(tensor.shape[1:]) for tensor in tensors]


def with_lengths_in(data: Any, model: keras.Model) -> tuple[keras.Model, list[str]]:
    """Return a model whose inputs have the lengths of the user's data where it leaves them open, and notes on it."""
    if data is None or not open_inputs(model):
        return model, []
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    return with_lengths_of(model, calibration_samples(shapes, data, limit=1))


def calibration_samples(
    shapes: Sequence[tuple[int | None, ...]], data: Any, *, limit: int = CALIBRATION_SAMPLES
) -> tuple[np.ndarray, ...]:
    """Return calibration arrays, one per input, at most ``limit`` samples, spread evenly over what there is.

    Data is often sorted by class; the first samples would then be of one.

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
    from dwindle.data import spread

    picked = spread(len(arrays[0]), limit)
    return tuple(array[picked] for array in arrays)


def _arrays(data: Any) -> tuple[np.ndarray, ...]:
    from dwindle.data import Data, read_data

    if isinstance(data, np.ndarray):
        return (data,)
    if isinstance(data, list) and all(isinstance(item, np.ndarray) for item in data):
        return tuple(data)
    if isinstance(data, Split):
        return data.x
    found = data if isinstance(data, Data) else read_data(data)
    split = found.train or found.evaluation()
    return split.x
