"""A Keras model becomes a float LiteRT file. The one place where TensorFlow is imported."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.errors import ConfigError, ConversionError, UnsupportedModelError
from dwindle.lifting.flatbuffer import Graph, counted, named_as_layers, ordered, read_graph, resizable
from dwindle.open_lengths import by_name, refuse_open_lengths, require_fit
from dwindle.weights import is_graph

# Random samples that are taken at least, of large ones.
FEWEST_SAMPLES = 12


def float_file(model: keras.Model) -> bytes:
    """Return the float32 LiteRT file of a model, its techniques baked in.

    The file takes float samples one by one or, where the graph allows it, in batches. A lifted model gives its
    own file back, with its weights in it. No Flex operator is used.

    Raises:
        ConfigError: If ``model`` is no built Keras model.
        UnsupportedModelError: If a layer runs nodes of an ONNX file, or an input has open lengths besides its samples.
        ConversionError: If the converter fails; its reason is passed on.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"`model` is a {type(model).__name__}; it must be a keras.Model (dw.load makes one)")
    refuse_islands(model, "a .tflite")
    if hasattr(model, "to_float_file"):
        content: bytes = model.to_float_file()
        return content
    if not model.built:
        raise ConfigError(f"`model` ({model.name}) is not built: call it once on data, or model.build(input_shape)")
    refuse_open_lengths({tensor.name: tensor.shape for tensor in input_tensors(model)}, graph=is_graph(model))
    from dwindle.attaching import attached, full_precision, strip

    plain = full_precision(strip(model) if attached(model) else model)
    if keras.backend.backend() != "tensorflow":
        from dwindle.exporting.second_process import converted_elsewhere

        return converted_elsewhere(plain)
    content = _convert(plain)
    freed = resizable(content)
    return freed if _same_in_batches(content, freed) else content


def refuse_islands(model: keras.Model, kind: str) -> None:
    """Refuse a model with nodes of an ONNX file that stayed as they are.

    Args:
        model: The model.
        kind: What can't hold them, in words.

    Raises:
        UnsupportedModelError: If there are such nodes; it names the first layer that runs them.
    """
    from dwindle.lifting.onnx.islands import OnnxIsland

    for layer in model._flatten_layers():
        if isinstance(layer, OnnxIsland):
            raise UnsupportedModelError(
                f"`{layer.name}` ({layer.operator}) has {layer.reason}, so that it stays as in its ONNX file, "
                f"which {kind} can't hold; convert what lies before it: "
                f"keras.Model(model.inputs, model.get_layer({layer.name!r}).input)"
            )


def _convert(model: keras.Model) -> bytes:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    module = tf.Module()
    module.serve = signature(tf, model, lambda packed: model(packed, training=False), batch=1)
    module.variables_kept = [variable.value for variable in model.variables]
    with tempfile.TemporaryDirectory() as folder, quiet(), _unrolled(model):
        try:
            tf.saved_model.save(module, folder, signatures={"serving_default": module.serve.get_concrete_function()})
            content = ordered(_convert_folder(tf, folder), [spec.name for spec in input_specs(tf, model)])
        except Exception as error:
            raise ConversionError(f"`{model.name}` can't be converted to LiteRT: {reason(error)}") from error
    return named_as_layers(content, {model.name, *(layer.name for layer in model._flatten_layers())})


def signature(tf: Any, model: keras.Model, compute: Callable[[Any], Any], *, batch: int | None = None) -> Any:
    """Return a `tf.function` with the names and the order of the model's inputs and outputs.

    Args:
        tf: The TensorFlow module.
        model: Whose inputs and outputs they are.
        compute: Called with the inputs as the model takes them; returns its outputs.
        batch: Size of the batch axis; None: the model's own, any size as a rule.
    """

    def serve(*values: Any) -> Any:
        results = keras.tree.flatten(compute(packed(model, values)))
        return {_output_name(model, number, len(results)): value for number, value in enumerate(results)}

    return tf.function(serve, input_signature=input_specs(tf, model, batch=batch), autograph=False)


def input_specs(tf: Any, model: keras.Model, *, batch: int | None = None) -> list[Any]:
    """Return a named `tf.TensorSpec` for each input of the model; ``batch`` as in `signature`."""
    return [
        tf.TensorSpec(
            [tensor.shape[0] if batch is None else batch, *tensor.shape[1:]],
            keras.backend.standardize_dtype(tensor.dtype), name=_safe(tensor.name),
        )
        for tensor in input_tensors(model)
    ]  # fmt: skip


def packed(model: keras.Model, values: Sequence[Any]) -> Any:
    """Return values, one per input, in the structure that calling the model takes."""
    structure = getattr(model, "input", None) if is_graph(model) else None
    if structure is None:
        return values[0] if len(values) == 1 else list(values)
    return keras.tree.pack_sequence_as(structure, list(values))


