"""Building the ONNX graph of a LiteRT file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.exporting.onnx.operators import OPERATORS
from dwindle.exporting.onnx.values import Integers, Operand, Value, channels_first, plain_axes, type_number
from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, layer_name

#: Versions of the standard operator set that are written, and of the file format that goes with each: the older one
#: where it says everything, since ONNX Runtime 1.32 can't load some graphs of 8-bit integers in the newer one, which
#: has 16-bit and 4-bit QuantizeLinear.
OPSETS = {20: 9, 21: 10}
#: Name of the length of the first axis where it is open.
BATCH = "batch"
# Nodes that stand around the one that an operator is about, which has the layer's name.
_AROUND = {"Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Unsqueeze", "Squeeze",
           "Pad", "Slice"}  # fmt: skip
# Operators whose second operand is stored as int8 next to uint8 activations.
_WITH_KERNEL = {"CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}
# Operands that hold a shape, which the result's own says already; files that take any number of samples compute them.
_KNOWN = {"RESHAPE": (1,), "BROADCAST_TO": (1,), "TRANSPOSE_CONV": (0,)}


class Writer:
    """Walks a graph once and makes the ONNX nodes.

    Args:
        graph: The file's graph.
        open_batch: Whether the first axis takes any number of samples, rather than what the file says.
        layout: ``"NHWC"``, the file's own order of axes of inputs and outputs, or ``"NCHW"``: those with four axes or
            more have their channels second.
        away: Whether averages of integers round halves away from zero, as LiteRT does, rather than to even, as ONNX
            Runtime's kernel does.

    Attributes:
        operations: What is written of the file's operators.
        nodes: `onnx.NodeProto` in order.
        initializers: `onnx.TensorProto`.
        values: Activation or constant of each of the file's tensors, by number.
        notes: What the user should know.
        opset: Version of the operator set.
    """

    def __init__(self, graph: Graph, *, open_batch: bool, layout: str = "NHWC", away: bool = False) -> None:
        self.graph = graph
        self.away = away
        self.open_batch = open_batch
        self.layout = layout
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: dict[int, Operand] = {}
        self.notes: list[str] = []
        self.readers: dict[int, list[Operation]] = {}
        self.operations = needed(graph)
        for operation in self.operations:
            for tensor in operation.inputs:
                if tensor is not None:
                    self.readers.setdefault(tensor.index, []).append(operation)
        widths = {tensor.bits for tensor in graph.tensors if tensor.is_quantized}
        self._narrow = any(t.is_quantized and t.bits == 8 for operation in graph.operations for t in operation.outputs)
        self.opset = 21 if 16 in widths or (4 in widths and not self._narrow) else 20
        kernels = [operation.inputs[1] for operation in graph.operations if operation.name in _WITH_KERNEL]
        self._kernels = {tensor.index for tensor in kernels if tensor is not None}
        for operation in graph.operations:  # constants that are stored packed, whatever the order
            source = operation.inputs[0] if operation.inputs else None
            if operation.name in ("DEQUANTIZE", "DENSIFY") and source is not None and source.value is not None:
                self.values[operation.outputs[0].index] = source
        self._outputs = {tensor.index for tensor in graph.outputs}
        self._names: set[str] = set()
        self._node_names: set[str] = set()
        self._reserved = {_base(layer_name(operation)) for operation in graph.operations}
        self._layer = ""
        self._unused: list[str] = []
        self._cache: dict[Any, str] = {}
        self._ends: set[str] = set()

    def run(self) -> tuple[list[Any], list[Any]]:
        """Return descriptions of inputs and outputs.

        Raises:
            UnsupportedModelError: If an operator, or the way it is used, has no entry.
        """
        names = [self.unique(name) for name in self.graph.input_names]
        ends = [self.unique(name) for name in output_names(self.graph)]
        inputs = [self._input(tensor, name) for tensor, name in zip(self.graph.inputs, names, strict=True)]
        for operation in self.operations:
            self._operate(operation)
        self._layer, self._unused = "output", []
        outputs = [self._output(tensor, name) for tensor, name in zip(self.graph.outputs, ends, strict=True)]
        return inputs, outputs

    def _input(self, tensor: Tensor, name: str) -> Any:
        self._layer, self._unused = name, []
        order = self.order_outside(tensor)
        self.values[tensor.index] = self.rounded(Value(name, order), tensor)
        return self._described(tensor, name, order)

    def _output(self, tensor: Tensor, name: str) -> Any:
        order = self.order_outside(tensor)
        found = self.ordered(self.operand(tensor), order)
        if not self._renamed(found, name):
            self._add("Identity", [found], [name], {})
        return self._described(tensor, name, order)

    def order_outside(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the order of the axes of an input or output."""
        rank = len(tensor.shape)
        return channels_first(rank) if self.layout == "NCHW" and rank > 3 else plain_axes(rank)

    def _described(self, tensor: Tensor, name: str, order: Sequence[int]) -> Any:
        from onnx import helper

        lengths: list[Any] = list(tensor.shape)
        if self.open_batch and lengths[:1] == [1]:
            lengths[0] = BATCH
        return helper.make_tensor_value_info(name, type_of(tensor), [lengths[axis] for axis in order])

    def _renamed(self, old: str, new: str) -> bool:
        """Give the result of a node the name of an output; False for what is an input, a constant or an output."""
        maker = next((node for node in self.nodes if old in node.output), None)
        if maker is None or old in self._ends:
            return False
        self._ends.add(new)
        for node in self.nodes:
            node.output[:] = [new if name == old else name for name in node.output]
            node.input[:] = [new if name == old else name for name in node.input]
        for key, name in self._cache.items():
            if name == old:
                self._cache[key] = new
        for index, value in self.values.items():
            if isinstance(value, Value) and value.name == old:
                self.values[index] = Value(new, value.axes, value.rows, value.integers)
        return True

    def _operate(self, operation: Operation) -> None:
        self._layer = _base(layer_name(operation))
        self._unused = [self._layer]
        if operation.name not in OPERATORS:
            raise UnsupportedModelError(
                f"{operation.name} `{operation.outputs[0].name}` (layer `{self._layer}`) has no entry in the table of "
                "operators that are written as ONNX; export a .tflite, or replace the layer"
            )
        known = _KNOWN.get(operation.name, ())
        inputs = [
            None if tensor is None or place in known else self.operand(tensor)
            for place, tensor in enumerate(operation.inputs)
        ]
        try:
            results = OPERATORS[operation.name](self, operation, inputs)
        except UnsupportedModelError:
            raise
        except Exception as error:  # options or shapes that no converter writes
            text = " ".join(str(error).split())[:300]
            what = f"{operation.name} `{operation.outputs[0].name}`"
            raise UnsupportedModelError(f"{what} can't be written as ONNX: {type(error).__name__}: {text}") from error
        if not isinstance(results, Value | list):
            self.values[operation.outputs[0].index] = results
            return
        for tensor, value in zip(operation.outputs, results if isinstance(results, list) else [results], strict=True):
            self.values[tensor.index] = self.rounded(value, tensor)

    def operand(self, tensor: Tensor) -> Operand:
        """Return the activation or constant that a tensor of the file is.

        Raises:
            UnsupportedModelError: If nothing makes it.
        """
        if tensor.index in self.values:
            return self.values[tensor.index]
        if tensor.value is None:
            raise UnsupportedModelError(f"tensor `{tensor.name}` of the file is read but never made; it is damaged")
        return tensor

    def rounded(self, value: Value, tensor: Tensor) -> Value:
        """Return a float result as the file holds it: on the grid of its integers, if it has one.

        int8 becomes uint8, 128 higher, which stands for the same numbers: ONNX Runtime on x64 multiplies uint8 by int8,
        and turns one into the other only where a result has a single reader.
        """
        if not tensor.is_quantized or tensor.scale is None or tensor.zero_point is None:
            return value
        if tensor.scale.size != 1:
            raise UnsupportedModelError(f"activation `{tensor.name}` has {tensor.scale.size} scales; ONNX has one")
        scale = self.initializer(np.float32(tensor.scale.reshape(-1)[0]), "scale")
        steps = np.asarray(tensor.zero_point.reshape(-1)[0], tensor.dtype)
        point = self.initializer(_unsigned(steps) if steps.dtype == np.int8 else steps, "zero_point")
        if value.integers is not None and (value.integers.scale, value.integers.zero_point) == (scale, point):
            return value
        integers = self.node("QuantizeLinear", [value.name, scale, point])
        name = self.node("DequantizeLinear", [integers, scale, point])
        return Value(name, value.axes, value.rows, Integers(name=integers, scale=scale, zero_point=point))

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one result and return the result's name."""
        return self.several(kind, inputs, 1, **attributes)[0]

    def several(self, kind: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add a node with several results and return their names."""
        about = bool(self._unused) and kind not in _AROUND
        name = self._unused.pop() if about else f"{self._layer}_{kind.lower()}"
        outputs = [self.unique(name if count == 1 else f"{name}_{number}") for number in range(count)]
        self._add(kind, inputs, outputs, attributes, self._node_name(name, reserved=about))
        return outputs

    def _add(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, Any], name: str = ""
    ) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name or outputs[0], **attributes))

    def _node_name(self, wanted: str, *, reserved: bool) -> str:
        """Return a name that no node has yet; a layer's own only where that layer asks for it."""
        found, count = wanted, 0
        while found in self._node_names or (found in self._reserved and not (reserved and count == 0)):
            count += 1
            found = f"{wanted}_{count}"
        self._node_names.add(found)
        return found

    def unique(self, wanted: str) -> str:
        """Return a name that no tensor has yet."""
        found, count = wanted, 0
        while found in self._names:
            count += 1
            found = f"{wanted}_{count}"
        self._names.add(found)
        return found

    def initializer(self, array: np.ndarray | np.generic, hint: str, *, bits: int = 0) -> str:
        """Return the name of a constant, the same one for equal small arrays.

        Args:
            array: Its value.
            hint: What it is, for its name.
            bits: 4 stores two values in a byte.
        """
        from onnx import TensorProto, helper, numpy_helper

        array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        key = (array.dtype.str, array.shape, bits, array.tobytes()) if array.size <= 1024 else None
        if key in self._cache:
            return self._cache[key]
        name = self.unique(f"{self._layer}_{hint}")
        if bits == 4:
            flat = np.pad(array.reshape(-1), (0, array.size % 2)).astype(np.uint8) & 15
            packed = (flat[::2] | flat[1::2] << 4).tobytes()
            made = helper.make_tensor(name, TensorProto.INT4, array.shape, packed, raw=True)
        else:
            made = numpy_helper.from_array(array, name)
        self.initializers.append(made)
        if key is not None:
            self._cache[key] = name
        return name

    def numbers(self, values: Sequence[int], hint: str = "axes") -> str:
        """Return the name of a list of integers."""
        return self.initializer(np.array(values, np.int64), hint)

    def samples_axis(self, shape: Sequence[int]) -> int:
        """Return the axis of a tensor of the file that has the samples: the first one, or the first of length 1.

        In files of one sample some operators move that axis; whether the guess is right is seen when the file runs.
        """
        return list(shape).index(1) if 1 in shape else 0

    def lengths(self, shape: Sequence[int]) -> list[int]:
        """Return a shape for a reshape: the first length follows from the others where it is open."""
        return [-1, *shape[1:]] if self.open_batch and shape else list(shape)

    def constant(
        self, tensor: Tensor, order: Sequence[int] | None = None, *, rank: int | None = None,
        columns: np.ndarray | None = None,
    ) -> str:  # fmt: skip
        """Return the name of a constant of the file, its integers with the scales that make them floats.

        Args:
            tensor: The constant.
            order: The axes in their new order; None: as they are.
            rank: Axes of length 1 are put in front up to this number, before they are ordered.
            columns: New order of the last axis' entries, before the axes are ordered.
        """
        key = (tensor.index, tuple(order or ()), rank, None if columns is None else columns.tobytes())
        if key not in self._cache:
            value = np.asarray(tensor.value)
            value = value if columns is None else value[..., columns]
            more = max((rank or 0) - value.ndim, 0)
            value, axis = value.reshape((1,) * more + value.shape), tensor.axis + more
            if order is not None:
                value, axis = value.transpose(order), list(order).index(axis) if axis < len(order) else 0
            self._cache[key] = self._stored(tensor, value, axis)
        return self._cache[key]

    def _stored(self, tensor: Tensor, value: np.ndarray, axis: int) -> str:
        if tensor.block:
            raise UnsupportedModelError(
                f"constant `{tensor.name}` has scales in blocks of {tensor.block}, which are not written as ONNX; "
                "use a scheme with one scale for each channel"
            )
        if tensor.dtype == np.void:
            raise UnsupportedModelError(f"constant `{tensor.name}` has a type that is not written as ONNX")
        if value.dtype == np.float16:
            return self.node("Cast", [self.initializer(value, "float16")], to=type_number(np.float32))
        if tensor.scale is None or tensor.zero_point is None or value.dtype.kind == "f":
            return self.initializer(value, "constant")
        points = np.ravel(tensor.zero_point)
        if value.dtype == np.int64:  # biases of 16-bit operators; DequantizeLinear takes 32 bits at most
            shape = [-1 if k == axis and tensor.scale.size > 1 else 1 for k in range(value.ndim)]
            scale, point = tensor.scale.reshape(shape), points.reshape(shape if points.size > 1 else [1] * value.ndim)
            return self.initializer(((value.astype(np.float64) - point) * scale).astype(np.float32), "constant")
        several = tensor.scale.size > 1
        scale = np.asarray(tensor.scale, np.float32)
        scale = scale if several else scale.reshape(-1)[0]
        point = np.broadcast_to(points if several else points[0], np.shape(scale)).astype(value.dtype)
        if value.dtype == np.int8 and self._narrow and not several and tensor.index not in self._kernels:
            value, point = _unsigned(value), _unsigned(point)
        bits = 4 if tensor.bits == 4 and self.opset == 21 and not point.any() else 0
        names = [self.initializer(value, "integers", bits=bits), self.initializer(scale, "scale")]
        if not bits:
            names.append(self.initializer(point, "zero_point"))
        return self.node("DequantizeLinear", names, **({"axis": axis} if several else {}))

    def ordered(self, operand: Operand, order: Sequence[int]) -> str:
        """Return the name of an operand with the file's axes in the given order; a transpose is shared."""
        if not isinstance(operand, Value):
            return self.constant(operand, None if list(order) == sorted(order) else order)
        if operand.axes == tuple(order):
            return operand.name
        key = ("ordered", operand.name, tuple(order))
        if key not in self._cache:
            places = [operand.axes.index(axis) for axis in order]
            moved, steps = self.node("Transpose", [operand.name], perm=places), operand.integers
            if steps is not None:  # runtimes look for an operator between integers
                grid = [steps.scale, steps.zero_point]
                moved = self.node("DequantizeLinear", [self.node("QuantizeLinear", [moved, *grid]), *grid])
            self._cache[key] = moved
        return self._cache[key]

    def plain(self, operand: Operand) -> str:
        """Return the name of an operand with its axes as in the file."""
        return self.ordered(operand, plain_axes(operand.rank if isinstance(operand, Value) else len(operand.shape)))

    def scalar(self, tensor: Tensor) -> str:
        """Return the name of a constant with one entry, without axes, which broadcasts against anything."""
        key = ("scalar", tensor.index)
        if key not in self._cache:
            self._cache[key] = self._stored(tensor, np.asarray(tensor.value).reshape(()), 0)
        return self._cache[key]

    def moving(self, operand: Operand) -> Value:
        """Return an operand as an activation, also where it is a constant."""
        return operand if isinstance(operand, Value) else Value(self.plain(operand), plain_axes(len(operand.shape)))

    def feeds_only(self, tensor: Tensor, kinds: set[str]) -> bool:
        """Return whether a tensor is no output, and only the first operand of some operators with constant weights."""
        readers = self.readers.get(tensor.index, [])
        return tensor.index not in self._outputs and all(
            reader.name in kinds and reader.inputs[0] is tensor and self._is_constant(reader.inputs[1])
            for reader in readers
        )  # fmt: skip

    def combined_only(self, tensor: Tensor, kinds: Collection[str], rank: int) -> bool:
        """Return whether a tensor is no output, and all that reads it are some operators with results of a rank."""
        readers = self.readers.get(tensor.index, [])
        fits = all(reader.name in kinds and len(reader.outputs[0].shape) == rank for reader in readers)
        return fits and tensor.index not in self._outputs

    def _is_constant(self, tensor: Tensor | None) -> bool:
        return tensor is not None and (tensor.value is not None or isinstance(self.values.get(tensor.index), Tensor))


def needed(graph: Graph) -> list[Operation]:
    """Return the operators whose results somebody reads, other than to know a shape."""
    wanted = {tensor.index for tensor in graph.outputs}
    found = []
    for operation in reversed(graph.operations):
        if wanted.isdisjoint(tensor.index for tensor in operation.outputs):
            continue
        found.append(operation)
        known = _KNOWN.get(operation.name, ())
        wanted.update(t.index for place, t in enumerate(operation.inputs) if t is not None and place not in known)
    return found[::-1]


def output_names(graph: Graph) -> list[str]:
    """Return the outputs' names, without the numbers that keep the order of several in a ``.tflite``."""
    found = [re.fullmatch(r"output_(\d\d)_(.+)", name) for name in graph.output_names]
    names = [match[2] for match in found if match is not None and match[1].isdigit()]
    numbered = len(names) == len(found) > 1 and len(set(names)) == len(names)
    return names if numbered else list(graph.output_names)


def type_of(tensor: Tensor) -> int:
    """Return ONNX's number of the type that a tensor of the file has in ONNX: float32 for integers with a scale."""
    if tensor.dtype == np.void:
        raise UnsupportedModelError(f"tensor `{tensor.name}` has a type that is not written as ONNX")
    return type_number(np.float32 if tensor.is_quantized else tensor.dtype)


def _unsigned(value: np.ndarray) -> np.ndarray:
    """Return int8 as uint8, 128 higher."""
    return np.asarray(value.astype(np.int16) + 128, np.uint8)


def _base(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-") or "node"
