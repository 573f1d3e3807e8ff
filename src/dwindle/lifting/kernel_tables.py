"""What LiteRT's own 8-bit kernels give for every input there is, so that the simulation can look it up."""

from __future__ import annotations

import base64
import copy
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import Operation, parse, serialize
from dwindle.lifting.grids import Grid

# Operators that compute each output from one entry of each input. Their kernels interpolate, use fixed-point factors or
# round twice, each in its own way.
TABLED = {"HARD_SWISH", "LOGISTIC", "TANH", "GELU", "ELU", "LEAKY_RELU", "EXP", "LOG", "SQRT", "RSQRT", "ABS", "NEG",
          "SIN", "COS", "SQUARE", "SQUARED_DIFFERENCE", "DIV", "MAXIMUM", "MINIMUM"}  # fmt: skip


class KernelTables:
    """Makes the tables of a file's operators.

    Args:
        content: The float file.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._model: Any = None

    def table(self, operation: Operation, inputs: Sequence[Grid], output: Grid) -> np.ndarray | None:
        """Run an operator alone, in 8 bits, on every combination of inputs.

        Args:
            operation: One of the file's, with one or two inputs.
            inputs: Their grids.
            output: Grid of the output.

        Returns:
            The output for each input, of shape ``(256,) * len(inputs)``, int8; None if LiteRT has no such kernel.
        """
        from ai_edge_litert.interpreter import Interpreter

        from dwindle.measuring.litert import quiet_stderr

        codes = np.arange(-128, 128, dtype=np.int8)
        arrays = [grid.reshape(1, -1) for grid in np.meshgrid(*[codes] * len(inputs), indexing="ij")]
        content = self._alone(operation, inputs, output, arrays[0].shape)
        try:
            with quiet_stderr():
                interpreter = Interpreter(model_content=content, num_threads=1)
                interpreter.allocate_tensors()
                for details, array in zip(interpreter.get_input_details(), arrays, strict=True):
                    interpreter.set_tensor(details["index"], array)
                interpreter.invoke()
        except (RuntimeError, ValueError):
            return None
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        return np.asarray(found, np.int8).reshape((256,) * len(inputs))

    def _alone(self, operation: Operation, inputs: Sequence[Grid], output: Grid, shape: tuple[int, ...]) -> bytes:
        if self._model is None:
            self._model = parse(self._content)
        whole = self._model
        model, graph = schema.ModelT(), schema.SubGraphT()
        found = copy.deepcopy(whole.subgraphs[0].operators[operation.index])
        code = copy.deepcopy(whole.operatorCodes[found.opcodeIndex])
        found.opcodeIndex = 0
        found.inputs = np.arange(len(inputs), dtype=np.int32)
        found.outputs = np.array([len(inputs)], np.int32)
        graph.tensors = [_tensor(number, grid, shape) for number, grid in enumerate((*inputs, output))]
        graph.operators, graph.inputs, graph.outputs = [found], found.inputs, found.outputs
        model.version, model.subgraphs, model.operatorCodes, model.buffers = 3, [graph], [code], [schema.BufferT()]
        return serialize(model)


def _tensor(number: int, grid: Grid, shape: tuple[int, ...]) -> Any:
    tensor, quantization = schema.TensorT(), schema.QuantizationParametersT()
    quantization.scale = np.array([grid.scale], np.float32)
    quantization.zeroPoint = np.array([grid.zero_point], np.int64)
    tensor.name, tensor.shape, tensor.type = f"t{number}", np.array(shape, np.int32), schema.TensorType.INT8
    tensor.buffer, tensor.quantization = 0, quantization
    return tensor


@keras.saving.register_keras_serializable("dwindle")
class ByTable(keras.layers.Layer):
    """Outside training, give what LiteRT's 8-bit kernel gives; in training, the float result that is passed along.

    Args:
        table: The table's bytes, compressed with zlib, in base64.
        scales: Scale of each operand, then of the result.
        zero_points: Their zero points.
    """

    def __init__(self, *, table: str, scales: Sequence[float], zero_points: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table
        self.scales = tuple(scales)
        self.zero_points = tuple(zero_points)

    @classmethod
    def of(cls, table: np.ndarray, inputs: Sequence[Grid], output: Grid, **kwargs: Any) -> ByTable:
        """Make the layer of a table from `KernelTables`."""
        text = base64.b64encode(zlib.compress(table.tobytes(), 9)).decode("ascii")
        grids = (*inputs, output)
        return cls(table=text, scales=[g.scale for g in grids], zero_points=[g.zero_point for g in grids], **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the last of ``inputs`` in training, else what the table says for the others (on their grids)."""
        *operands, result = inputs
        if training:
            return result
        ops = keras.ops
        index: Any = 0
        for value, scale, point in zip(operands, self.scales, self.zero_points, strict=False):
            code = ops.clip(ops.round(ops.cast(value, "float32") / scale) + (point + 128), 0, 255)
            index = index * 256 + ops.cast(code, "int32")
        codes = np.frombuffer(zlib.decompress(base64.b64decode(self.table)), np.int8).astype(np.float32)
        values = (codes - self.zero_points[-1]) * np.float32(self.scales[-1])
        return ops.take(ops.convert_to_tensor(values), index, axis=0)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the result's shape."""
        return input_shape[-1]

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        own = {"table": self.table, "scales": list(self.scales), "zero_points": list(self.zero_points)}
        return {**super().get_config(), **own}
