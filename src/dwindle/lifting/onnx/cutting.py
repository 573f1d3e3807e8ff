"""Cutting nodes out of an ONNX graph, as a file of their own with their constants inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.onnx.folding import LARGEST_RESULT
from dwindle.lifting.onnx.graph import Graph, Node, graphs_of, read_by, read_graph, require_onnx
from dwindle.lifting.onnx.sizes import Size
from dwindle.lifting.onnx.values import Moving


@dataclass(frozen=True)
class Cut:
    """Nodes that became a file.

    Attributes:
        content: Its bytes.
        inputs: Names of the tensors that it takes, those that its branches and bodies read among them.
        outputs: Names of the tensors that it gives.
    """

    content: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut_out(
    nodes: Sequence[Node],
    values: Mapping[str, Any],
    outputs: Sequence[str],
    graph: Graph,
    types: Mapping[str, int],
) -> Cut:
    """Return a file that holds some nodes of a graph.

    Args:
        nodes: The nodes, each after those that it reads.
        values: What is known of each tensor that they read: `Moving`, or an array.
        outputs: Names of those of their results that are wanted.
        graph: The graph, for the versions of its operator sets.
        types: ONNX's number of the type of each tensor, as far as it is known.

    Raises:
        UnsupportedModelError: If they read a sequence, or a length that nothing tells.
    """
    from onnx import ValueInfoProto, helper

    made = {name for node in nodes for name in node.outputs}
    cutting = _Cutting(values, types)
    for node in nodes:
        for name in sorted(read_by(node) - made):
            cutting.read(name, f"{node.kind} `{node.name}`")
    messages = [node.proto for node in nodes]
    body = helper.make_graph(
        [*cutting.nodes, *messages], "island", list(cutting.inputs.values()),
        [ValueInfoProto(name=name) for name in outputs], cutting.constants,
    )  # fmt: skip
    domains = {"", *_domains(messages)}
    opsets = [helper.make_opsetid(domain, graph.opsets.get(domain, 1)) for domain in sorted(domains)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=graph.ir_version)
    return Cut(model.SerializeToString(deterministic=True), tuple(cutting.inputs), tuple(outputs))


class _Cutting:
    """Collects what nodes read: tensors as inputs, arrays as constants, and lengths as nodes that compute them."""

    def __init__(self, values: Mapping[str, Any], types: Mapping[str, int]) -> None:
        self.values = values
        self.types = types
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: dict[str, Any] = {}
        self._known: set[str] = set()

    def read(self, name: str, what: str) -> None:
        """Make a tensor available under its name."""
        from onnx import numpy_helper

        if name in self._known:
            return
        self._known.add(name)
        value = self.values.get(name)
        if value is None:
            raise UnsupportedModelError(f"`{name}` is read but never made; the file is damaged")
        if isinstance(value, Moving):
            self._take(name, value)
        elif not isinstance(value, np.ndarray):
            raise UnsupportedModelError(f"{what} reads a sequence, which a Keras graph can't hold")
        elif any(isinstance(n, Size) for n in value.ravel()):
            self._compute(name, value, what)
        else:
            self.constants.append(numpy_helper.from_array(value, name))

    def _take(self, name: str, value: Moving) -> None:
        from onnx import helper

        if name not in self.inputs:
            number = self.types.get(name) or helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
            lengths = [int(n) if isinstance(n, int) else str(n) for n in value.sizes]
            self.inputs[name] = helper.make_tensor_value_info(name, number, lengths)
            self._known.add(name)

    def _compute(self, name: str, value: np.ndarray, what: str) -> None:
        """Add nodes that compute an array of lengths from the tensors that have them."""
        parts = []
        for place, entry in enumerate(value.ravel()):
            part = self._constant(f"{name}/{place}", [entry.factor.numerator if isinstance(entry, Size) else entry])
            for k, symbol in enumerate(entry.names if isinstance(entry, Size) else ()):
                part = self._node("Mul", [part, self._length(symbol, what)], f"{name}/{place}/{k}")
            if isinstance(entry, Size) and entry.factor.denominator != 1:
                below = self._constant(f"{name}/{place}/below", [entry.factor.denominator])
                part = self._node("Div", [part, below], f"{name}/{place}/whole")
            parts.append(part)
        flat = self._node("Concat", parts, f"{name}/flat", axis=0)
        self._node("Reshape", [flat, self._constant(f"{name}/shape", list(value.shape))], name)

    def _length(self, symbol: str, what: str) -> str:
        """Return the name of a vector that holds the length with a symbol."""
        wanted = Size(1, (symbol,))  # type: ignore[arg-type]
        for name, value in self.values.items():
            if isinstance(value, Moving) and wanted in value.sizes:
                axis, found = value.sizes.index(wanted), f"length {symbol}"
                if found not in self._known:
                    self._known.add(found)
                    self._take(name, value)
                    shape = self._node("Shape", [name], f"{found}/shape")
                    self._node("Gather", [shape, self._constant(f"{found}/axis", [axis])], found, axis=0)
                return found
        raise UnsupportedModelError(f"{what} reads the length `{symbol}`, which no tensor has")

    def _constant(self, name: str, numbers: Sequence[Any]) -> str:
        from onnx import numpy_helper

        if any(isinstance(n, float) and n != int(n) for n in numbers):
            raise UnsupportedModelError(f"`{name}` is a part of a length")
        self.constants.append(numpy_helper.from_array(np.array([int(n) for n in numbers], np.int64), name))
        return name

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def kinds_in(graph: Any) -> Iterator[str]:
    """Yield the kind of each node of an ONNX graph, those of branches and bodies too."""
    for message in graph.node:
        yield message.op_type
        for inner in graphs_of(message):
            yield from kinds_in(inner)


def _domains(messages: Sequence[Any]) -> Iterator[str]:
    for message in messages:
        yield "" if message.domain == "ai.onnx" else message.domain
        for graph in graphs_of(message):
            yield from _domains(graph.node)


def checked(content: bytes) -> Any:
    """Return the `onnx.ModelProto` of an island, after the checks that every file goes through.

    Raises:
        UnsupportedModelError: If it is damaged, wants other files, or holds a result as large as the memory.
    """
    onnx = require_onnx()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:
        raise UnsupportedModelError("an island's bytes are no ONNX file; the file that holds it is damaged") from None
    read_graph(model)
    _check_sizes(model)
    return model


def _check_sizes(model: Any) -> None:
    """Refuse results that are known to fill the memory, also those of branches and bodies."""
    for value in _described(inferred(model).graph):
        entries = prod(n.dim_value for n in value.type.tensor_type.shape.dim)
        if entries > LARGEST_RESULT:
            raise UnsupportedModelError(
                f"`{value.name}` would have {entries} entries; the largest result of an island is {LARGEST_RESULT}"
            )


def inferred(model: Any) -> Any:
    """Return a model with the types and shapes that ONNX infers; as it is where that fails."""
    from onnx import shape_inference

    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # what runs it says what is wrong
        return model


def _described(graph: Any) -> Iterator[Any]:
    yield from (*graph.value_info, *graph.output)
    for message in graph.node:
        for inner in graphs_of(message):
            yield from _described(inner)


def types_of(model: Any) -> dict[str, int]:
    """Return ONNX's number of the type of each tensor of a model, as far as it can be inferred.

    Args:
        model: An `onnx.ModelProto`; it is copied without the bytes of its constants.
    """
    from onnx import TensorProto

    bare = type(model)()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    for name in ("node", "input", "output", "value_info"):
        getattr(bare.graph, name).extend(getattr(model.graph, name))
    for tensor in model.graph.initializer:
        bare.graph.initializer.append(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    values = (*bare.graph.input, *_described(inferred(bare).graph))
    return {v.name: v.type.tensor_type.elem_type for v in values if v.type.tensor_type.elem_type}
