"""Weights in fewer bytes, which TensorFlow Lite Micro's operator DECODE expands as the model runs.

LiteRT has no such operator. It is put before each operator that reads such a weight, and its output, the expanded
weight, lies in the arena while that operator runs.

References:
    TensorFlow Lite Micro, ``micro/compression/decode.py`` and ``lut.py``, ``micro/kernels/decode_state_lut.cc`` and
    ``decode_state_prune.cc``. We differ: which encoding serves is found from the weight, and a weight that would not
    get smaller is left as it is. Its own writer has look-up tables only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import operator_name, parse, read_graph
from dwindle.micro.stripping import write

# Operators and the number of the input that may come from DECODE: their kernels read it only as they run.
_READERS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1}
_MOST_BITS = 7
_ONE_TABLE = 15
_TABLE, _ZEROS = 0, 2
_HEADER_BYTES = 16
# Bytes that the operator and its two further tensors take in the flatbuffer, about.
_OVERHEAD = 80


@dataclass(frozen=True, kw_only=True)
class EncodedWeight:
    """A weight that DECODE expands.

    Attributes:
        name: Its tensor's name.
        encoding: ``"table"``, indices into tables of its values; ``"zeros"``, a bit for each value and those that are
            not 0.
        bits: Bits of one index; 1 for ``"zeros"``.
        tables: 1, or one for each channel; 0 for ``"zeros"``.
        size_before_bytes: Bytes of its values.
        size_after_bytes: Bytes of all that is stored instead, but for the operator.
    """

    name: str
    encoding: str
    bits: int
    tables: int
    size_before_bytes: int
    size_after_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    encoding: str
    indices: bytes
    header: bytes  # and what follows it: the tables, or the values
    bits: int
    tables: int

    @property
    def size(self) -> int:
        return len(self.indices) + len(self.header)


def encode_weights(content: bytes, *, alignment: int = 16) -> tuple[bytes, tuple[EncodedWeight, ...]]:
    """Return a file for TensorFlow Lite Micro whose weights are stored in fewer bytes, each as serves it best.

    **Tables**, for clustered weights: indices of 1 to 7 bits. A weight with one scale has one table; a weight with a
    scale for each channel has one for each, since a value that channels share is another integer in each of them.
    **Zeros**, for pruned weights: a bit for each value, and the values that are not 0; ``n / 8 + (1 - sparsity) n``
    bytes of 8-bit weights.

    Args:
        content: A ``.tflite`` file.
        alignment: See `dwindle.micro.stripping.strip`.

    Returns:
        The file, and which weights are encoded; the very bytes that came in where none gets smaller.
    """
    model = copy.deepcopy(parse(content))
    named = read_graph(content)
    main = model.subgraphs[0]
    read_by: dict[int, list[tuple[int, int]]] = {}
    for number, operation in enumerate(main.operators or []):
        for place, index in enumerate(operation.inputs if operation.inputs is not None else []):
            read_by.setdefault(int(index), []).append((number, place))
    shared = _buffers_used_twice(model)
    before: dict[int, list[Any]] = {}
    found: list[EncodedWeight] = []
    code = len(model.operatorCodes)
    for index, readers in sorted(read_by.items()):
        value = named.tensors[index].value if index >= 0 else None
        names = [operator_name(model, main.operators[number]) for number, _ in readers]
        fits = all(_READERS.get(name) == place for name, (_, place) in zip(names, readers, strict=True))
        if value is None or not fits or main.tensors[index].buffer in shared or named.tensors[index].bits != 8:
            continue
        encoded = _smallest(value, main.tensors[index].quantization)
        if encoded.size + _OVERHEAD * len(readers) >= value.nbytes:
            continue
        _insert(model, index, encoded, readers, before, code)
        found.append(EncodedWeight(
            name=named.tensors[index].name, encoding=encoded.encoding, bits=encoded.bits, tables=encoded.tables,
            size_before_bytes=value.nbytes, size_after_bytes=encoded.size,
        ))  # fmt: skip
    if not found:
        return content, ()
    added = schema.OperatorCodeT()
    added.builtinCode = added.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    added.customCode, added.version = b"TFLM_DECODE", 1
    model.operatorCodes.append(added)
    main.operators = [
        operation for number, present in enumerate(main.operators) for operation in (*before.get(number, ()), present)
    ]
    return write(model, alignment=alignment), tuple(found)


def _buffers_used_twice(model: Any) -> set[int]:
    counts: dict[int, int] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            counts[tensor.buffer] = counts.get(tensor.buffer, 0) + 1
    return {buffer for buffer, count in counts.items() if count > 1}


def _smallest(value: np.ndarray, quantization: Any) -> _Encoded:
    zeros = _as_zeros(value)
    table = _as_table(value, quantization)
    return zeros if table is None or zeros.size < table.size else table


def _as_zeros(value: np.ndarray) -> _Encoded:
    """Return a bit for each value, the first in the highest place, and the values that are not 0."""
    header = bytearray(_HEADER_BYTES)  # type, version of the header; version of the encoding at 4
    header[0], header[1], header[4] = _ZEROS, 1, 1
    flat = value.ravel()
    return _Encoded(
        encoding="zeros", indices=np.packbits(flat != 0).tobytes(), header=bytes(header) + flat[flat != 0].tobytes(),
        bits=1, tables=0,
    )  # fmt: skip


def _as_table(value: np.ndarray, quantization: Any) -> _Encoded | None:
    """Return indices and tables of a weight, or None where a table would be too long."""
    scales = 1 if quantization is None or quantization.scale is None else len(quantization.scale)
    axis = int(quantization.quantizedDimension) if scales > 1 else None
    if axis not in (None, 0, value.ndim - 1):
        return None
    rows = value.reshape(1, -1) if axis is None else np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
    tables = [np.unique(row) for row in rows]
    longest = max(len(table) for table in tables)
    bits = max(1, (longest - 1).bit_length())
    if bits > _MOST_BITS:
        return None
    padded = np.zeros((len(tables), longest), value.dtype)
    places = np.empty(rows.shape, np.uint8)
    for number, (table, row) in enumerate(zip(tables, rows, strict=True)):
        padded[number, : len(table)] = table
        places[number] = np.searchsorted(table, row)
    if axis is not None:
        shape = (value.shape[axis], *np.delete(value.shape, axis))
        places = np.moveaxis(places.reshape(shape), 0, axis)
    bitstream = np.unpackbits(places.reshape(-1, 1), axis=1)[:, 8 - bits :]
    header = bytearray(_HEADER_BYTES)
    header[0], header[1], header[4] = _TABLE, 1, 1
    header[5] = ((_ONE_TABLE if axis is None else axis) << 4) | bits
    header[6] = longest
    return _Encoded(
        encoding="table", indices=np.packbits(bitstream).tobytes(), header=bytes(header) + padded.tobytes(), bits=bits,
        tables=len(tables),
    )  # fmt: skip


def _insert(
    model: Any, index: int, encoded: _Encoded, readers: list[tuple[int, int]], before: dict[int, list[Any]], code: int
) -> None:
    """Put the tensor's indices in its place, and DECODE before each operator that reads it."""
    main = model.subgraphs[0]
    tensor = main.tensors[index]
    expanded = copy.deepcopy(tensor)
    expanded.buffer = 0
    model.buffers[tensor.buffer].data = np.frombuffer(encoded.indices, np.uint8)
    tensor.shape = np.array([len(encoded.indices)], np.int32)
    tensor.type, tensor.quantization, tensor.shapeSignature = schema.TensorType.UINT8, None, None
    header = schema.BufferT()
    header.data = np.frombuffer(encoded.header, np.uint8)
    model.buffers.append(header)
    ancillary = copy.deepcopy(tensor)
    ancillary.shape = np.array([len(encoded.header)], np.int32)
    ancillary.name, ancillary.buffer = None, len(model.buffers) - 1
    main.tensors.append(ancillary)
    place = len(main.tensors) - 1
    for number, which in readers:
        main.tensors.append(copy.deepcopy(expanded))
        operation = main.operators[number]
        operation.inputs = np.array(operation.inputs, np.int32)
        operation.inputs[which] = len(main.tensors) - 1
        decode = schema.OperatorT()
        decode.opcodeIndex = code
        decode.inputs = np.array([index, place], np.int32)
        decode.outputs = np.array([len(main.tensors) - 1], np.int32)
        before.setdefault(number, []).append(decode)
