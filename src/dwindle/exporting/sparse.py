"""Sparse files: weights with many zeros in LiteRT's sparse encoding, where that is smaller and the runtime takes it.

What LiteRT 2.3 does with it, found by running files (docs/sparse-files.md): ``DENSIFY`` makes the weight dense once,
when the file is loaded, and kernels then compute as from a dense file, bit for bit. A sparse weight that an operator
reads without ``DENSIFY`` in between loads as well, and gives wrong outputs without an error as soon as XNNPACK takes
the operator; so that is never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import operator_name, parse, serialize, short_name

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
_TYPES: dict[int, type[np.generic]] = {
    schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16, schema.TensorType.INT8: np.int8,
}  # fmt: skip
# Tensor, operator and metadata of one sparse weight in the flatbuffer; measured as 320 to 400 bytes.
OVERHEAD_BYTES = 400
BLOCKS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class SparseWeight:
    """One weight, and whether it was written sparse.

    Attributes:
        tensor: Its name in the file.
        operator: The operator that computes with it.
        zeros: Fraction of zeros.
        dense_bytes: Its bytes when dense.
        sparse_bytes: Its bytes in the smallest sparse encoding, metadata included; None where there is none.
        reason: Why it stays dense; empty where it is sparse.
    """

    tensor: str
    operator: str
    zeros: float
    dense_bytes: int
    sparse_bytes: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A sparse form of a weight: a compressed-row table over its axes in some order.

    Attributes:
        order: The axes in the order of traversal; the last one is compressed.
        block: Neighbours along the last of them that are kept or left out together.
        segments: Where each row begins in ``indices``, shape ``(rows + 1,)``.
        indices: Place of each kept block in its row.
        values: What is kept, in order.
    """

    order: tuple[int, ...]
    block: int
    segments: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    @property
    def size_bytes(self) -> int:
        """Bytes of values and tables."""
        return self.values.nbytes + self.segments.nbytes + self.indices.nbytes


def encode(weight: np.ndarray) -> Encoding:
    """Return the smallest of the sparse encodings that LiteRT's DENSIFY reads back exactly.

    A weight is laid out with one axis last, whose zeros are left out: each kept value then costs its own bytes and
    those of its index (1 byte up to 256 places, 2 beyond), each row 1, 2 or 4 bytes. Every axis is tried as the last
    one, with single values and with blocks of 4 and 16.

    Args:
        weight: Shape ``(...)`` of at least two axes.
    """
    return min(_encodings(weight), key=lambda encoding: encoding.size_bytes)


