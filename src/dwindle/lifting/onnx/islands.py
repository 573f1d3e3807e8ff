"""Frozen islands: nodes that have no entry run in ONNX Runtime, inside the Keras model."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.errors import MissingDependencyError, UnsupportedModelError
from dwindle.lifting.onnx.cutting import Cut, checked, inferred, kinds_in
from dwindle.measuring.onnx_runtime import OnnxRunner

#: Seconds after which a run is stopped that only asks for the number of axes of a result.
LONGEST_TRIAL_S = 60.0
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_REPEATING = {"Loop", "Scan", "SequenceMap"}
# Types that JAX narrows, as long as its 64 bits are off.
_NARROWED = {"int64": "int32", "uint64": "uint32", "float64": "float32"}


class _Reference:
    """The implementation of ONNX in NumPy, for what ONNX Runtime lacks or where it is not installed.

    Nothing can stop it, so that with a limit it does not run what repeats as long as a file says.
    """

    def __init__(self, model: Any, *, limited: bool) -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(model)
        self._inputs = _ends(model.graph.input)
        self._refused = next((kind for kind in kinds_in(model.graph) if kind in _REPEATING), "") if limited else ""

    def run(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if self._refused:
            raise UnsupportedModelError(
                f"{self._refused} runs as long as the file says, and nothing but ONNX Runtime can be stopped; install "
                "it with pip install 'dwindle[onnx]'"
            )
        fed = {name: np.asarray(x, dtype) for (name, dtype, _), x in zip(self._inputs, arrays, strict=True)}
        with np.errstate(all="ignore"):
            return tuple(np.asarray(value) for value in self._evaluator.run(None, fed))


def runner_of(content: bytes, *, limit_s: float | None = None) -> OnnxRunner | _Reference:
    """Return what runs an island's file.

    Args:
        content: The file.
        limit_s: Seconds after which ONNX Runtime is stopped; without it, loops then do not run at all. None for no
            limit.

    Raises:
        UnsupportedModelError: If the file is damaged, or neither ONNX Runtime nor `onnx.reference` has its operators.
    """
    model = checked(content)
    try:
        return OnnxRunner(content, limit_s=limit_s)
    except (UnsupportedModelError, MissingDependencyError) as error:
        try:
            return _Reference(model, limited=limit_s is not None)
        except Exception:  # it reports what it lacks in many ways
            raise UnsupportedModelError(str(error)) from None


@keras.saving.register_keras_serializable("dwindle")
class OnnxIsland(keras.layers.Layer):
    """Nodes of an ONNX file, run by ONNX Runtime; no gradient passes, and their constants are not trained.

    Lengths of axes are numbers, names that stand for the same length wherever they are, or None for what depends on
    the data.

    Args:
        operator: The operators' names.
        file: The file that holds them, base64.
        reason: What there is not, so that they stay as they are.
        given: Lengths of each input's axes.
        shapes: Lengths of each output's axes.
        dtypes: NumPy type name of each output.
        name: The layer's name.
    """

    def __init__(
        self,
        *,
        operator: str,
        file: str,
        reason: str,
        given: list[list[Any]],
        shapes: list[list[Any]],
        dtypes: list[str],
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **{**kwargs, "trainable": False, "autocast": False})
        self.operator = operator
        self.file = file
        self.reason = reason
        self.given = [list(shape) for shape in given]
        self.shapes = [list(shape) for shape in shapes]
        self.dtypes = list(dtypes)
        self.supports_jit = False
        self._runners: list[Any] = []

    @classmethod
    def of(
        cls, cut: Cut, operator: str, reason: str, *, declared: Mapping[str, tuple[int, ...]], name: str
    ) -> OnnxIsland:
        """Make the island of nodes that were cut out.

        Args:
            cut: The nodes' file.
            operator: The operators' names.
            reason: What there is not, so that they stay as they are.
            declared: Shapes that the whole file tells, 1 for open lengths; for results that no one else knows.
            name: The layer's name.

        Raises:
            UnsupportedModelError: If nothing runs it, or it gives what is no tensor.
        """
        model = checked(cut.content)
        described = _results(cut, model, declared)
        return cls(
            operator=operator,
            file=base64.b64encode(cut.content).decode("ascii"),
            reason=reason,
            given=[list(lengths or []) for _, _, lengths in _ends(model.graph.input)],
            shapes=[shape for _, shape in described],
            dtypes=[dtype for dtype, _ in described],
            name=name,
        )

    @property
    def content(self) -> bytes:
        """The bytes of the ``.onnx``."""
        return base64.b64decode(self.file)

    def check(self, arrays: Sequence[np.ndarray]) -> None:
        """Run the nodes once, and compare the shapes of their results with what the layer tells.

        Args:
            arrays: One for each input.

        Raises:
            UnsupportedModelError: If they can't run, or give other shapes.
        """
        found = runner_of(self.content, limit_s=LONGEST_TRIAL_S).run(*arrays)
        for value, told in zip(found, self._lengths([array.shape for array in arrays]), strict=True):
            if len(told) != value.ndim or any(a is not None and a != b for a, b in zip(told, value.shape, strict=True)):
                raise UnsupportedModelError(f"it gives results of shape {value.shape}, and not {tuple(told)}")

    def _run(self, *arrays: Any) -> list[np.ndarray]:
        if not self._runners:
            self._runners.append(runner_of(self.content))
        found = self._runners[0].run(*(np.asarray(array) for array in arrays))
        return [np.asarray(value, _held(dtype)) for value, dtype in zip(found, self.dtypes, strict=True)]

    def call(self, inputs: Any) -> Any:
        """Return the nodes' results, a list where there are several."""
        tensors = [keras.ops.stop_gradient(tensor) for tensor in keras.tree.flatten(inputs)]
        shapes = self._lengths([tuple(tensor.shape) for tensor in tensors])
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            results = tf.numpy_function(self._run, tensors, [tf.as_dtype(dtype) for dtype in self.dtypes])
            results = results if isinstance(results, list | tuple) else [results]
            for result, shape in zip(results, shapes, strict=True):
                result.set_shape(shape)
        elif keras.backend.backend() == "jax" and _traced(tensors):
            results = self._called_back(tensors, shapes)
        else:
            arrays = [keras.ops.convert_to_numpy(tensor) for tensor in tensors]
            results = [keras.ops.convert_to_tensor(array) for array in self._run(*arrays)]
        return results[0] if len(results) == 1 else list(results)

    def _called_back(self, tensors: Sequence[Any], shapes: Sequence[Sequence[int | None]]) -> list[Any]:
        import jax  # type: ignore[import-not-found]

        if any(None in shape for shape in shapes):
            raise UnsupportedModelError(
                f"`{self.name}` ({self.operator}) gives results as long as its data says, which JAX can't compile; "
                "call the model itself, compile it with run_eagerly=True, or use the TensorFlow backend"
            )
        kinds = [
            jax.ShapeDtypeStruct(tuple(shape), _held(dtype)) for shape, dtype in zip(shapes, self.dtypes, strict=True)
        ]
        return list(jax.pure_callback(lambda *arrays: self._run(*arrays), kinds, *tensors))

    def _lengths(self, shapes: Sequence[Sequence[int | None]]) -> list[list[int | None]]:
        """Return the outputs' shapes for shapes of the inputs.

        Raises:
            UnsupportedModelError: If the inputs are not as long as they were in the file.
        """
        for named, shape in zip(self.given, shapes, strict=True):
            pairs = list(zip(named, shape, strict=False))
            if len(named) != len(shape) or any(isinstance(a, int) and b is not None and a != b for a, b in pairs):
                raise UnsupportedModelError(
                    f"`{self.name}` ({self.operator}) takes tensors of shape {tuple(named)}, as in its file; this one "
                    f"has {tuple(shape)}"
                )
        known = {
            name: length
            for named, shape in zip(self.given, shapes, strict=True)
            for name, length in zip(named, shape, strict=True)
            if isinstance(name, str)
        }
        return [[known.get(n) if isinstance(n, str) else n for n in shape] for shape in self.shapes]

    def compute_output_shape(self, *shapes: Any) -> Any:
        """Return the outputs' shapes."""
        flat = shapes[0] if len(shapes) == 1 and shapes[0] and isinstance(shapes[0][0], list | tuple) else shapes
        found = [tuple(shape) for shape in self._lengths(flat)]
        return found[0] if len(found) == 1 else found

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the outputs' shapes and types."""
        shapes = self._lengths([tuple(tensor.shape) for tensor in keras.tree.flatten(inputs)])
        found = [
            keras.KerasTensor(tuple(shape), dtype=_held(dtype))
            for shape, dtype in zip(shapes, self.dtypes, strict=True)
        ]
        return found[0] if len(found) == 1 else found

    def get_config(self) -> dict[str, Any]:
        """Return the operators and their file."""
        names = ("operator", "file", "reason", "given", "shapes", "dtypes")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **own}


