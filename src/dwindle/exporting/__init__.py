"""Export: a Keras model becomes a file or folder that a device runs, proved to predict the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.attaching import full_precision
from dwindle.errors import ConfigError, ConversionError, VerificationError, check_choice
from dwindle.exporting.convert import float_file, random_samples, refuse_nan
from dwindle.exporting.verify import BOUNDS, Bound, Verification, compare, require
from dwindle.files import check_output_file, check_output_folder, names_folder, sha256_of, size_of, write_bytes
from dwindle.lifting.flatbuffer import Graph, Tensor, read_graph
from dwindle.quantization import (
    IO_TYPES,
    Scheme,
    calibrate,
    calibration_samples,
    input_shapes,
    resolve_scheme,
    simulate,
    with_lengths_in,
    write_quantized,
)
from dwindle.quantization.assignment import assign, widened
from dwindle.quantization.calibration import METHODS

__all__ = ["Artefact", "Verification", "export", "float_file"]

RANDOM_SAMPLES = 64
#: What a compact file's note begins with.
COMPACTED = "names, signatures and metadata are left out of the file"
#: Orders of axes of an ``.onnx``'s inputs and outputs: the model's own, and channels second.
LAYOUTS = ("NHWC", "NCHW")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A verified file.

    Attributes:
        path: Where it is.
        scheme: Its scheme.
        size_bytes: Its size.
        sha256: Its hash, hexadecimal.
        verification: How it was compared with the model, and what was found.
        notes: What the user should know, such as operators that stay float.
        float_error: Largest difference of an output of a SavedModel from the model before its weights were rounded;
            None for a ``.tflite``, whose outputs `dwindle.measure` judges.
    """

    path: Path
    scheme: str
    size_bytes: int
    sha256: str
    verification: Verification
    notes: tuple[str, ...] = ()
    float_error: float | None = None


