"""Reading and rewriting LiteRT files: tensors by name, operators with their options as plain data."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.sparse_constants import densify

_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
#: NumPy type of a value; packed integers of 4 and 2 bits have none.
DTYPES: dict[int, type[np.generic]] = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.FLOAT64: np.float64,
    schema.TensorType.INT8: np.int8,
    schema.TensorType.INT16: np.int16,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64,
    schema.TensorType.UINT8: np.uint8,
    schema.TensorType.UINT16: np.uint16,
    schema.TensorType.UINT32: np.uint32,
    schema.TensorType.BOOL: np.bool_,
}
_PACKED_BITS = {getattr(schema.TensorType, name): bits for name, bits in (("INT4", 4), ("INT2", 2))
                if hasattr(schema.TensorType, name)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        index: Its number in the subgraph.
        name: Its name in the file.
        shape: Sizes, the batch axis as the file has it.
        dtype: NumPy type of a value; int8 for the packed 4 and 2 bits.
        bits: Bits of one value as stored.
        value: The constant, made dense where it is stored sparse; None for an activation.
        scale: Quantization scales (one or one per channel), or None.
        zero_point: Quantization zero points.
        axis: Axis that the scales run along.
        buffer: Number of its buffer.
        block: Values along the last axis that share a scale; 0 where scales run along ``axis``.
        stored_bytes: Bytes of the constant's values as stored; of a sparse one, of those that are kept.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    bits: int
    value: np.ndarray | None = field(repr=False)
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    axis: int
    buffer: int
    block: int = 0
    stored_bytes: int = 0

    @property
    def is_quantized(self) -> bool:
        """Whether it holds integers with a scale."""
        return (self.scale is not None or self.block > 0) and self.dtype in (np.int8, np.int16, np.uint8)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator of a file: its name, tensors (None where an optional one is left out) and options."""

    index: int
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Mapping[str, Any]

    @property
    def result(self) -> str:
        """Name of the first output; of an operator without one, such as a write into a variable, its own."""
        return self.outputs[0].name if self.outputs else self.name.lower()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The main subgraph of a file."""

    tensors: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def parse(content: bytes) -> Any:
    """Return the file as the schema's object tree.

    Raises:
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
    """
    if len(content) < 8 or content[4:8] != b"TFL3":
        raise UnsupportedModelError(
            f"the file does not begin as a LiteRT model does (`TFL3` at byte 4, found {content[4:8]!r}); "
            "pass a .tflite file"
        )
    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        if not model.subgraphs or not model.operatorCodes or not model.buffers:
            raise ValueError("no graph in it")
        for buffer in model.buffers:
            # Large constants may lie behind the flatbuffer, at an offset from the start of the file.
            if buffer.offset > 1:
                if buffer.offset + buffer.size > len(content):
                    raise ValueError("a constant lies outside the file")
                buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
                buffer.offset = buffer.size = 0
    except Exception as error:  # the reader fails on broken bytes in ways that it does not name
        raise UnsupportedModelError(f"the LiteRT file is truncated or damaged ({type(error).__name__})") from None
    return model


def check_structure(content: bytes) -> None:
    """Check every index and size in a file, so that the C++ interpreter never meets one that points nowhere.

    Raises:
        UnsupportedModelError: If something does.
    """
    model = parse(content)
    try:
        _check_indices(model)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise UnsupportedModelError(f"the LiteRT file is truncated or damaged ({error})") from None


def _check_indices(model: Any) -> None:
    def inside(values: Any, count: int, what: str, lowest: int = 0) -> None:
        for value in integers(values):
            if not lowest <= value < count:
                raise ValueError(f"{what} {value} of {count}")

    for graph in model.subgraphs:
        count = len(graph.tensors or [])
        inside(graph.inputs, count, "input tensor")
        inside(graph.outputs, count, "output tensor")
        for tensor in graph.tensors or []:
            inside([tensor.buffer], len(model.buffers), "buffer")
            shape = integers(tensor.shape)
            if any(size < 0 for size in shape):
                raise ValueError(f"shape {shape}")
            data = model.buffers[tensor.buffer].data
            stored = 0 if data is None else len(data)
            dtype = DTYPES.get(tensor.type)
            if stored and dtype is not None:
                needed = int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
                if tensor.sparsity is None and stored != needed:
                    raise ValueError(f"a constant of {stored} bytes for shape {shape}")
        for operation in graph.operators or []:
            inside([operation.opcodeIndex], len(model.operatorCodes), "operator code")
            inside(operation.inputs, count, "tensor", lowest=-1)
            inside(operation.outputs, count, "tensor")


def serialize(model: Any) -> bytes:
    """Return the bytes of an object tree from `parse`."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def operator_name(model: Any, operation: Any) -> str:
    """Return an operator's name, such as ``CONV_2D``, or ``CUSTOM:name``."""
    code = model.operatorCodes[operation.opcodeIndex]
    number = max(int(code.builtinCode or 0), int(code.deprecatedBuiltinCode or 0))
    if number == schema.BuiltinOperator.CUSTOM:
        return f"CUSTOM:{(code.customCode or b'').decode('utf8', 'replace')}"
    return str(_NAMES.get(number, f"OPERATOR_{number}"))