def drawing_in(island: OnnxIsland) -> str:
    """Return the kind of node in an island that draws random numbers, an empty string where there is none."""
    return next((kind for kind in kinds_in(checked(island.content).graph) if kind in _RANDOM), "")


def _held(dtype: str) -> str:
    """Return the type in which the backend holds numbers of a type."""
    return _NARROWED.get(dtype, dtype) if keras.backend.backend() == "jax" else dtype


def _traced(tensors: Sequence[Any]) -> bool:
    import jax

    return any(isinstance(tensor, jax.core.Tracer) for tensor in tensors)


def _ends(values: Sequence[Any]) -> list[tuple[str, str, list[Any] | None]]:
    """Return name, NumPy type name and lengths of inputs or outputs; "" and None where nothing tells them."""
    from onnx import helper

    found = []
    for value in values:
        kind = value.type.tensor_type
        lengths = [
            n.dim_value if n.HasField("dim_value") else (n.dim_param or None) for n in kind.shape.dim
        ]  # fmt: skip
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name if kind.elem_type else ""
        except (KeyError, ValueError, TypeError):
            dtype = ""
        found.append((value.name, dtype, lengths if kind.HasField("shape") else None))
    return found


def _results(cut: Cut, model: Any, declared: Mapping[str, tuple[int, ...]]) -> list[tuple[str, list[Any]]]:
    """Return type and lengths of each result: by ONNX Runtime, by ONNX, by the file, at last by a run on zeros."""
    known = inferred(model).graph
    for value in known.output:
        if value.type.HasField("sequence_type") or value.type.HasField("optional_type"):
            raise UnsupportedModelError(f"`{value.name}` is a sequence or optional, which a Keras graph can't hold")
    runner = runner_of(cut.content, limit_s=LONGEST_TRIAL_S)
    names = {n for _, _, lengths in _ends(model.graph.input) for n in lengths or () if isinstance(n, str)}
    found: list[tuple[str, list[Any]]] = []
    tried: tuple[np.ndarray, ...] = ()
    for place, (name, dtype, lengths) in enumerate(_ends(known.output)):
        if isinstance(runner, OnnxRunner):
            dtype = np.dtype(runner.outputs[place].dtype).name
            lengths = list(runner.lengths[place]) or lengths  # it has no lengths for what it does not know
        if lengths is None and name in declared:
            lengths = [n if n > 1 else None for n in declared[name]]
        if lengths is None or not dtype:
            tried = tried or _on_zeros(runner, model)
            lengths, dtype = [None] * tried[place].ndim if lengths is None else lengths, tried[place].dtype.name
        if dtype not in _KINDS:
            raise UnsupportedModelError(f"`{name}` is of type {dtype}; only numbers are read")
        found.append((dtype, [n if isinstance(n, int) or n in names else None for n in lengths]))
    return found


_KINDS = {"float16", "float32", "float64", "bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))}


def _on_zeros(runner: Any, model: Any) -> tuple[np.ndarray, ...]:
    """Return what an island gives for zeros, open lengths being 1."""
    zeros = [
        np.zeros([n if isinstance(n, int) else 1 for n in lengths or ()], dtype)
        for _, dtype, lengths in _ends(model.graph.input)
    ]
    try:
        return tuple(runner.run(*zeros))
    except Exception as error:  # two runtimes, many ways
        text = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"nothing tells how many axes its results have: {text}") from None