def export(
    model: keras.Model | str | Path,
    path: str | Path,
    scheme: str | Scheme | Mapping[str, Any] | None = None,
    data: Any = None,
    *,
    io_type: str = "float32",
    calibration: str = "min-max",
    verify_samples: int = 512,
    sparse: bool = False,
    compact: bool = False,
    layout: str = "NHWC",
) -> Artefact:
    """Write a model as a ``.tflite`` or ``.onnx`` file or a SavedModel folder, run it, and compare it with the model.

    A path without a suffix (or with ``.savedmodel``, or a slash at the end) is a SavedModel folder, which TensorFlow
    runs. It holds floats only: kernels are stored as ``"float32"``, ``"float16"``, or in 8 bits as ``"float8-e4m3"`` or
    ``"float8-e5m2"`` (see `dwindle.exporting.saved_model.rounded`), and raised to float32 when it runs. It is compared
    with the model that has the rounded weights; ``float_error`` says how far it is from the model that came in. LiteRT
    has no float8.

    An ``.onnx`` is written from the ``.tflite`` of the same scheme, which is compared with the model first, and then
    with the ``.onnx`` in ONNX Runtime.

    Bounds: float32, every output within 1e-4 of the largest output; float16, within 1e-2; 8-bit activations, 99% of
    outputs within one output quantum of the simulation (the same rounding in Keras); 16-bit activations, within 32
    quanta of 16 bits (an eighth of one of 8 bits); the others, 99% within 1e-2 of the simulation's largest output. A
    SavedModel: every output within 1e-5 of the largest output. An ``.onnx`` next to its ``.tflite``: 99% of outputs
    within one quantum, or 32 of 16 bits, where activations are integers; else every output within 1e-4 of the largest
    (see `dwindle.exporting.onnx.verifying.judge`).

    Args:
        model: Any built Keras model; techniques are baked in. A model from `quantize` is written with its trained
            weights and ranges. For an ``.onnx`` also the path of a ``.tflite``, which is written as it is.
        path: Where to write: a file that ends in ``.tflite`` or ``.onnx``, or a SavedModel folder. What is there is
            replaced once the new one is verified; a folder that holds anything but a SavedModel is refused.
        scheme: A name, a `Scheme`, or a mapping from layer or operator patterns to schemes; see
            `dwindle.quantization.resolve_scheme`; for a SavedModel a name, or a mapping from layer patterns to names.
            None: what `quantize` was called with, else ``"float32"``.
        data: Samples for calibration (integer activations) and verification: array, list of arrays, `Data`, or what
            `dwindle.data.read_data` reads. Without it, verification runs on seeded random inputs. A ``.tflite`` or
            ``.onnx`` takes its lengths where the model leaves them open.
        io_type: What a file with integer activations takes and gives: ``"float32"``, ``"int8"``, ``"uint8"``, or
            ``"int16"`` where activations have 16 bits.
        calibration: How ranges are chosen; see `dwindle.quantization.calibrate`.
        verify_samples: At most this many samples are compared.
        sparse: Store weights of a ``.tflite`` in LiteRT's sparse encoding where that is smaller and LiteRT runs it; the
            notes say what became of each. The file gets smaller, not faster (see `dwindle.exporting.sparse`).
        compact: Leave out of a ``.tflite`` what no runtime needs: names of tensors, signatures, metadata, shape
            signatures; and write once what is there twice (see `dwindle.micro.stripping.strip`). It gives the same
            outputs, which is checked. Some kilobytes; it matters to small files.
        layout: Order of the axes of an ``.onnx``'s inputs and outputs with four axes or more: ``"NHWC"``, the model's,
            or ``"NCHW"``, channels second.

    Returns:
        The verified file.

    Raises:
        ConfigError: For an unknown scheme, one that this kind of file can't hold, or a path of another kind.
        DataError: If the scheme needs data and there is none, or it does not fit.
        UnsupportedModelError: If an ``.onnx`` can't hold an operator of the model.
        ConversionError: If the model can't be converted, or the file not be written.
        VerificationError: If the file misses the bound; nothing is written.
        MissingDependencyError: If an ``.onnx`` is to be written, and `onnx` or `onnxruntime` is not installed.
    """
    check_choice("io_type", io_type, IO_TYPES)
    check_choice("calibration", calibration, METHODS)
    onnx = Path(path).suffix.lower() == ".onnx"
    _check_kind(path, onnx=onnx, io_type=io_type, sparse=sparse, compact=compact, layout=layout)
    if names_folder(path):
        return _export_folder(model, check_output_folder(path), scheme, data, verify_samples)
    path = check_output_file(path, suffixes=(".tflite", ".onnx"))
    if onnx:
        from dwindle.exporting.onnx import require_packages
        from dwindle.exporting.onnx.islands import islands_in

        require_packages()
        if isinstance(model, str | Path):
            return _export_onnx(path, _given_file(model, scheme, data, verify_samples), layout)
        if islands_in(model):
            return _export_islands(
                model, path, scheme, data, calibration=calibration, verify_samples=verify_samples, layout=layout
            )
    made = _litert_file(
        model, scheme, data, io_type=io_type, calibration=calibration, verify_samples=verify_samples, sparse=sparse
    )
    if compact:
        made = _compacted(made)
    if onnx:
        return _export_onnx(path, made, layout)
    return _artefact(path, made)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A LiteRT file that is compared already, and what it was compared on."""

    content: bytes
    scheme: str | None
    inputs: list[np.ndarray]
    verification: Verification | None
    notes: tuple[str, ...]


def _compacted(made: _Made) -> _Made:
    """Return a file without what no runtime needs, once it is seen to give the same outputs."""
    from dwindle.measuring.litert import LiteRTRunner
    from dwindle.micro.stripping import strip

    content = strip(made.content)
    before, after = (LiteRTRunner(file).predict(made.inputs) for file in (made.content, content))
    if not all(np.array_equal(one, other, equal_nan=True) for one, other in zip(before, after, strict=True)):
        raise VerificationError(
            "the compact file gives other outputs than the one that it is made of; leave `compact` out, and report this"
        )
    left_out = len(made.content) - len(content)
    note = f"{COMPACTED} ({left_out:,} bytes); its outputs are the same"
    return replace(made, content=content, notes=(*made.notes, note))


def _check_kind(path: str | Path, *, onnx: bool, io_type: str, sparse: bool, compact: bool, layout: str) -> None:
    """Refuse options that the kind of file does not have."""
    check_choice("layout", layout, LAYOUTS)
    if layout != "NHWC" and not onnx:
        raise ConfigError(
            f"`layout` is {layout!r}, and only an .onnx has a choice of it; name an .onnx, or leave it out"
        )
    kind = "a SavedModel" if names_folder(path) else "an .onnx" if onnx else ""
    if kind and io_type != "float32":
        raise ConfigError(f"`io_type` is {io_type!r}, but {kind} has float inputs; leave it out")
    if kind and sparse:
        raise ConfigError(f"`sparse` is True, but {kind} holds dense weights; name a .tflite")
    if kind and compact:
        raise ConfigError(f"`compact` is True, and only a .tflite can be written so; name one in place of {kind}")


def _given_file(source: str | Path, scheme: Any, data: Any, verify_samples: int) -> _Made:
    """Return a ``.tflite`` that is there already."""
    from dwindle.measuring.litert import read_content

    if Path(source).suffix.lower() != ".tflite":
        raise ConfigError(f"`model` is {str(source)!r}; a path must be that of a .tflite, else pass dw.load(path)")
    if scheme is not None:
        raise ConfigError(
            f"`scheme` is {scheme!r}, but a .tflite is written as it is; pass dw.load(path) to choose one"
        )
    content = read_content(source)
    shapes = [tuple(tensor.shape[1:]) for tensor in read_graph(content).inputs]
    samples = () if data is None else calibration_samples(shapes, data, limit=verify_samples)
    return _Made(content=content, scheme=None, inputs=list(samples), verification=None, notes=())


def _export_onnx(path: Path, made: _Made, layout: str) -> Artefact:
    """Write a LiteRT file as ``.onnx``, compared on its own samples and on random ones."""
    from dwindle.exporting.onnx import onnx_file

    written = onnx_file(made.content, made.inputs, layout=layout, scheme=made.scheme)
    return _artefact(
        path,
        replace(
            made, content=written.content, scheme=written.scheme, verification=written.verification,
            notes=(*made.notes, *written.notes),
        ),
    )  # fmt: skip


def _export_islands(
    model: keras.Model, path: Path, scheme: Any, data: Any, *, calibration: str, verify_samples: int, layout: str
) -> Artefact:
    """Write a model some nodes of which stayed as in an ONNX file; what lies around them is compared as any model."""
    from dwindle.exporting.onnx import onnx_file
    from dwindle.exporting.onnx.islands import joined, taken_apart

    if (trained := getattr(model, "quantization", None)) and not trained.get("ranged"):
        model.sync()
    parts = taken_apart(model)
    if data is not None:
        shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
        data = parts.samples(calibration_samples(shapes, data, limit=max(verify_samples, 512)))
    made = _litert_file(
        parts.body,
        scheme,
        data,
        io_type="float32",
        calibration=calibration,
        verify_samples=verify_samples,
        sparse=False,
    )
    written = onnx_file(made.content, made.inputs, layout=layout, scheme=made.scheme)
    content, notes = joined(parts, written.content, made.inputs, layout)
    return _artefact(
        path,
        replace(
            made, content=content, scheme=written.scheme, verification=written.verification,
            notes=(*made.notes, *written.notes, *notes),
        ),
    )  # fmt: skip


def _artefact(path: Path, made: _Made) -> Artefact:
    """Write what was made."""
    if made.verification is None or made.scheme is None:
        raise ConversionError(f"`{path}` was not compared with anything; nothing was written")
    write_bytes(path, made.content)
    return Artefact(
        path=path, scheme=made.scheme, size_bytes=len(made.content), sha256=hashlib.sha256(made.content).hexdigest(),
        verification=made.verification, notes=made.notes,
    )  # fmt: skip


def _litert_file(
    model: Any, scheme: Any, data: Any, *, io_type: str, calibration: str, verify_samples: int, sparse: bool
) -> _Made:
    trained = getattr(model, "quantization", None)
    chosen = _chosen_scheme(scheme, trained)
    _check_io_type(io_type, chosen)
    refuse_nan(model)
    model, notes = _in_float32(model)
    model, fixed = with_lengths_in(data, model)
    notes += fixed
    content = float_file(model)
    if not trained:
        notes += widened(read_graph(content), chosen)
    if data is None and not (chosen.needs_data and not trained):
        samples = random_samples(read_graph(content), RANDOM_SAMPLES)
    else:
        samples = calibration_samples(input_shapes(model, content), data, limit=max(verify_samples, 512))
    inputs = [np.asarray(array[:verify_samples]) for array in samples]
    written, twin, bound, reference = content, model, BOUNDS["float32"], "the Keras model"
    if chosen.is_float and any(choice.weights == 16 for choice in assign(read_graph(content), chosen)):
        written, bound = write_quantized(content, chosen, None), BOUNDS["float16"]
    elif not chosen.is_float:
        ranges = _ranges(trained, chosen, content, samples, calibration)
        bounds = model.weight_bounds if trained else None
        written = write_quantized(content, chosen, ranges, io_type=io_type, weight_bounds=bounds)
        bound = BOUNDS[_bound_of(written, chosen)]
        if trained and not trained.get("ranged"):
            model.sync()
            reference = "the model in quantized training"
        else:
            twin = simulate(content, chosen, ranges, name=model.name, weight_bounds=bounds)
            reference = "the simulation of the quantized file"
        notes += _float_operators(written)
    if sparse:
        from dwindle.exporting.sparse import notes_of, sparse_file

        written, weights = sparse_file(written)
        notes += notes_of(weights)
    verification = check(written, twin, inputs, bound, reference)
    require(verification, content, written, inputs)
    return _Made(content=written, scheme=chosen.name, inputs=inputs, verification=verification, notes=tuple(notes))


def unchecked_file(model: keras.Model, scheme: Any, data: Any = None, *, compact: bool = False) -> bytes:
    """Return the file that `export` would write, compared with nothing: for its size and its time alone.

    Args:
        model: Any built Keras model, not one in quantized training.
        scheme: As in `export`.
        data: Calibration samples.
        compact: As in `export`.

    Raises:
        DataError: If the scheme needs data and there is none, or it does not fit.
        ConversionError: If the model can't be converted.
    """
    from dwindle.micro.stripping import strip

    chosen = resolve_scheme(scheme)
    model, _ = _in_float32(model)
    content = float_file(model)
    if any(choice.weights != 32 for choice in assign(read_graph(content), chosen)):
        ranges = None
        if chosen.needs_data:
            samples = calibration_samples(input_shapes(model, content), data)
            ranges = _ranges(None, chosen, content, samples, "min-max")
        content = write_quantized(content, chosen, ranges)
    return strip(content) if compact else content


def _export_folder(model: Any, path: Path, scheme: Any, data: Any, verify_samples: int) -> Artefact:
    from dwindle.exporting.saved_model import scheme_name, write_saved_model

    model, notes = _in_float32(model)
    verification, error, more = write_saved_model(model, path, scheme, data, verify_samples=verify_samples)
    return Artefact(
        path=path, scheme=scheme_name(scheme), size_bytes=size_of(path), sha256=sha256_of(path),
        verification=verification, notes=(*notes, *more), float_error=error,
    )  # fmt: skip


def _in_float32(model: Any) -> tuple[Any, list[str]]:
    """Return the model, or its twin that computes in float32, and what the user should know about it."""
    notes = list(getattr(model, "notes", ()))
    if isinstance(model, keras.Model) and (raised := full_precision(model)) is not model:
        notes.append("the model computes in lower precision; the file and what it is compared with in float32")
        return raised, notes
    return model, notes


def _chosen_scheme(scheme: str | Scheme | Mapping[str, Any] | None, trained: dict[str, Any] | None) -> Scheme:
    if scheme is None:
        return Scheme.from_dict(trained["scheme"]) if trained else resolve_scheme("float32")
    chosen = resolve_scheme(scheme)
    if trained and chosen.name != trained["scheme"]["name"]:
        raise ConfigError(
            f"`scheme` is `{chosen.name}`, but the model was made by dw.quantize for `{trained['scheme']['name']}`; "
            "leave `scheme` out, or export dw.finalize(model)"
        )
    return chosen


def _bound_of(content: bytes, scheme: Scheme) -> str:
    """Return which bound a quantized file has to meet: a model's outputs may differ in kind from layer to layer."""
    graph = read_graph(content)
    bits = {tensor.bits for op in graph.operations for tensor in op.outputs if tensor.is_quantized}
    if not scheme.needs_data or not bits:
        return "dynamic"
    ends = {(t.bits if t.is_quantized else 32) for t in _before_dequantizing(graph)}
    return {8: "static", 16: "static16"}.get(max(ends), "dynamic")


