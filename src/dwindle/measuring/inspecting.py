"""What is in a file or model: parameters, bytes, bits, zeros and distinct values, operator by operator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import DataError
from dwindle.measuring.runners import is_onnx

# What makes packed weights ready for use.
_UNPACKING = ("DEQUANTIZE", "DENSIFY")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operator or layer.

    Attributes:
        index: Its number.
        op: Operator, such as ``CONV_2D``, or layer class.
        name: Output tensor or layer path.
        output_shape: Shape of its first output.
        parameters: Weights and biases.
        size_bytes: Bytes of its constants; one that several share is counted at the first.
        bits: Bits of one weight; 0 without weights.
        sparsity: Fraction of zero weights.
        distinct: Distinct values of the largest weight.
        layer: Name of the layer that it is, where the file tells; else as ``name``.
        weight_shape: Shape of the largest weight as it is stored; empty without weights.
    """

    index: int
    op: str
    name: str
    output_shape: tuple[int, ...]
    parameters: int
    size_bytes: int
    bits: int
    sparsity: float
    distinct: int
    layer: str = ""
    weight_shape: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        shapes = {"output_shape": list(self.output_shape), "weight_shape": list(self.weight_shape)}
        return {**asdict(self), **shapes}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A table of operators or layers, with totals.

    Attributes:
        rows: One for each operator or layer.
        size_bytes: Bytes of the file; of the weights for a model in memory.
        weights_bytes: Bytes of all constants.
        parameters: Weights and biases.
    """

    rows: tuple[Row, ...]
    size_bytes: int
    weights_bytes: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rest = {name: getattr(self, name) for name in ("size_bytes", "weights_bytes", "parameters")}
        return {"rows": [row.to_dict() for row in self.rows], **rest}


def inspect_file(path: str | Path) -> Inspection:
    """Return the operators of a ``.tflite`` or an ``.onnx``.

    Raises:
        DataError: If the file does not exist.
        UnsupportedModelError: If it is broken.
        MissingDependencyError: If it is an ``.onnx``, and the `onnx` package is not installed.
    """
    if is_onnx(path):
        return _inspect_onnx(Path(path))
    from dwindle.lifting.flatbuffer import layer_name, read_graph
    from dwindle.measuring.litert import read_content

    content = read_content(path)
    graph = read_graph(content)
    seen: set[int] = set()
    makers = {tensor.index: op for op in graph.operations for tensor in op.outputs}
    rows = []
    for operation in graph.operations:
        constants = []
        for tensor in operation.inputs if operation.name not in _UNPACKING else ():
            # Weights may be stored packed, behind such operators; they belong to the operator that uses them.
            while tensor is not None and tensor.value is None:
                maker = makers.get(tensor.index)
                if maker is None or maker.name not in _UNPACKING:
                    break
                tensor = maker.inputs[0]
            if tensor is not None and tensor.value is not None and tensor.buffer not in seen:
                seen.add(tensor.buffer)
                constants.append(tensor)
        numbers = [t for t in constants if t.dtype in (np.float32, np.float16, np.int8) or t.scale is not None]
        weight = max((t for t in numbers if t.value is not None), key=lambda t: t.value.size, default=None)  # type: ignore[union-attr]
        values = None if weight is None else np.asarray(weight.value)
        points = 0 if weight is None or weight.zero_point is None else int(weight.zero_point.reshape(-1)[0])
        rows.append(
            Row(
                index=operation.index, op=operation.name, name=operation.result,
                output_shape=operation.outputs[0].shape if operation.outputs else (),
                parameters=sum(int(np.prod(t.shape)) for t in numbers),
                size_bytes=sum(t.stored_bytes for t in constants),
                bits=0 if weight is None else weight.bits,
                sparsity=0.0 if values is None else float((values == points).mean()),
                distinct=0 if values is None else int(np.unique(values).size),
                layer=layer_name(operation), weight_shape=() if values is None else tuple(map(int, values.shape)),
            )
        )  # fmt: skip
    weights = sum(row.size_bytes for row in rows)
    parameters = sum(row.parameters for row in rows)
    return Inspection(rows=tuple(rows), size_bytes=len(content), weights_bytes=weights, parameters=parameters)


def _inspect_onnx(path: Path) -> Inspection:
    from dwindle.lifting.onnx.graph import read_graph
    from dwindle.measuring.onnx_runtime import content_of

    if not path.is_file():
        raise DataError(f"`{path}` can't be read: there is no such file; pass an .onnx file")
    graph = read_graph(path)
    seen: set[str] = set()
    rows = []
    for index, node in enumerate(graph.nodes):
        own = [name for name in node.inputs if name in graph.constants and name not in seen]
        seen.update(own)
        arrays = [graph.constants[name] for name in own if graph.constants[name].dtype != np.dtype(object)]
        numbers = [array for array in arrays if array.dtype.kind in "fV" or array.dtype.itemsize == 1]
        largest = max(numbers, key=lambda array: array.size, default=None)
        rows.append(
            Row(
                index=index, op=node.kind, name=node.name, output_shape=graph.shapes.get(node.outputs[0], ()),
                parameters=sum(array.size for array in numbers), size_bytes=sum(array.nbytes for array in arrays),
                layer=node.name, **_of_weight(largest),
            )
        )  # fmt: skip
    size, _ = content_of(path)
    return Inspection(
        rows=tuple(rows), size_bytes=size, weights_bytes=sum(row.size_bytes for row in rows),
        parameters=sum(row.parameters for row in rows),
    )  # fmt: skip


def inspect_model(model: Any) -> Inspection:
    """Return the layers of a `keras.Model`, those of nested models included, with transformed weights as they act."""
    import keras

    from dwindle.attaching import effective_weights
    from dwindle.weights import walk_layers

    effective = effective_weights(model)
    rows: list[Row] = []
    for path, layer in walk_layers(model):
        arrays = [np.asarray(keras.ops.convert_to_numpy(v)) for v in layer.weights if _is_own(layer, v)]
        acting = [value for (where, _), value in effective.items() if where == path]
        largest = max(acting or arrays, key=lambda array: array.size, default=None)
        shape = getattr(layer, "output", None)
        rows.append(
            Row(
                index=len(rows), op=type(layer).__name__, name=path,
                output_shape=tuple(1 if v is None else int(v) for v in getattr(shape, "shape", ())),
                parameters=sum(array.size for array in arrays),
                size_bytes=sum(array.nbytes for array in arrays),
                layer=path, **_of_weight(largest),
            )
        )  # fmt: skip
    weights = sum(row.size_bytes for row in rows)
    parameters = sum(row.parameters for row in rows)
    return Inspection(rows=tuple(rows), size_bytes=weights, weights_bytes=weights, parameters=parameters)


def _of_weight(weight: np.ndarray | None) -> dict[str, Any]:
    """Return the fields of a row that its largest weight tells."""
    if weight is None or weight.size == 0:
        return {"bits": 0, "sparsity": 0.0, "distinct": 0}
    return {
        "bits": weight.dtype.itemsize * 8, "sparsity": float((weight == 0).mean()),
        "distinct": int(np.unique(weight).size), "weight_shape": tuple(map(int, weight.shape)),
    }  # fmt: skip


def _is_own(layer: Any, variable: Any) -> bool:
    states = layer.__dict__.get("_dwindle_states", {})
    return all(variable is not v for stack in states.values() for state in stack for v in state.values())
