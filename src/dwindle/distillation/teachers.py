"""Who teaches: a Keras model, a file, a function, or recorded outputs."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.distillation.features import zeros_for
from dwindle.distillation.outputs import Output, outputs_of_model
from dwindle.errors import ConfigError, DataError
from dwindle.files import sha256_of


class Teacher:
    """Something that has outputs for samples.

    Attributes:
        specs: Its outputs, in the order of ``keras.tree.flatten``.
        model: The Keras model, where it is one.
        traceable: Whether it can be compiled along with the training step.
        takes: Shape of each input with the batch axis, None where a size is free; empty where that is not known.
    """

    specs: list[Output]
    model: keras.Model | None = None
    traceable: bool = True
    takes: Sequence[tuple[int | None, ...]] = ()

    def check_inputs(self, shapes: Sequence[tuple[int | None, ...]], who: str, *, resized: bool = False) -> None:
        """Raise if samples of these shapes (batch axis included) can't be given to it.

        Args:
            shapes: Of each input; empty where they are not known.
            who: What has these shapes, such as "`student` takes".
            resized: Whether a single image is brought to each model's height and width.

        Raises:
            ConfigError: With both shapes.
        """
        sizes = resized and len(shapes) == 1 and len(shapes[0]) == 4
        compared = [(None, None, None, shapes[0][3])] if sizes else shapes
        fits = len(compared) == len(self.takes) and all(map(_fits, compared, self.takes))
        if shapes and self.takes and not fits:
            given = [", ".join(str(tuple(shape)) for shape in side) for side in (shapes, self.takes)]
            raise ConfigError(
                f"{who} {given[0]} and `teacher` takes {given[1]}; it sees the same samples, so they must have the "
                "shape that it takes"
            )

    def tell(self, x: Any) -> list[Any]:
        """Return the outputs for a batch of tensors, inside of a training step."""
        raise NotImplementedError

    def run(self, x: Any) -> list[np.ndarray]:
        """Return the outputs for a batch of arrays."""
        raise NotImplementedError

    def run_all(self, x: Any, batch_size: int = 256) -> list[np.ndarray]:
        """Return the outputs for arrays of any length, checked.

        Raises:
            DataError: If there is NaN or infinity among them.
        """
        count = len(keras.tree.flatten(x)[0])
        parts = []
        for start in range(0, count, batch_size):
            parts.append(self.run(rows(x, start, start + batch_size)))
            for value in parts[-1]:
                check_finite(value, start, count)
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def fingerprint(self) -> str:
        """Return a hash that changes with what it says."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any] | None:
        """Return plain data from which `teacher_from_dict` makes it again; None where that can't be."""
        return None


class ModelTeacher(Teacher):
    """A Keras model.

    Args:
        model: The model, built; it is not trained.

    Raises:
        ConfigError: If it is not built, or has weights that are not finite.
    """

    model: keras.Model

    def __init__(self, model: keras.Model) -> None:
        if not model.built:
            raise ConfigError(
                f"`teacher` ({model.name}) is not built: call it once on data, or model.build(input_shape)"
            )
        for variable in model.weights:
            if "float" in keras.backend.standardize_dtype(variable.dtype):
                value = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
                if not np.isfinite(value).all():
                    raise ConfigError(
                        f"`teacher` ({model.name}) has a weight `{variable.path}` with NaN or infinity, so it teaches "
                        "nothing; train it again with a lower learning rate, or take an earlier checkpoint"
                    )
        self.model = model
        self.specs = outputs_of_model(model)
        self.takes = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or ()]

    def tell(self, x: Any) -> list[Any]:
        """Return what the model predicts, as at inference."""
        return list(keras.tree.flatten(self.model(x, training=False)))

    def run(self, x: Any) -> list[np.ndarray]:
        """Return what the model predicts."""
        given = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        return [np.asarray(keras.ops.convert_to_numpy(value)) for value in self.tell(given)]

    def fingerprint(self) -> str:
        """Return a hash of the config and all weights."""
        digest = hashlib.sha256(json.dumps(self.model.get_config(), default=str, sort_keys=True).encode("utf8"))
        for variable in self.model.weights:
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return that it is a model, which is saved by itself."""
        return {"kind": "model"}


class FunctionTeacher(Teacher):
    """A function from a batch of arrays to an array, or a list of them: a model of another framework, a service.

    It runs on NumPy arrays outside of the compiled step.

    Args:
        function: Called with the batch in the form that the student takes it.
        x: A few samples, from which the outputs' shapes are known.
        activation: ``"softmax"``, ``"sigmoid"`` or ``"linear"``: what its outputs are; None: read off them.

    Raises:
        ConfigError: If it fails on the samples.
    """

    traceable = False

    def __init__(self, function: Callable[[Any], Any], x: Any, activation: str | None = None) -> None:
        self.function = function
        try:
            made = self.run(x)
        except Exception as error:
            raise ConfigError(
                f"`teacher` {_name(function)} fails on {_shapes(x)}: {str(error).splitlines()[0]}; it must take a "
                "batch of arrays as the student does, and return an array of outputs, or a list of them"
            ) from None
        count = len(keras.tree.flatten(x)[0])
        for value in made:
            if value.shape[:1] != (count,):
                raise ConfigError(
                    f"`teacher` {_name(function)} returns {value.shape} for {count} samples; it must return one row "
                    "for each sample"
                )
        self.specs = [
            Output(shape=(None, *value.shape[1:]), activation=activation or _looks_like(value)) for value in made
        ]

    def run(self, x: Any) -> list[np.ndarray]:
        """Return what the function does, as float32."""
        return [np.asarray(value, np.float32) for value in keras.tree.flatten(self.function(x))]

    def tell(self, x: Any) -> list[Any]:
        """Call the function from inside of a step."""
        return called_back(self.run, x, [spec.shape[1:] for spec in self.specs])

    def fingerprint(self) -> str:
        """Return a hash of the function's name; `dwindle.distillation.record` adds what it says."""
        return hashlib.sha256(_name(self.function).encode("utf8")).hexdigest()