def _encodings(weight: np.ndarray) -> Iterator[Encoding]:
    for last in range(weight.ndim):
        order = (*(axis for axis in range(weight.ndim) if axis != last), last)
        turned = weight.transpose(order)
        for block in BLOCKS:
            if block > 1 and (weight.shape[last] % block or weight.shape[last] == block):
                continue
            rows = turned.reshape(-1, weight.shape[last] // block, block)
            kept = (rows != 0).any(axis=2)
            segments = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
            yield Encoding(
                order=order, block=block, segments=_narrow(segments), indices=_narrow(np.nonzero(kept)[1]),
                values=np.ascontiguousarray(rows[kept]).reshape(-1),
            )  # fmt: skip


def decode(encoding: Encoding, shape: Sequence[int]) -> np.ndarray:
    """Return the dense weight of this shape that an encoding stands for."""
    turned = [shape[axis] for axis in encoding.order]
    rows = np.zeros((int(np.prod(turned[:-1])), turned[-1] // encoding.block, encoding.block), encoding.values.dtype)
    begins = encoding.segments.astype(np.int64)
    row = np.repeat(np.arange(len(rows)), begins[1:] - begins[:-1])
    rows[row, encoding.indices] = encoding.values.reshape(-1, encoding.block)
    return rows.reshape(turned).transpose(np.argsort(encoding.order))


def _narrow(values: np.ndarray) -> np.ndarray:
    largest = int(values.max()) if values.size else 0
    return values.astype(np.uint8 if largest < 256 else np.uint16 if largest < 65536 else np.int32)


def sparse_file(content: bytes) -> tuple[bytes, list[SparseWeight]]:
    """Return the file with those weights in LiteRT's sparse encoding that get smaller by it.

    Each of them goes through a ``DENSIFY`` operator when the file is loaded. What LiteRT refuses stays dense: in
    version 2.3, weights of 8-bit FULLY_CONNECTED operators, and of operators that quantize their input as they run.

    Args:
        content: A ``.tflite`` file of floats or integers.

    Returns:
        The file, and what became of each weight. Where nothing gets smaller, the file comes back as it was.
    """
    found = _weights(content)
    chosen = {index: encoding for index, (_, encoding) in found.items() if encoding is not None}
    refused: set[int] = set()
    if chosen and not _runs(_written(content, chosen)):
        refused = {index for index, encoding in chosen.items() if not _runs(_written(content, {index: encoding}))}
        chosen = {index: encoding for index, encoding in chosen.items() if index not in refused}
    written = _written(content, chosen) if chosen else content
    if chosen and (len(written) >= len(content) or not _runs(written)):
        written, refused = content, refused | set(chosen)
    weights = []
    for index, (weight, _) in found.items():
        why = f"LiteRT does not run {weight.operator} of this type with a sparse weight" if index in refused else ""
        weights.append(SparseWeight(**{**vars(weight), "reason": weight.reason or why}))
    return written, weights


def notes_of(weights: Sequence[SparseWeight]) -> list[str]:
    """Say in words which weights are sparse in the file, and why others are not."""
    sparse = [weight for weight in weights if not weight.reason]
    before = sum(weight.dense_bytes for weight in sparse)
    after = sum(weight.sparse_bytes or 0 for weight in sparse)
    notes = [f"sparse: {len(sparse)} of {len(weights)} weights, {before:,} bytes as {after:,}"]
    reasons: dict[str, list[str]] = {}
    for weight in weights:
        if weight.reason:
            reasons.setdefault(weight.reason, []).append(f"`{short_name(weight.tensor)}` ({weight.zeros:.0%} zeros)")
    for reason, names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        notes.append(f"stays dense: {', '.join(names[:4])}{more}: {reason}")
    return notes


def _weights(content: bytes) -> dict[int, tuple[SparseWeight, Encoding | None]]:
    """Map the tensor number of each weight to what is known of it, and to an encoding where that is smaller."""
    model = parse(content)
    main = model.subgraphs[0]
    sharing: dict[int, int] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            sharing[tensor.buffer] = sharing.get(tensor.buffer, 0) + 1
    found: dict[int, tuple[SparseWeight, Encoding | None]] = {}
    for index, operator in _kernels(model).items():
        tensor = main.tensors[index]
        data = model.buffers[tensor.buffer].data
        name = (tensor.name or b"").decode("utf8", "replace")
        dtype = _TYPES.get(tensor.type)
        if dtype is None or tensor.sparsity is not None or len(tensor.shape) < 2:
            continue
        weight = np.asarray(data, np.uint8).view(dtype).reshape([int(size) for size in tensor.shape])
        encoding, reason = None, ""
        points = None if tensor.quantization is None else tensor.quantization.zeroPoint
        if sharing[tensor.buffer] > 1:
            reason = "other tensors of the file are the same bytes"
        elif points is not None and np.any(np.asarray(points) != 0):
            reason = "its zero is not the integer 0"
        else:
            encoding = encode(weight)
        size = None if encoding is None else encoding.size_bytes + OVERHEAD_BYTES
        if size is not None and size >= weight.nbytes:
            encoding, reason = None, "the sparse encoding is not smaller"
        found[index] = (
            SparseWeight(
                tensor=name, operator=operator, zeros=float((weight == 0).mean()), dense_bytes=weight.nbytes,
                sparse_bytes=size, reason=reason,
            ),
            encoding,
        )  # fmt: skip
    return found


def _kernels(model: Any) -> dict[int, str]:
    """Map the constants that weighted operators read, also through a DEQUANTIZE, to the operator's name."""
    main = model.subgraphs[0]
    widened = {
        int(op.outputs[0]): int(op.inputs[0]) for op in main.operators if operator_name(model, op) == "DEQUANTIZE"
    }
    found = {}
    for op in main.operators:
        name = operator_name(model, op)
        if name in WEIGHTED and len(op.inputs) > 1:
            index = widened.get(int(op.inputs[1]), int(op.inputs[1]))
            data = model.buffers[main.tensors[index].buffer].data
            if data is not None and len(data):
                found[index] = name
    return found


def _written(content: bytes, encodings: dict[int, Encoding]) -> bytes:
    model = parse(content)
    main = model.subgraphs[0]
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = schema.BuiltinOperator.DENSIFY, 124, 1
    model.operatorCodes.append(code)
    first, made = [], {}
    for index, encoding in encodings.items():
        given = main.tensors[index]
        dense = schema.TensorT()
        dense.shape, dense.type, dense.buffer, dense.quantization = given.shape, given.type, 0, given.quantization
        # What operators read keeps its name; it is the sparse one that is new.
        dense.name, given.name = given.name, given.name + b"_sparse"
        given.sparsity, given.quantization = _parameters(encoding, given.shape), None
        model.buffers[given.buffer].data = encoding.values.view(np.uint8)
        main.tensors.append(dense)
        made[index] = len(main.tensors) - 1
        operator = schema.OperatorT()
        operator.opcodeIndex = len(model.operatorCodes) - 1
        operator.inputs, operator.outputs = np.array([index], np.int32), np.array([made[index]], np.int32)
        operator.builtinOptionsType = schema.BuiltinOptions.DensifyOptions
        operator.builtinOptions = schema.DensifyOptionsT()
        first.append(operator)
    for operator in main.operators:
        operator.inputs = np.array([made.get(int(index), int(index)) for index in operator.inputs], np.int32)
    main.operators = [*first, *main.operators]
    return serialize(model)


def _parameters(encoding: Encoding, shape: Sequence[int]) -> Any:
    """Return the schema's description of an encoding."""
    rank = len(encoding.order)
    parameters = schema.SparsityParametersT()
    parameters.traversalOrder, parameters.blockMap = list(encoding.order), []
    compressed = schema.DimensionMetadataT()
    compressed.format = schema.DimensionType.SPARSE_CSR
    compressed.arraySegmentsType, compressed.arraySegments = _vector(encoding.segments)
    compressed.arrayIndicesType, compressed.arrayIndices = _vector(encoding.indices)
    dense = [int(shape[axis]) for axis in encoding.order[:-1]]
    tail = []
    if encoding.block > 1:
        # Blocks are axes of their own, behind all others; the map says which axis each one divides.
        parameters.traversalOrder.append(rank)
        parameters.blockMap = [encoding.order[-1]]
        tail = [encoding.block]
    parameters.dimMetadata = [*(_dense(size) for size in dense), compressed, *(_dense(size) for size in tail)]
    return parameters


def _dense(size: int) -> Any:
    made = schema.DimensionMetadataT()
    made.format, made.denseSize = schema.DimensionType.DENSE, size
    return made


def _vector(values: np.ndarray) -> tuple[int, Any]:
    kinds = {
        "uint8": (schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
        "uint16": (schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
        "int32": (schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
    }
    kind, cls = kinds[values.dtype.name]
    vector = cls()
    vector.values = values
    return kind, vector


def _runs(content: bytes) -> bool:
    from dwindle.measuring.litert import LiteRTRunner

    try:
        LiteRTRunner(content)
    except UnsupportedModelError:
        return False
    return True