# A longer sequence stays a loop in the file, which is neither quantized nor trained.
LONGEST_UNROLLED = 256


@contextlib.contextmanager
def _unrolled(model: keras.Model) -> Iterator[None]:
    """Unroll recurrent layers while the model is traced: loops can't be quantized, and bring lists of tensors in."""
    changed = []
    for layer in model._flatten_layers():
        if getattr(layer, "unroll", None) is False:
            try:
                steps = layer.input.shape[1]
            except (AttributeError, ValueError, IndexError):  # called several times, or inside another layer
                steps = None
            if steps is None or steps <= LONGEST_UNROLLED:
                layer.unroll = True
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            layer.unroll = False


def saved_model_file(folder: Path, inputs: Any = None) -> bytes:
    """Return the float32 LiteRT file of a SavedModel's ``serving_default`` signature.

    Inputs and outputs are in the order of their names, ``output_2`` before ``output_10``: a signature has no other.

    Args:
        folder: The SavedModel.
        inputs: Shapes of inputs whose lengths are open, by name, or the shape of the only input; None: all are fixed.

    Raises:
        ConfigError: If ``inputs`` does not fit.
        ConversionError: If it has no such signature, or the converter fails.
        UnsupportedModelError: If it has float8 weights, or an input of several samples or of open lengths.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    why = ""
    with quiet():
        import tensorflow as tf

        try:
            loaded = tf.saved_model.load(str(folder))
            serving = loaded.signatures.get("serving_default")
            if serving is None:
                raise ConversionError(
                    f"`{folder}` has no signature `serving_default` (it has {', '.join(loaded.signatures) or 'none'}); "
                    "export it with one"
                )
            if any("float8" in variable.dtype.name for variable in serving.variables):
                raise UnsupportedModelError(
                    f"`{folder}` has float8 weights, which LiteRT can't hold; load the model that it was exported from"
                )
            # TensorFlow gives them in another order each time, and the model's own is not in the folder.
            signed = serving.structured_input_signature[1]
            given = {name: signed[name] for name in sorted(signed, key=counted)}
            chosen = by_name(inputs, given) if inputs else {}
            specs = {
                name: tf.TensorSpec(_for_one(name, spec, chosen.get(name)), spec.dtype, name=name)
                for name, spec in given.items()
            }
            module = tf.Module()
            module.loaded = loaded
            module.serve, why = _for_fixed_shapes(tf, serving, specs)
            with tempfile.TemporaryDirectory() as fixed:
                tf.saved_model.save(module, fixed, signatures={"serving_default": module.serve})
                content = ordered(_convert_folder(tf, fixed), list(given))
        except (ConfigError, ConversionError, UnsupportedModelError):
            raise
        except Exception as error:
            raise ConversionError(f"`{folder}` can't be converted to LiteRT: {reason(error)}{why}") from error
    freed = resizable(content)
    return freed if _same_in_batches(content, freed) else content


def _for_fixed_shapes(tf: Any, serving: Any, specs: dict[str, Any]) -> tuple[Any, str]:
    """Return a signature as a function of inputs of fixed shapes, its loops unrolled, and why they are not if not."""
    from dwindle.exporting.unrolling import NotUnrolled, has_loops, traced, unrolled

    why = ""
    if has_loops(serving):
        try:
            return unrolled(tf, serving, specs, LONGEST_UNROLLED), why
        except NotUnrolled as error:  # the converter may take its loops as they are
            why = f"; {error}"
        except Exception as error:  # TensorFlow reports in many ways
            why = f"; its loops can't be written out ({reason(error)})"
    return traced(tf, specs, lambda given: serving(**given)), why


def _for_one(name: str, spec: Any, chosen: tuple[Any, ...] | None) -> list[int]:
    """Return an input's shape for one sample, which makes shapes constant; open ones would be computed in the file.

    Raises:
        ConfigError: If the chosen shape does not fit the signature's.
        UnsupportedModelError: If that shape is not known, or the input takes another number of samples.
    """
    shape = None if spec.shape.rank is None else spec.shape.as_list()
    if chosen is not None:
        require_fit(name, None if shape is None else tuple(shape), chosen, "the signature")
        shape = list(chosen)
    if not shape or None in shape[1:]:
        given = "any shape" if shape is None else f"the shape {tuple(shape)}"
        first = shape[0] if shape else None
        written = "?" if first is None else first
        raise UnsupportedModelError(
            f"input `{name}` has {given} in the signature; choose every length but the first, the number of samples: "
            f"dw.load(folder, inputs={{{name!r}: ({first}, ...)}}) (--input {name}={written},...)"
        )
    if shape[0] not in (None, 1):
        raise UnsupportedModelError(
            f"input `{name}` has a fixed batch of {shape[0]} in the signature; export it with an open one, or 1"
        )
    return [1, *shape[1:]]


def _convert_folder(tf: Any, folder: str) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    with _collected.seldom():
        return bytes(converter.convert())


class _Collected:
    """Keeps the converter from looking through the whole process for garbage each time.

    It collects at its end, which takes longer the more objects there are: a quarter of a small model's conversion, and
    most of it where hundreds of models are held. Every `EVERY_S` seconds is enough.
    """

    EVERY_S = 10.0

    def __init__(self) -> None:
        self._last = -math.inf

    @contextlib.contextmanager
    def seldom(self) -> Iterator[None]:
        """Leave out of a collection what is there already, if there was a whole one a moment ago."""
        now = time.monotonic()
        if now - self._last > self.EVERY_S or gc.get_freeze_count() > 0:  # what others have frozen stays so
            self._last = now
            yield
            return
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


_collected = _Collected()


def _output_name(model: keras.Model, number: int, count: int) -> str:
    """Return a name that sorts as the outputs are ordered: the layer's, or a number where there are several."""
    names = list(getattr(model, "output_names", None) or [])
    name = _safe(names[number]) if len(names) == count else "output"
    return name if count == 1 else f"output_{number:02d}_{name}"


