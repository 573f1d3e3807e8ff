"""Reading an ONNX file without trusting it, into nodes and constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import MissingDependencyError, UnsupportedModelError

_LARGEST_FILE = 2**31 - 1  # what a protobuf message can hold
_LARGEST_CONSTANT = 2**33
_DEEPEST = 50  # branches and bodies in each other


@dataclass(eq=False)
class Node:
    """One operator.

    Attributes:
        kind: Its name, such as ``Conv``; those of other domains as ``domain::name``.
        name: A name for its layer.
        inputs: Names of its inputs, "" for those left out.
        outputs: Names of its outputs.
        attributes: Its attributes; tensors as arrays, graphs as protobuf messages.
        version: The operator set's version.
        proto: The message that it was read from.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    version: int
    proto: Any

    @property
    def stands_for_several(self) -> bool:
        """Whether it is in the place of several nodes of the file, so that its message is another one's."""
        return self.inputs != tuple(self.proto.input)


@dataclass(eq=False)
class Graph:
    """What a file holds.

    Attributes:
        name: The graph's name.
        nodes: Operators, each after those that it reads.
        constants: Arrays by name.
        inputs: Name, shape (None for an open length, or its name) and NumPy type name.
        outputs: Names.
        version: Version of the standard operator set.
        shapes: Shapes of results as far as the file tells, 1 for open lengths.
        opsets: Version of each operator set, "" for the standard one.
        ir_version: Version of the file format.
        message: The `onnx.ModelProto`, its functions inlined; of a file, without the bytes of the constants.
    """

    name: str
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    inputs: list[tuple[str, tuple[Any, ...], str]]
    outputs: list[str]
    version: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    ir_version: int = 8
    message: Any = None