def _before_dequantizing(graph: Graph) -> list[Tensor]:
    """Return the outputs, or what they are made from where a file gives floats."""
    makers = {tensor.index: operation for operation in graph.operations for tensor in operation.outputs}
    found = []
    for tensor in graph.outputs:
        maker = makers.get(tensor.index)
        source = maker.inputs[0] if maker is not None and maker.name == "DEQUANTIZE" else None
        found.append(tensor if source is None else source)
    return found


def _check_io_type(io_type: str, scheme: Scheme) -> None:
    if io_type != "float32" and not scheme.is_static:
        raise ConfigError(
            f"`io_type` is {io_type!r}, but a file of scheme `{scheme.name}` has float inputs; leave it out"
        )
    wide = io_type == "int16"
    if io_type != "float32" and wide != (scheme.activations == 16):
        raise ConfigError(
            f"`io_type` is {io_type!r}, but scheme `{scheme.name}` has activations of {scheme.activations} bits; use "
            f"`{'int16' if scheme.activations == 16 else 'int8'}` or `float32`"
        )


def _ranges(
    trained: dict[str, Any] | None, scheme: Scheme, content: bytes, samples: tuple[np.ndarray, ...], method: str
) -> dict[str, tuple[float, float]] | None:
    if not scheme.needs_data:
        return None
    if trained:
        return {name: (float(low), float(high)) for name, (low, high) in trained["ranges"].items()}
    return calibrate(content, samples, method=method, bits=scheme.activations if scheme.is_static else 8)