def input_tensors(model: keras.Model) -> list[Any]:
    """Return a named shape and dtype for each input, also of a subclassed model that was called.

    Raises:
        ConversionError: If they are not known.
    """
    inputs = getattr(model, "inputs", None)
    if inputs:
        return list(inputs)
    # A subclassed model knows the shapes that it was first called with.
    built = model.get_build_config() or {}
    shapes = [built["input_shape"]] if built.get("input_shape") else list((built.get("shapes_dict") or {}).values())
    if shapes and all(isinstance(shape, tuple | list) and not isinstance(shape[-1], tuple | list) for shape in shapes):
        return [
            keras.KerasTensor((None, *shape[1:]), dtype="float32", name=f"input_{number}" if number else "input")
            for number, shape in enumerate(shapes)
        ]
    raise ConversionError(
        f"`{model.name}` is a subclassed model whose input shapes are not known; call it once on a batch of arrays, "
        "or wrap it: keras.Model(x, model(x)) with x = keras.Input(shape)"
    )


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "_" else "_" for letter in name)


def reason(error: Exception) -> str:
    """Return the line of a converter's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "Flex" in line or "Select" in line]
    found = (telling or lines or [type(error).__name__])[0]
    # What comes before is where it is in the converter's own graph.
    return re.sub(r"^.*error: (loc\(.*\): )?", "", found)[:500]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what the C++ converter prints to a file that is thrown away."""
    sys.stderr.flush()
    sys.stdout.flush()
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as log, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            os.dup2(log.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _same_in_batches(content: bytes, freed: bytes) -> bool:
    """Whether the resizable file computes for three samples at once what the other does one by one."""
    from dwindle.measuring.litert import LiteRTRunner

    inputs = [random_input(tensor.shape[1:], tensor.dtype, 3) for tensor in read_graph(content).inputs]
    try:
        single = LiteRTRunner(content)
        alone = [single.run(*(array[i : i + 1] for array in inputs)) for i in range(3)]
        together = LiteRTRunner(freed).run(*inputs)
    except Exception:  # a graph whose batch axis can't be freed fails in many ways; it keeps batch 1
        return False
    for number, value in enumerate(together):
        expected = np.concatenate([outputs[number] for outputs in alone])
        if value.shape != expected.shape or not np.allclose(value, expected, rtol=1e-4, atol=1e-5):
            return False
    return True


def random_input(shape: tuple[int | None, ...], dtype: Any, count: int, seed: int = 0) -> np.ndarray:
    """Return seeded samples for a check: floats in [0, 1), integers 0 and 1."""
    generator = np.random.default_rng(seed)
    full = (count, *(1 if size is None or size < 0 else size for size in shape))
    if np.issubdtype(dtype, np.floating):
        return generator.random(full).astype(dtype)
    return generator.integers(0, 2, full).astype(dtype)


def random_samples(graph: Graph, most: int) -> tuple[np.ndarray, ...]:
    """Return seeded samples, one array for each input; fewer of large ones, which take long."""
    from dwindle.measuring.litert import samples_at_once

    one = [random_input(tensor.shape[1:], tensor.dtype, 1) for tensor in graph.inputs]
    count = max(FEWEST_SAMPLES, samples_at_once(one, most))
    return tuple(random_input(tensor.shape[1:], tensor.dtype, count) for tensor in graph.inputs)


def refuse_nan(model: Any) -> None:
    """Refuse a model whose training has diverged.

    Raises:
        ConversionError: Naming the first weight that has NaN.
    """
    for variable in getattr(model, "trainable_variables", ()):
        if np.isnan(np.asarray(keras.ops.convert_to_numpy(variable), np.float32)).any():
            raise ConversionError(
                f"weight `{variable.path}` of `{model.name}` has NaN, so every output would: its training diverged; go "
                "back to an earlier state, and train with a smaller learning rate or `clipnorm=1.0`"
            )