def read_graph(content: bytes) -> Graph:
    """Read a file's main subgraph into plain data.

    Args:
        content: The bytes of a ``.tflite`` file.

    Raises:
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
    """
    model = parse(content)
    try:
        return _graph(model)
    except UnsupportedModelError:
        raise
    except Exception as error:  # indices that point nowhere
        raise UnsupportedModelError(f"the LiteRT file is damaged ({type(error).__name__}: {error})") from None


def _graph(model: Any) -> Graph:
    main = model.subgraphs[0]
    given = given_names(model, main)
    tensors = tuple(_tensor(model, index, tensor, given[index]) for index, tensor in enumerate(main.tensors))
    operations = tuple(
        Operation(
            index=index,
            name=operator_name(model, operation),
            inputs=tuple(None if i < 0 else tensors[i] for i in integers(operation.inputs)),
            outputs=tuple(tensors[i] for i in integers(operation.outputs)),
            options=_options(operation),
        )
        for index, operation in enumerate(main.operators or [])
    )
    inputs = tuple(tensors[i] for i in integers(main.inputs))
    outputs = tuple(tensors[i] for i in integers(main.outputs))
    names: dict[str, dict[int, str]] = {"inputs": {}, "outputs": {}}
    for signature in (model.signatureDefs or [])[:1]:
        for kind in names:
            for entry in getattr(signature, kind) or []:
                names[kind][entry.tensorIndex] = entry.name.decode("utf8", "replace")
    return Graph(
        tensors=tensors, operations=operations, inputs=inputs, outputs=outputs,
        input_names=tuple(names["inputs"].get(t.index, t.name) for t in inputs),
        output_names=tuple(names["outputs"].get(t.index, t.name) for t in outputs),
    )  # fmt: skip


def integers(values: Any) -> list[int]:
    """Return a vector of the schema, which is None where it was left out, as a list."""
    return [] if values is None else [int(value) for value in values]


def _options(operation: Any) -> dict[str, Any]:
    options = operation.builtinOptions or getattr(operation, "builtinOptions2", None)
    if options is None:
        return {}
    return {name: value for name, value in vars(options).items() if not name.startswith("_")}


def given_names(model: Any, graph: Any) -> list[str]:
    """Return the tensors' names in a subgraph; where a file was written without, they are named after the operators."""
    found = {index: f"input_{number}" for number, index in enumerate(integers(graph.inputs))}
    for number, operation in enumerate(graph.operators or []):
        own = f"{operator_name(model, operation).lower()}_{number}"
        for kind, indices in (("output", operation.outputs), ("operand", operation.inputs)):
            for place, index in enumerate(integers(indices)):
                found.setdefault(index, own if kind == "output" and place == 0 else f"{own}/{kind}_{place}")
    names = [(tensor.name or b"").decode("utf8", "replace") for tensor in graph.tensors or []]
    taken = set(names)
    for index, name in enumerate(names):
        if not name:
            name = found.get(index, f"tensor_{index}")
            while name in taken:
                name += "_"
            names[index] = name
    return names


def _tensor(model: Any, index: int, tensor: Any, name: str) -> Tensor:
    shape = tuple(integers(tensor.shape))
    kind = tensor.type
    bits = _PACKED_BITS.get(kind)
    dtype = np.int8 if bits else DTYPES.get(kind, np.void)
    quantization = tensor.quantization
    scale = None if quantization is None or quantization.scale is None else np.asarray(quantization.scale)
    if scale is not None and scale.size == 0:
        scale = None
    zero_point = None
    if scale is not None:
        given = quantization.zeroPoint
        zero_point = np.zeros(scale.shape, np.int64) if given is None else np.asarray(given)
    return Tensor(
        index=index,
        name=name,
        shape=shape,
        dtype=dtype,
        bits=bits or np.dtype(dtype).itemsize * 8,
        value=_constant(model.buffers[tensor.buffer], shape, dtype, bits, tensor.sparsity),
        scale=scale,
        zero_point=zero_point,
        axis=int(quantization.quantizedDimension) if quantization is not None else 0,
        buffer=int(tensor.buffer),
        block=int(getattr(getattr(quantization, "details", None), "blockSize", 0) or 0),
        stored_bytes=0 if model.buffers[tensor.buffer].data is None else len(model.buffers[tensor.buffer].data),
    )


