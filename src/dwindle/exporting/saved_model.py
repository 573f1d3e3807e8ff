"""A Keras model becomes a TensorFlow SavedModel folder, its kernels stored in float32, float16 or float8."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np

from dwindle.attaching import attached, strip
from dwindle.errors import (
    ConfigError,
    ConversionError,
    UnsupportedModelError,
    VerificationError,
    check_choice,
    did_you_mean,
)
from dwindle.exporting.convert import (
    input_specs,
    input_tensors,
    packed,
    quiet,
    random_input,
    reason,
    refuse_islands,
    signature,
)  # fmt: skip
from dwindle.exporting.verify import BOUNDS, Verification, compare
from dwindle.files import replace_folder, temporary_folder
from dwindle.quantization import SCHEMES, Scheme, calibration_samples
from dwindle.transformed_layers import resolve
from dwindle.weights import layer_slots, raw_variable

# What kernels can be stored in. LiteRT has no float8, so these are not in `SCHEMES`. TensorFlow 2.21 runs e5m2 too, but
# its graph optimizer does not know the dtype: it says so when the folder is loaded, and runs the graph as it is.
FORMATS: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "float8-e4m3": ml_dtypes.float8_e4m3fn,
    "float8-e5m2": ml_dtypes.float8_e5m2,
}

# A weight of a layer that the table of layers does not know is a kernel from this size on, if it has two axes.
SMALLEST_UNKNOWN = 1024
_BATCH = 256
# What a random sample has for a length that the model leaves open.
_OPEN_LENGTH = 32


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A weight that may be stored in fewer bits.

    Attributes:
        variable: The Keras variable.
        names: What a user may call it: the layer's name, the paths of layer and weight.
        channel_axes: Axes that count output channels.
    """

    variable: Any
    names: tuple[str, ...]
    channel_axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredKernel:
    """A kernel as the folder holds it.

    Attributes:
        codes: The rounded numbers, of the kernel's shape, in a dtype of `FORMATS`.
        scale: float32, 1 along every axis but those of the output channels; None where numbers are stored as they are.
    """

    codes: np.ndarray
    scale: np.ndarray | None

    @property
    def value(self) -> np.ndarray:
        """What the graph computes with, float32."""
        raised = self.codes.astype(np.float32)
        return raised if self.scale is None else raised * self.scale


def rounded(weight: np.ndarray, dtype: Any, channel_axes: Sequence[int]) -> StoredKernel:
    """Round a kernel to a float format, with one scale for each output channel where that has 8 bits.

    ``scale_c = max|w_c| / largest``, ``code = round(w / scale_c)``, and back ``w' = code * scale_c``: the largest
    weight of a channel lands on the largest finite number of the format, 448 in e4m3 and 57,344 in e5m2. Rounding is to
    the nearest number, and to the even one of two that are as near. The error is at most ``|w| / 16`` in e4m3, which
    has 3 bits of fraction, and ``|w| / 8`` in e5m2, which has 2; for weights below ``2^-6 scale_c`` and ``2^-14
    scale_c``, where steps get no finer, at most ``2^-10 scale_c`` and ``2^-17 scale_c``. float32 and float16 have no
    scale.

    Args:
        weight: The kernel, finite.
        dtype: One of `FORMATS`.
        channel_axes: Axes that count output channels.

    References:
        Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433, sections 3 and 4. There a scale is
        of a whole tensor; ours is of a channel, which costs four bytes each and nothing when it runs.
    """
    weight = np.asarray(weight, np.float32)
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if np.dtype(dtype).itemsize > 1:
        return StoredKernel(codes=np.clip(weight, -largest, largest).astype(dtype), scale=None)
    kept = {axis % weight.ndim for axis in channel_axes} if weight.ndim else set()
    others = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    reach = np.abs(weight).max(axis=others, keepdims=True, initial=0.0)
    least = np.finfo(np.float32).tiny  # a scale that is no normal number would lose bits itself
    scale = np.where(reach > 0, np.maximum(reach / np.float32(largest), least), np.float32(1.0)).astype(np.float32)
    return StoredKernel(codes=np.clip(weight / scale, -largest, largest).astype(dtype), scale=scale)