class FileTeacher(FunctionTeacher):
    """A ``.tflite`` file, quantized or not, which LiteRT runs: the very file that ships teaches.

    ``dw.load(path)`` instead makes a float file a Keras model, whose layers can then be looked at.

    Args:
        path: The file.

    Raises:
        DataError: If it does not exist.
        UnsupportedModelError: If it is broken or can't run.
    """

    def __init__(self, path: str | Path) -> None:
        from dwindle.measuring.litert import LiteRTRunner

        self.path = Path(path)
        self._runner = LiteRTRunner(self.path)
        self.takes = [(None, *(None if size < 0 else size for size in spec.shape[1:])) for spec in self._runner.inputs]
        endings = _file_endings(self.path)
        self._steps = [step for _, step in endings]
        self.specs = [
            Output(shape=(None, *(None if size < 0 else size for size in spec.shape[1:])), activation=ending)
            for spec, (ending, _) in zip(self._runner.outputs, endings, strict=True)
        ]
        self.function = self._predict

    def _predict(self, x: Any) -> list[np.ndarray]:
        arrays = [np.asarray(array) for array in keras.tree.flatten(x)]
        made = self._runner.predict(arrays, batch_size=len(arrays[0]))
        # Of a quantized probability 0 stands for anything below half a step, and 1 for anything above.
        return [
            np.clip(value, step / 2, 1 - step / 2) if step and not spec.gives_logits else value
            for value, step, spec in zip(made, self._steps, self.specs, strict=True)
        ]

    def fingerprint(self) -> str:
        """Return the file's hash."""
        return sha256_of(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return the path and the hash."""
        return {"kind": "file", "path": str(self.path), "sha256": sha256_of(self.path)}


def _file_endings(path: Path) -> list[tuple[str, float]]:
    """Return ``softmax`` or ``sigmoid`` for outputs of a file that end so, else ``linear``; and an output's step."""
    from dwindle.lifting.flatbuffer import read_graph

    graph = read_graph(path.read_bytes())
    makers = {tensor.index: operation for operation in graph.operations for tensor in operation.outputs}
    found = []
    for output in graph.outputs:
        tensor, maker, step = output, makers.get(output.index), 0.0
        while True:
            step = step or (float(np.max(tensor.scale)) if tensor.is_quantized and tensor.scale is not None else 0.0)
            before = maker.inputs[0] if maker is not None else None
            if maker is None or before is None or maker.name not in ("QUANTIZE", "DEQUANTIZE", "RESHAPE"):
                break
            tensor, maker = before, makers.get(before.index)
        name = maker.name if maker is not None else ""
        found.append(({"SOFTMAX": "softmax", "LOGISTIC": "sigmoid"}.get(name, "linear"), step))
    return found


def called_back(run: Callable[[Any], list[np.ndarray]], x: Any, shapes: Sequence[Sequence[int | None]]) -> list[Any]:
    """Return as tensors what a function on arrays makes of tensors, on any backend.

    In a compiled TensorFlow step, a function that itself runs TensorFlow needs a machine with several cores, since it
    holds one of the threads that it waits for.

    Args:
        run: Takes arrays in the structure of ``x``; returns float32 arrays.
        x: Tensors of a batch.
        shapes: Of each output, without the batch axis.
    """
    flat = keras.tree.flatten(x)

    def on_arrays(*arrays: Any) -> list[np.ndarray]:
        return run(keras.tree.pack_sequence_as(x, [np.asarray(array) for array in arrays]))

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.executing_eagerly():
            return [tf.convert_to_tensor(value) for value in on_arrays(*flat)]
        made = tf.numpy_function(on_arrays, flat, [tf.float32] * len(shapes), stateful=False)
        for value, shape in zip(made, shapes, strict=True):
            value.set_shape([flat[0].shape[0], *shape])
        return list(made)
    if backend == "jax":
        jax: Any = importlib.import_module("jax")

        batch = flat[0].shape[0]
        kinds = [jax.ShapeDtypeStruct((batch, *shape), np.float32) for shape in shapes]
        return list(jax.pure_callback(on_arrays, kinds, *flat))
    return [keras.ops.convert_to_tensor(value) for value in on_arrays(*map(keras.ops.convert_to_numpy, flat))]


def resolve_teacher(source: Any, student: keras.Model | None = None, x: Any = None) -> Teacher:
    """Return the teacher that a model, a path or a function is.

    Args:
        source: A Keras model; the path of a recording (`dwindle.distillation.record`), of a ``.tflite`` file, which
            LiteRT runs, or of anything that `dwindle.load` reads; a function from arrays to arrays; a `Teacher`.
        student: Says what a function is tried on, where there is no ``x``.
        x: Samples that a function is tried on.

    Raises:
        ConfigError: If it is none of these, or fails.
    """
    from dwindle.distillation.recording import Recording

    if isinstance(source, Teacher):
        return source
    if isinstance(source, keras.Model):
        return ModelTeacher(source)
    if isinstance(source, str | Path):
        path = Path(source)
        if (path / "recording.json").exists():
            return Recording(path)
        if path.suffix.lower() == ".tflite" and path.exists():
            return FileTeacher(path)
        from dwindle.loading import load

        return ModelTeacher(load(path))
    if callable(source):
        if x is None and student is not None:
            x = zeros_for(student)
        return FunctionTeacher(source, x)
    raise ConfigError(
        f"`teacher` is a {type(source).__name__}; it must be a keras.Model, a path, a function or recorded outputs"
    )


def teacher_from_dict(data: dict[str, Any] | None, models: list[keras.Model]) -> Teacher | None:
    """Make a teacher from `Teacher.to_dict`; models are taken off the front of a list.

    Returns:
        None where the file or the recording is gone or has changed, or where it was a function.
    """
    from dwindle.distillation.recording import Recording

    if data is None:
        return None
    if data["kind"] == "model":
        return ModelTeacher(models.pop(0))
    try:
        if data["kind"] == "recording":
            found = Recording(data["path"])
            return found if found.key == data["key"] else None
        return FileTeacher(data["path"]) if sha256_of(data["path"]) == data["sha256"] else None
    except (OSError, ConfigError, DataError):
        return None


def _fits(shape: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
    """Whether a sample fits; Keras adds or takes away a last axis of one."""
    shape, wanted = (tuple(one[1:-1] if len(one) > 1 and one[-1] == 1 else one[1:]) for one in (shape, wanted))
    return len(shape) == len(wanted) and all(None in (a, b) or a == b for a, b in zip(shape, wanted, strict=True))


def _looks_like(value: np.ndarray) -> str:
    """Return ``softmax`` for rows of probabilities that sum to 1, else ``linear``."""
    rows = value.ndim > 1 and value.shape[-1] > 1 and value.min() >= 0
    return "softmax" if rows and np.allclose(value.sum(axis=-1), 1, atol=1e-3) else "linear"


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _shapes(x: Any) -> str:
    return ", ".join(str(np.shape(array)) for array in keras.tree.flatten(x))


def check_finite(values: np.ndarray, start: int, count: int) -> None:
    """Raise if a teacher's outputs have NaN or infinity.

    Args:
        values: Outputs of some samples.
        start: The number of the first.
        count: Of all samples.

    Raises:
        DataError: With the first sample that has.
    """
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"`teacher` returns NaN or infinity for sample {start + int(bad.argmax())} of {count}; look at that "
            "sample, and at the teacher's weights"
        )


def rows(arrays: Any, start: int, stop: int) -> Any:
    """Return some samples of arrays in any structure."""
    return keras.tree.map_structure(lambda array: array[start:stop], arrays)