def require_onnx() -> Any:
    """Return the `onnx` package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError(
            "ONNX files need the `onnx` package; install it with pip install 'dwindle[onnx]'"
        ) from None
    return onnx


def read_graph(source: Any) -> Graph:
    """Return the graph of a file or of an `onnx.ModelProto`.

    External data is read from files next to the model, never from elsewhere.

    Raises:
        UnsupportedModelError: If the file is damaged, or its graph is no graph.
    """
    folder = None
    if isinstance(source, str | Path):
        folder, what = Path(source).parent, f"`{source}`"
        model = _parsed(Path(source))
    else:
        require_onnx()
        model, what = source, "the model"
    if not model.graph.node and not model.graph.output:
        raise UnsupportedModelError(f"{what} is no ONNX file, or a damaged one; export it again")
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", 1))
    graph = model.graph
    for message in graph.node:
        for inner in graphs_of(message):
            _check_inside(inner)
    constants = _constants(graph, folder)
    if folder is not None:  # it is nobody else's
        model = _without_bytes(model)
        graph = model.graph
    inputs = [
        (value.name, *_described(value)) for value in graph.input if value.name not in constants
    ]  # fmt: skip
    nodes = _ordered(list(_nodes(graph, version)), {*constants, *(name for name, _, _ in inputs)})
    shapes = {
        value.name: tuple(max(1, n.dim_value) for n in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.output)
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape")
    }
    return Graph(
        graph.name, nodes, constants, inputs, [value.name for value in graph.output], version, shapes,
        opsets={**versions, "": version}, ir_version=model.ir_version or 8, message=model,
    )  # fmt: skip


def _parsed(path: Path) -> Any:
    """Return the message in a file, its external data left where it is."""
    onnx = require_onnx()
    if path.stat().st_size > _LARGEST_FILE:
        raise UnsupportedModelError(f"`{path}` has {path.stat().st_size} bytes, more than an ONNX file can have")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:
        raise UnsupportedModelError(f"`{path}` is no ONNX file, or a damaged one; export it again") from None
    return model


def _without_bytes(model: Any) -> Any:
    """Return a message without the bytes of its constants, which were copied; the memory of the one given is free."""
    for tensor in model.graph.initializer:
        for kind, _ in tensor.ListFields():
            if kind.name.endswith("_data"):
                tensor.ClearField(kind.name)
    bare = type(model)()
    bare.ParseFromString(model.SerializeToString())
    return bare


def external_files(path: Path) -> list[Path]:
    """Return the files with a model's external data, all of them in its folder."""
    from onnx import TensorProto

    names = {
        entry.value
        for tensor in _parsed(path).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [_inside(path.parent, name, f"`{path}`") for name in sorted(names)]


def _inside(folder: Path, location: str, what: str) -> Path:
    path = (folder / location).resolve()
    if not location or not path.is_relative_to(folder.resolve()) or (folder / location).is_symlink():
        raise UnsupportedModelError(f"{what} wants the file `{location}`, outside the model's folder; it is not read")
    if not path.is_file():
        raise UnsupportedModelError(f"{what} lies in `{path}`, which does not exist; put it next to the model")
    return path


def graphs_of(message: Any) -> Iterator[Any]:
    """Yield the graphs in a node's attributes."""
    for attribute in message.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_inside(graph: Any, depth: int = 0) -> None:
    """Check the constants in a branch or a body, which runtimes read by themselves."""
    if depth > _DEEPEST:
        raise UnsupportedModelError(f"branches lie more than {_DEEPEST} deep in each other; the file is damaged")
    _constants(graph, None)
    for message in graph.node:
        for attribute in message.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise UnsupportedModelError(f"`{message.name}` has a sparse constant; export the model with dense ones")
            for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
                array_of(tensor, None)
        for inner in graphs_of(message):
            _check_inside(inner, depth + 1)


def subgraph(message: Any, version: int) -> tuple[list[Node], dict[str, np.ndarray], list[str]]:
    """Return nodes, constants and outputs of a branch."""
    return list(_nodes(message, version)), _constants(message, None), [value.name for value in message.output]


def _constants(graph: Any, folder: Path | None) -> dict[str, np.ndarray]:
    if graph.sparse_initializer:
        raise UnsupportedModelError("sparse initializers are not read; export the model with dense ones")
    return {tensor.name: array_of(tensor, folder) for tensor in graph.initializer}


def array_of(tensor: Any, folder: Path | None) -> np.ndarray:
    """Return a constant, after a check that its bytes are there.

    Raises:
        UnsupportedModelError: If they are not, or lie outside the folder.
    """
    from onnx import TensorProto, helper, numpy_helper

    what = f"constant `{tensor.name}`"
    shape = tuple(tensor.dims)
    if any(n < 0 for n in shape) or prod(shape) > _LARGEST_CONSTANT:
        raise UnsupportedModelError(f"{what} has the shape {shape}, which is none")
    if tensor.data_type == TensorProto.STRING:
        return np.array([text.decode("utf-8", "replace") for text in tensor.string_data], object).reshape(shape)
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, ValueError, TypeError):
        raise UnsupportedModelError(f"{what} has the type number {tensor.data_type}, which is not known") from None
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, folder, dtype, shape, what)
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4}.get(tensor.data_type, 8 * np.dtype(dtype).itemsize)
    if tensor.raw_data and abs(len(tensor.raw_data) - -(-prod(shape) * bits // 8)) > 0 and bits >= 4:
        raise UnsupportedModelError(
            f"{what} has {len(tensor.raw_data)} bytes where its shape {shape} asks for {-(-prod(shape) * bits // 8)}; "
            "the file is damaged"
        )
    try:
        return np.array(numpy_helper.to_array(tensor))
    except Exception:
        raise UnsupportedModelError(f"{what} can't be read; the file is damaged") from None


def _external(tensor: Any, folder: Path | None, dtype: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise UnsupportedModelError(f"{what} lies in another file (`{location}`); load the model by its path")
    path = _inside(folder, location, what)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", 0)) or prod(shape) * np.dtype(dtype).itemsize
    except ValueError:
        raise UnsupportedModelError(
            f"{what} has an offset or a length that is no number; the file is damaged"
        ) from None
    wanted = prod(shape) * np.dtype(dtype).itemsize
    if offset < 0 or length != wanted or offset + length > path.stat().st_size:
        raise UnsupportedModelError(
            f"{what} needs {wanted} bytes at {offset} of `{path}`, which has {path.stat().st_size}; the file is damaged"
        )
    if wanted == 0:
        return np.zeros(shape, dtype)
    with path.open("rb") as file:
        file.seek(offset)
        return np.frombuffer(file.read(length), dtype).reshape(shape).copy()


def _described(value: Any) -> tuple[tuple[Any, ...], str]:
    from onnx import helper

    if not value.type.HasField("tensor_type"):
        raise UnsupportedModelError(f"input `{value.name}` is a sequence, map or optional; only tensors are read")
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        raise UnsupportedModelError(f"input `{value.name}` has no shape; give one with inputs={{name: shape}}")
    shape = tuple(
        n.dim_value if n.HasField("dim_value") and n.dim_value > 0 else (n.dim_param or None) for n in kind.shape.dim
    )
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    except (KeyError, ValueError, TypeError):
        raise UnsupportedModelError(
            f"input `{value.name}` has the type number {kind.elem_type}, which is not known"
        ) from None
    return shape, dtype


def _nodes(graph: Any, version: int) -> Iterator[Node]:
    from onnx import helper

    for message in graph.node:
        domain = message.domain
        kind = message.op_type if domain in ("", "ai.onnx") else f"{domain}::{message.op_type}"
        attributes = {}
        for attribute in message.attribute:
            value = helper.get_attribute_value(attribute)
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            elif isinstance(value, list) and value and isinstance(value[0], bytes):
                value = [entry.decode("utf-8", "replace") for entry in value]
            elif attribute.HasField("t"):
                value = array_of(attribute.t, None)
            attributes[attribute.name] = value
        name = message.name or next((output for output in message.output if output), message.op_type)
        yield Node(kind, name, tuple(message.input), tuple(message.output), attributes, version, message)


def _ordered(nodes: Sequence[Node], known: set[str]) -> list[Node]:
    """Return nodes after those that they read.

    Raises:
        UnsupportedModelError: If a tensor comes from nowhere, or the graph has a cycle.
    """
    makers: dict[str, Node] = {}
    for node in nodes:
        for output in node.outputs:
            if output and (output in makers or output in known):
                raise UnsupportedModelError(f"`{output}` is made twice; the file is damaged")
            if output:
                makers[output] = node
    found: list[Node] = []
    done = set(known)
    waiting = list(nodes)
    while waiting:
        later = []
        for node in waiting:
            if all(not name or name in done for name in read_by(node)):
                found.append(node)
                done.update(node.outputs)
            else:
                later.append(node)
        if len(later) == len(waiting):
            lost = next(
                (name for node in later for name in read_by(node) if name not in done and name not in makers), None
            )
            if lost is not None:
                raise UnsupportedModelError(f"`{lost}` is read but never made; the file is damaged")
            raise UnsupportedModelError(f"the graph has a cycle through `{later[0].name}`; the file is damaged")
        waiting = later
    return found


def read_by(node: Node) -> set[str]:
    """Return what a node and its branches read from outside."""
    names = {name for name in node.inputs if name}
    for value in node.attributes.values():
        if hasattr(value, "node") and hasattr(value, "initializer"):
            names |= free_names(value)
    return names


def free_names(graph: Any, depth: int = 0) -> set[str]:
    """Return what a branch or a body reads from outside of it.

    Args:
        graph: An `onnx.GraphProto`.
        depth: How many graphs it lies in.

    Raises:
        UnsupportedModelError: If graphs lie too deep in each other.
    """
    if depth > _DEEPEST:
        raise UnsupportedModelError(f"branches lie more than {_DEEPEST} deep in each other; the file is damaged")
    own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    own |= {name for node in graph.node for name in node.output}
    read: set[str] = set()
    for node in graph.node:
        read |= {name for name in node.input if name}
        for attribute in node.attribute:
            if attribute.HasField("g"):
                read |= free_names(attribute.g, depth + 1)
    return (read | {v.name for v in graph.output}) - own


def set_shapes(graph: Graph, shapes: Mapping[str, Sequence[Any]] | Sequence[Any] | None) -> None:
    """Fix the inputs' shapes.

    Args:
        graph: Changed in place.
        shapes: Name to shape; or the shape of the only input; None changes nothing.

    Raises:
        ConfigError: If a name or a shape does not fit.
    """
    from dwindle.errors import ConfigError
    from dwindle.open_lengths import by_name

    if shapes is None:
        return
    chosen = by_name(shapes, [name for name, _, _ in graph.inputs])
    for place, (name, shape, dtype) in enumerate(graph.inputs):
        if name not in chosen:
            continue
        given = chosen[name]
        fits = len(given) == len(shape) and all(
            a is None or (isinstance(a, int) and a > 0 and (not isinstance(b, int) or a == b or k == 0))
            for k, (a, b) in enumerate(zip(given, shape, strict=True))
        )
        if not fits:
            raise ConfigError(f"input `{name}` has the shape {shape} in the file; {given} does not fit it")
        graph.inputs[place] = (name, given, dtype)