def find_kernels(model: keras.Model) -> list[Kernel]:
    """List the weights of a model that may be stored in fewer bits, each once.

    Those that the table of layers names; of other classes than Keras' own, every float weight with at least two axes
    and 1,024 numbers, whose last axis is taken for the output channels. Biases and norms stay float32.
    """
    found: dict[int, Kernel] = {}
    layers = list(model._flatten_layers())
    for layer in layers:
        for slot in layer_slots(layer):
            owner, weight = resolve(layer, slot.key)
            variable = raw_variable(owner, weight)
            found.setdefault(id(variable), _kernel(variable, owner, slot.channel_axes))
    for layer in layers:
        if type(layer).__module__.split(".")[0] == "keras":
            continue
        inner = {id(v) for other in layer._flatten_layers(include_self=False) for v in other.weights}
        for variable in layer.weights:
            wide = len(variable.shape) > 1 and int(np.prod(variable.shape)) >= SMALLEST_UNKNOWN
            if id(variable) not in inner and wide and _is_float(variable):
                found.setdefault(id(variable), _kernel(variable, layer, (len(variable.shape) - 1,)))
    return [kernel for kernel in found.values() if _is_float(kernel.variable)]


def _kernel(variable: Any, layer: Any, channel_axes: tuple[int, ...]) -> Kernel:
    names = (layer.name, variable.path.rpartition("/")[0], variable.path)
    return Kernel(variable=variable, names=names, channel_axes=channel_axes)


def _is_float(variable: Any) -> bool:
    return "float" in keras.backend.standardize_dtype(variable.dtype)


def resolve_formats(scheme: Any) -> list[tuple[str, str]]:
    """Return ``(pattern, format)`` pairs, the later ones winning, for what the user passed as scheme.

    Args:
        scheme: None (float32), a name, a `Scheme` without integers, or a mapping from patterns of layer names to those.

    Raises:
        ConfigError: For a scheme that a SavedModel can't hold.
    """
    if isinstance(scheme, Mapping):
        if not scheme:
            raise ConfigError("`scheme` is an empty mapping; give it patterns and formats, or a format's name")
        return [(str(pattern), resolve_formats(inner)[0][1]) for pattern, inner in scheme.items()]
    if isinstance(scheme, Scheme) and scheme.layers:
        raise ConfigError("`scheme` is a Scheme with layers; for a SavedModel pass a mapping from patterns to names")
    name = "float32" if scheme is None else scheme.name if isinstance(scheme, Scheme) else scheme
    if name not in FORMATS and (isinstance(scheme, Scheme) or name in SCHEMES):
        raise ConfigError(
            f"`scheme` is `{name}`, and a SavedModel folder holds floats: {', '.join(f'`{f}`' for f in FORMATS)}; for "
            f"`{name}` name a file that ends in .tflite"
        )
    check_choice("scheme", name, FORMATS)
    return [("*", name)]


def scheme_name(scheme: Any) -> str:
    """Return what a scheme is called in a record: the format of all kernels, with a mark where some differ."""
    pairs = resolve_formats(scheme)
    base = pairs[0][1] if pairs[0][0] == "*" else "float32"
    return base if pairs[0][0] == "*" and len(pairs) == 1 else f"{base}+layers"