def _constant(
    buffer: Any, shape: tuple[int, ...], dtype: type[np.generic], bits: int | None, sparsity: Any
) -> np.ndarray | None:
    if buffer is None or buffer.data is None or len(buffer.data) == 0 or dtype is np.void:
        return None
    raw = np.asarray(buffer.data, dtype=np.uint8)
    if sparsity is not None and bits is None:
        return densify(sparsity, raw.view(dtype), shape)
    size = int(np.prod(shape)) if shape else 1
    if bits is None:
        return raw.view(dtype)[:size].reshape(shape) if raw.size % np.dtype(dtype).itemsize == 0 else None
    per_byte = 8 // bits
    parts = np.stack([(raw >> (bits * i)) & (2**bits - 1) for i in range(per_byte)], axis=1).reshape(-1)[:size]
    signed = parts.astype(np.int8)
    signed[signed >= 2 ** (bits - 1)] -= 2**bits
    return signed.reshape(shape)


def replace_constants(content: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """Return the file with the named float32 constants overwritten in place; nothing else changes.

    Args:
        content: A float ``.tflite`` file.
        values: Tensor name to array, in the file's own shape.

    Raises:
        UnsupportedModelError: If a tensor is missing or its size differs.
    """
    changed = bytearray(content)
    model = schema.Model.GetRootAs(changed, 0)
    main = model.Subgraphs(0)
    by_name = {}
    for index in range(main.TensorsLength()):
        tensor = main.Tensors(index)
        by_name[(tensor.Name() or b"").decode("utf8", "replace")] = tensor.Buffer()
    for name, value in values.items():
        if name not in by_name:
            raise UnsupportedModelError(f"the float file has no tensor `{name}`")
        buffer = model.Buffers(by_name[name])
        if buffer.Offset() > 1:
            place = np.frombuffer(changed, np.uint8, buffer.Size(), buffer.Offset())
        else:
            place = buffer.DataAsNumpy()
        data = np.ascontiguousarray(value, dtype=np.float32).view(np.uint8).reshape(-1)
        if place.size != data.size:
            raise UnsupportedModelError(f"tensor `{name}` has {place.size} bytes in the float file, not {data.size}")
        place[:] = data
    return bytes(changed)


def drop_tensors(graph: Any) -> dict[int, int]:
    """Drop the tensors of a subgraph that no operator reads or writes; return the new number of each other one."""
    operations = graph.operators or []
    lists = [graph.inputs, graph.outputs]
    lists += [getattr(op, kind) for op in operations for kind in ("inputs", "outputs", "intermediates")]
    used = sorted({int(index) for found in lists if found is not None for index in found if index >= 0})
    new = {old: number for number, old in enumerate(used)}
    graph.tensors = [graph.tensors[index] for index in used]

    def renumbered(found: Any) -> Any:
        return None if found is None else np.array([new.get(int(i), -1) for i in found], np.int32)

    graph.inputs, graph.outputs = renumbered(graph.inputs), renumbered(graph.outputs)
    for operation in operations:
        for kind in ("inputs", "outputs", "intermediates"):
            setattr(operation, kind, renumbered(getattr(operation, kind)))
        if operation.intermediates is not None and not len(operation.intermediates):
            operation.intermediates = None
    return new


def resizable(content: bytes) -> bytes:
    """Return a file of batch 1 whose batch axis can be resized, with no operator added.

    The leading 1 of every activation becomes ``-1`` in its shape signature, and so does the leading 1 of constant
    shapes of RESHAPE operators. The caller checks that the result computes the same for several samples at once.
    """
    model = parse(content)
    model = copy.deepcopy(model)
    main = model.subgraphs[0]
    if any(operator_name(model, operation) == "TRANSPOSE_CONV" for operation in main.operators or []):
        return content  # it has the batch in its output shape, and only some kernels overlook it
    constants = {index for index, buffer in enumerate(model.buffers) if buffer.data is not None and len(buffer.data)}
    for tensor in main.tensors:
        shape = integers(tensor.shape)
        if shape and shape[0] == 1 and tensor.buffer not in constants:
            tensor.shapeSignature = np.array([-1, *shape[1:]], dtype=np.int32)
    shapes = set()
    for operation in main.operators or []:
        if operator_name(model, operation) != "RESHAPE":
            continue
        wanted = main.tensors[operation.inputs[1]] if len(operation.inputs) > 1 else None
        if wanted is None or wanted.buffer not in constants:
            continue
        value = np.asarray(model.buffers[wanted.buffer].data, np.uint8).view(np.int32).copy()
        if value.size and value[0] == 1 and (value > 0).all():
            shapes.add((wanted.buffer, tuple(value)))
    for buffer, sizes in shapes:
        model.buffers[buffer].data = np.array([-1, *sizes[1:]], dtype=np.int32).view(np.uint8)
    return serialize(model)


def ordered(content: bytes, inputs: list[str]) -> bytes:
    """Return the file with its inputs in the given order of signature names, and its outputs as `counted` sorts them.

    The converter orders both as it likes; a model's callers count on the model's order.
    """
    model = parse(content)
    if not model.signatureDefs:
        return content
    main, signature = model.subgraphs[0], model.signatureDefs[0]
    by_name = {entry.name.decode("utf8"): entry.tensorIndex for entry in signature.inputs or []}
    named = [(entry.name.decode("utf8"), entry.tensorIndex) for entry in signature.outputs or []]
    results = sorted(named, key=lambda pair: counted(pair[0]))
    if sorted(by_name.values()) != sorted(integers(main.inputs)) or set(by_name) != set(inputs):
        return content
    main.inputs = np.array([by_name[name] for name in inputs], np.int32)
    if sorted(index for _, index in results) == sorted(integers(main.outputs)):
        main.outputs = np.array([index for _, index in results], np.int32)
    return serialize(model)


def refuse_open_lengths(content: bytes) -> None:
    """Raise if an input has an open length that is 1 in the file, other than the number of samples.

    Raises:
        UnsupportedModelError: Naming the input: a model of that shape would take nothing else.
    """
    graph = read_graph(content)
    tensors = parse(content).subgraphs[0].tensors
    for name, tensor in zip(graph.input_names, graph.inputs, strict=True):
        signature = integers(tensors[tensor.index].shapeSignature)
        if any(open_ == -1 and size == 1 for open_, size in zip(signature[1:], tensor.shape[1:], strict=False)):
            raise UnsupportedModelError(
                f"input `{name}` has the open lengths {signature}; convert the model with every length fixed "
                "but the first, the number of samples"
            )


def counted(name: str) -> list[str | int]:
    """Return a key that sorts names as people count: ``output_2`` before ``output_10``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def short_name(name: str) -> str:
    """Return the part of a converter's tensor name that says which layer it is."""
    name = name.split(";")[0].split(":")[0]
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1:
        parts = parts[1:] if len(parts) > 2 else parts
        parts = parts[:-1] if len(parts) > 1 else parts
    return "_".join(parts) or "tensor"


# What tracing calls the operation in which a layer uses its kernel.
_KERNEL_SCOPES = {"convolution", "depthwise", "MatMul", "Tensordot", "conv2d_transpose", "separable_conv2d", "Einsum"}


def layer_name(operation: Operation) -> str:
    """Return the name of the layer that an operator is: of the one with its kernel, where others are folded in.

    Folding BatchNorm gives a kernel or an output the name of any of the layers that went into it.
    """
    kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
    weighted = kernel is not None and kernel.value is not None and kernel.dtype == np.float32 and kernel.value.size > 1
    names = [kernel.name] if kernel is not None and weighted and "/" in kernel.name else []
    names.append(operation.result)
    parts = [part for name in names for part in name.split(";") if "/" in part]
    telling = [part for part in parts if weighted and re.sub(r"[_\d]*$", "", part.split("/")[-1]) in _KERNEL_SCOPES]
    found = short_name((telling or names)[0])
    return operation.name.lower() if found.startswith("StatefulPartitionedCall") else found


def named_as_layers(content: bytes, layers: Collection[str]) -> bytes:
    """Return the file with tensor names that carry the model's own layer names.

    Tracing numbers every scope (``model_1/conv2d_1/Relu`` for the layer ``conv2d``); a scope is given its layer's
    name back where the number's removal gives one.

    Args:
        content: A file.
        layers: Names of the model and of all its layers, nested ones too.
    """
    model = parse(content)
    taken: set[str] = set()
    for tensor in model.subgraphs[0].tensors:
        name = ";".join(_named(part, layers) for part in (tensor.name or b"").decode("utf8", "replace").split(";"))
        count, unique = 0, name
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        tensor.name = unique.encode("utf8")
    return serialize(model)


def _named(path: str, layers: Collection[str]) -> str:
    *scopes, last = path.split("/")
    for number, scope in enumerate(scopes):
        stripped = re.sub(r"_\d+$", "", scope)
        if stripped not in layers:
            break
        scopes[number] = stripped
    return "/".join([*scopes, last])