def _float_operators(content: bytes) -> list[str]:
    """Say which operators of a quantized file compute in float, other than those that convert."""
    static = read_graph(content)
    quantized = any(tensor.is_quantized for operation in static.operations for tensor in operation.outputs)
    kept: dict[str, int] = {}
    for operation in static.operations:
        weights = operation.inputs[1] if len(operation.inputs) > 1 else None
        heavy = weights is not None and weights.value is not None and weights.value.size > 1
        floats = operation.name not in ("DEQUANTIZE", "QUANTIZE") and operation.outputs[0].dtype == np.float32
        plain = weights is not None and weights.dtype == np.float32
        if operation.name == "WHILE" or (floats and ((quantized and not heavy) or (heavy and plain))):
            kept[operation.name] = kept.get(operation.name, 0) + 1
    return [f"stays float32: {name} ({count})" for name, count in kept.items()]


def check(content: bytes, model: Any, inputs: list[np.ndarray], bound: Bound, reference: str) -> Verification:
    """Run a file and a model on the same samples and compare them.

    Args:
        content: The file.
        model: What it is compared with; called with ``predict``.
        inputs: One array per input, shape ``(n, ...)``.
        bound: What is accepted.
        reference: What ``model`` is, in words.
    """
    from dwindle.measuring.litert import LiteRTRunner

    runner = LiteRTRunner(content)
    found = runner.predict(inputs)
    expected = predict(model, inputs)
    return compare(expected, found, bound, reference=reference, quanta=output_quanta(content))