def choose_formats(kernels: Sequence[Kernel], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return each kernel's format.

    Raises:
        ConfigError: If a pattern matches no kernel.
    """
    chosen = ["float32"] * len(kernels)
    for pattern, name in pairs:
        hits = [i for i, kernel in enumerate(kernels) if any(fnmatch.fnmatchcase(n, pattern) for n in kernel.names)]
        if not hits and pattern != "*":
            known = [kernel.names[0] for kernel in kernels]
            raise ConfigError(
                f"`scheme` has {pattern!r}, which matches no layer with a kernel; they are "
                f"{', '.join(known[:40])}{', ...' if len(known) > 40 else ''}{did_you_mean(pattern, known)}"
            )
        for i in hits:
            chosen[i] = name
    return chosen


def store(kernels: Sequence[Kernel], formats: Sequence[str]) -> dict[int, StoredKernel]:
    """Round the kernels that are not float32; keyed by the identity of the variable.

    Raises:
        ConversionError: If a weight is not finite, or beyond the largest number of float16.
    """
    found = {}
    for kernel, name in zip(kernels, formats, strict=True):
        if name == "float32":
            continue
        weight = np.asarray(keras.ops.convert_to_numpy(kernel.variable), np.float32)
        if not np.isfinite(weight).all():
            raise ConversionError(f"`{kernel.variable.path}` has NaN or infinite weights; train the model again")
        if name == "float16" and np.abs(weight).max(initial=0.0) > np.finfo(np.float16).max:
            raise ConversionError(
                f"`{kernel.variable.path}` has weights beyond 65,504, the largest float16; keep that layer in float32: "
                f"scheme={{'*': 'float16', '{kernel.names[0]}': 'float32'}}"
            )
        found[id(kernel.variable)] = rounded(weight, FORMATS[name], kernel.channel_axes)
    return found


def write_saved_model(
    model: keras.Model, path: Path, scheme: Any = None, samples: Any = None, *, verify_samples: int = 512
) -> tuple[Verification, float, list[str]]:
    """Write a SavedModel folder, load it again, compare it with the model, and move it into place.

    Its signature ``serving_default`` has the model's input names, and a batch axis of any size where the model has;
    ``loaded.serve(x)`` is the same function. Kernels are variables of the format's dtype, raised to float32 each
    time the graph runs; it needs no dwindle.

    Args:
        model: Any built Keras model.
        path: The folder, checked before with `dwindle.files.check_output_folder`.
        scheme: What `resolve_formats` takes.
        samples: What to compare on, as `dwindle.export` takes its data; None: 64 seeded random samples.
        verify_samples: At most this many are compared.

    Returns:
        The comparison with the model that has the rounded weights, the largest difference of an output from the model
        as it came in, and notes.

    Raises:
        ConfigError: For a scheme that a SavedModel can't hold.
        UnsupportedModelError: If a layer keeps a state between calls, or runs Python.
        ConversionError: If the model can't be traced, or the folder not be written.
        VerificationError: If the folder misses the bound; nothing is written.
    """
    _check(model)
    plain = strip(model) if attached(model) else model
    pairs = resolve_formats(scheme)
    kernels = find_kernels(plain)
    stored = store(kernels, choose_formats(kernels, pairs))
    inputs = _comparable(plain, samples, verify_samples)
    with temporary_folder(path) as folder:
        _save(plain, stored, folder)
        found = _run_folder(plain, folder, inputs)
        expected = _predict(plain, {key: kernel.value for key, kernel in stored.items()}, inputs)
        before = _predict(plain, {}, inputs) if stored else expected
        name = "the model with rounded weights" if stored else "the Keras model"
        verification = compare(expected, found, BOUNDS["saved-model"], reference=name)
        if not verification.passed:
            raise VerificationError(
                f"the SavedModel does not predict what {name} predicts: {verification.within:.2%} of outputs on "
                f"{verification.samples} samples are within the bound ({verification.bound}), the largest difference "
                f"is {verification.max_abs_error:.4g}; nothing was written"
            )
        replace_folder(folder, path)
    error = compare(before, found, BOUNDS["saved-model"], reference="the float model").max_abs_error
    return verification, error, _notes(plain, stored)


def _check(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ConfigError(f"`model` is a {type(model).__name__}; it must be a keras.Model (dw.load makes one)")
    if not model.built:
        raise ConfigError(f"`model` ({model.name}) is not built: call it once on data, or model.build(input_shape)")
    if trained := getattr(model, "quantization", None):
        raise ConfigError(
            f"`model` was made by dw.quantize for `{trained['scheme']['name']}`, and a SavedModel folder holds floats; "
            "name a file that ends in .tflite, or export dw.finalize(model)"
        )
    if keras.backend.backend() != "tensorflow":
        raise ConversionError(
            f"a SavedModel is traced by TensorFlow, and Keras runs on {keras.backend.backend()}; save the model as "
            ".keras and export it in a process with KERAS_BACKEND=tensorflow"
        )
    refuse_islands(model, "a SavedModel")
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise UnsupportedModelError(
                f"`{layer.name}` keeps its state between calls (stateful=True), and a SavedModel from dwindle does "
                "not; build the model with stateful=False"
            )


def _save(model: keras.Model, stored: Mapping[int, StoredKernel], folder: Path) -> None:
    """Trace the model with its kernels raised from what is stored, and save that."""
    with quiet():
        import tensorflow as tf

        module = tf.Module()
        kept: list[Any] = []
        readers = []
        for variable in model.variables:
            kernel = stored.get(id(variable))
            name = variable.path.replace("/", "_")
            value = keras.ops.convert_to_numpy(variable) if kernel is None else kernel.codes
            number = tf.Variable(value, trainable=False, name=name)
            scale = None if kernel is None or kernel.scale is None else tf.Variable(kernel.scale, trainable=False)
            kept += [number] if scale is None else [number, scale]
            readers.append((variable, number, scale))

        def compute(packed: Any) -> Any:
            mapping = [(variable, _raised(tf, variable, number, scale)) for variable, number, scale in readers]
            with keras.StatelessScope(state_mapping=mapping):
                return model(packed, training=False)

        module.kept = kept
        try:
            module.serve = signature(tf, model, compute)
            graph = module.serve.get_concrete_function().graph.as_graph_def()
            _check_no_python(model, graph)
            tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise ConversionError(f"`{model.name}` can't be written as a SavedModel: {reason(error)}") from error


def _check_no_python(model: keras.Model, graph: Any) -> None:
    """Raise if a traced graph calls back into this process, which a program that loads the folder does not have."""
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    if python := next((node.name for node in nodes if "PyFunc" in node.op), None):
        raise UnsupportedModelError(
            f"`{model.name}` runs Python while it computes (`{python}`), as an operator that could not be lifted does, "
            "and a SavedModel can't hold that; export it as .tflite, or export the model that it was lifted from"
        )


def _raised(tf: Any, variable: Any, number: Any, scale: Any) -> Any:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    if number.dtype.name == dtype:
        return tf.convert_to_tensor(number)
    value = tf.cast(number, tf.float32)
    return tf.cast(value if scale is None else value * scale, dtype)


def _run_folder(model: keras.Model, folder: Path, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    with quiet():
        import tensorflow as tf

        run = tf.saved_model.load(str(folder)).signatures["serving_default"]
        names = [spec.name for spec in input_specs(tf, model)]
    parts = []
    for batch in _batches(model, inputs):
        answer = run(**{name: tf.constant(array) for name, array in zip(names, batch, strict=True)})
        parts.append([np.asarray(answer[key]) for key in sorted(answer)])
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


def _predict(model: keras.Model, values: Mapping[int, np.ndarray], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the model's outputs, with other values for the variables of those identities; nothing is changed."""
    mapping = [
        (variable, keras.ops.convert_to_tensor(values[id(variable)], dtype=variable.dtype))
        for variable in model.variables
        if id(variable) in values
    ]
    parts = []
    for batch in _batches(model, inputs):
        given = packed(model, [keras.ops.convert_to_tensor(array) for array in batch])
        with keras.StatelessScope(state_mapping=mapping):
            results = keras.tree.flatten(model(given, training=False))
        parts.append([keras.ops.convert_to_numpy(value) for value in results])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _batches(model: keras.Model, inputs: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    size = input_tensors(model)[0].shape[0] or _BATCH
    for start in range(0, len(inputs[0]), size):
        yield [array[start : start + size] for array in inputs]


def _comparable(model: keras.Model, samples: Any, limit: int) -> list[np.ndarray]:
    """Return the arrays to compare on, one per input; whole batches where the model has a fixed batch axis."""
    tensors = input_tensors(model)
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors]
    if samples is None:
        shapes = [tuple(_OPEN_LENGTH if size is None else size for size in tensor.shape[1:]) for tensor in tensors]
        arrays = [random_input(shape, np.dtype(d), 64) for shape, d in zip(shapes, dtypes, strict=True)]
    else:
        given = calibration_samples([tuple(t.shape[1:]) for t in tensors], samples, limit=limit)
        arrays = [np.asarray(array, dtype) for array, dtype in zip(given, dtypes, strict=True)]
    size, count = tensors[0].shape[0] or 1, len(arrays[0])
    return [np.resize(array, (-(-count // size) * size, *array.shape[1:])) for array in arrays]


def _notes(model: keras.Model, stored: Mapping[int, StoredKernel]) -> list[str]:
    """Say which large weights, other than biases and norms, stay float32 where kernels have fewer bits."""
    if not stored:
        return []
    return [
        f"stays float32: `{variable.path}` ({int(np.prod(variable.shape)):,} numbers)"
        for variable in model.weights
        if id(variable) not in stored and len(variable.shape) > 1 and int(np.prod(variable.shape)) >= SMALLEST_UNKNOWN
    ]
