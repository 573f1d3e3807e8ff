"""Frozen islands: operators that have no entry run in the LiteRT interpreter, inside the Keras model."""

from __future__ import annotations

import base64
import copy
import warnings
from typing import Any

import keras
import numpy as np

from dwindle.lifting.flatbuffer import Graph, Operation, check_structure, parse, serialize


def cut_out(content: bytes, operation: Operation) -> bytes:
    """Return a file that holds one operator of another file, its constants inside.

    Args:
        content: The whole file.
        operation: One of its operators; its activations become the file's inputs and outputs.
    """
    model = copy.copy(parse(content))
    main = copy.copy(model.subgraphs[0])
    found = copy.deepcopy(main.operators[operation.index])
    used = [t.index for t in (*operation.inputs, *operation.outputs) if t is not None]
    numbers = {old: new for new, old in enumerate(dict.fromkeys(used))}
    tensors, buffers = [], [model.buffers[0]]
    for old in numbers:
        tensor = copy.deepcopy(main.tensors[old])
        tensor.shapeSignature = None
        data = model.buffers[main.tensors[old].buffer]
        if data.data is None or len(data.data) == 0:
            tensor.buffer = 0
        else:
            buffers.append(data)
            tensor.buffer = len(buffers) - 1
        tensors.append(tensor)
    found.inputs = np.array([numbers.get(i, -1) for i in found.inputs], np.int32)
    found.outputs = np.array([numbers[i] for i in found.outputs], np.int32)
    main.tensors, main.operators = tensors, [found]
    activations = dict.fromkeys(t.index for t in operation.inputs if t is not None and t.value is None)
    main.inputs = np.array([numbers[i] for i in activations], np.int32)
    main.outputs = np.array([numbers[t.index] for t in operation.outputs], np.int32)
    # Other subgraphs stay: the bodies of control flow are called by number.
    model.subgraphs = [main, *model.subgraphs[1:]]
    if len(model.subgraphs) == 1:
        model.buffers = buffers
    else:
        for tensor, old in zip(tensors, numbers, strict=True):
            tensor.buffer = parse(content).subgraphs[0].tensors[old].buffer
    model.signatureDefs = None
    model.metadata = None
    return serialize(model)


def compute_constant(content: bytes, operation: Operation) -> list[np.ndarray]:
    """Return what an operator all of whose inputs are constants computes."""
    return _Runner(cut_out(content, operation)).run([])


class _Runner:
    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        from dwindle.measuring.litert import quiet_stderr

        check_structure(content)

        with warnings.catch_warnings(), quiet_stderr():
            warnings.simplefilter("ignore", UserWarning)
            self._interpreter = Interpreter(
                model_content=content, num_threads=1,
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )  # fmt: skip
            self._interpreter.allocate_tensors()
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        for details, array in zip(self._inputs, arrays, strict=True):
            value = np.ascontiguousarray(array, details["dtype"]).reshape(details["shape"])
            self._interpreter.set_tensor(details["index"], value)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(details["index"]) for details in self._outputs]


@keras.saving.register_keras_serializable("dwindle")
class Island(keras.layers.Layer):
    """One operator of a LiteRT file, run by the interpreter sample by sample; no gradient passes.

    Args:
        operator: The operator's name.
        file: The file that holds it, base64.
        shapes: Shape of each output, without the sample axis.
        dtypes: NumPy type name of each output.
        name: The layer's name.
    """

    def __init__(
        self, *, operator: str, file: str, shapes: list[list[int]], dtypes: list[str], name: str | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(name=name, **{**kwargs, "trainable": False})
        self.operator = operator
        self.file = file
        self.shapes = [list(shape) for shape in shapes]
        self.dtypes = list(dtypes)
        self.supports_jit = False
        self._runners: list[_Runner] = []

    @classmethod
    def of(cls, content: bytes, operation: Operation, shapes: list[list[int]], **kwargs: Any) -> Island:
        """Make the island of one operator of a file."""
        dtypes = [np.dtype(tensor.dtype).name for tensor in operation.outputs]
        file = base64.b64encode(cut_out(content, operation)).decode("ascii")
        return cls(operator=operation.name, file=file, shapes=shapes, dtypes=dtypes, **kwargs)

    def _run(self, *arrays: Any) -> list[np.ndarray]:
        if not self._runners:
            self._runners.append(_Runner(base64.b64decode(self.file)))
        values = [np.asarray(array) for array in arrays]
        samples = [self._runners[0].run([value[i] for value in values]) for i in range(len(values[0]))]
        return [
            np.asarray([sample[number] for sample in samples], dtype).reshape((len(samples), *shape))
            for number, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True))
        ]

    def call(self, inputs: Any) -> Any:
        """Return the operator's outputs, a list where it has several."""
        tensors = [keras.ops.stop_gradient(tensor) for tensor in keras.tree.flatten(inputs)]
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            results = tf.numpy_function(self._run, tensors, [tf.as_dtype(dtype) for dtype in self.dtypes])
            results = results if isinstance(results, list) else [results]
            for result, shape in zip(results, self.shapes, strict=True):
                result.set_shape([tensors[0].shape[0], *shape])
        elif backend == "jax":
            import jax  # type: ignore[import-not-found]

            count = tensors[0].shape[0]
            kinds = [jax.ShapeDtypeStruct((count, *s), d) for s, d in zip(self.shapes, self.dtypes, strict=True)]
            results = jax.pure_callback(lambda *arrays: self._run(*arrays), kinds, *tensors)
        else:
            arrays = [keras.ops.convert_to_numpy(tensor) for tensor in tensors]
            results = [keras.ops.convert_to_tensor(array) for array in self._run(*arrays)]
        return results[0] if len(results) == 1 else list(results)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the outputs' shapes and types."""
        count = keras.tree.flatten(inputs)[0].shape[0]
        found = [
            keras.KerasTensor((count, *shape), dtype=dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return found[0] if len(found) == 1 else found

    def get_config(self) -> dict[str, Any]:
        """Return the operator and its file."""
        own = {"operator": self.operator, "file": self.file, "shapes": self.shapes, "dtypes": self.dtypes}
        return {**super().get_config(), **own}


def dead_ends(graph: Graph) -> set[int]:
    """Return the numbers of operators whose results reach no output."""
    needed = {tensor.index for tensor in graph.outputs}
    dead = set()
    for operation in reversed(graph.operations):
        if any(tensor.index in needed for tensor in operation.outputs):
            needed |= {tensor.index for tensor in operation.inputs if tensor is not None}
        else:
            dead.add(operation.index)
    return dead