def predict(model: Any, inputs: list[np.ndarray], *, batch_size: int = 256) -> list[np.ndarray]:
    """Return a Keras model's outputs as a flat list of arrays; at most ``batch_size`` samples run together."""
    from dwindle.measuring.litert import samples_at_once

    fed = pack_inputs(model, inputs)
    with _no_retracing_advice():
        return list(keras.tree.flatten(model.predict(fed, batch_size=samples_at_once(inputs, batch_size), verbose=0)))


@contextmanager
def _no_retracing_advice() -> Iterator[None]:
    """Silence TensorFlow's advice on tracing, which is about calling many models, as a search has to."""
    logger = logging.getLogger("tensorflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def pack_inputs(model: Any, inputs: Sequence[np.ndarray]) -> Any:
    """Return arrays, one per input, in the form that the model takes them: an array, a list or a dict."""
    if isinstance(getattr(model, "input", None), dict):
        return keras.tree.pack_sequence_as(model.input, list(inputs))
    return inputs[0] if len(inputs) == 1 else list(inputs)


def output_quanta(content: bytes) -> list[float | None]:
    """Return the step of each output of a file: its own scale, or that of the integers it is made from."""
    return [
        float(tensor.scale.reshape(-1)[0]) if tensor.is_quantized and tensor.scale is not None else None
        for tensor in _before_dequantizing(read_graph(content))
    ]
