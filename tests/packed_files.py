"""LiteRT files made by hand, with constants of every kind: no framework is needed to write them."""

from __future__ import annotations

import io
import zlib

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import serialize
from dwindle.packing.container import packed, table_bits_for, unpacked
from dwindle.packing.segments import find_regions

TYPES = {
    "float32": schema.TensorType.FLOAT32, "float16": schema.TensorType.FLOAT16, "float64": schema.TensorType.FLOAT64,
    "int8": schema.TensorType.INT8, "int16": schema.TensorType.INT16, "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64, "uint8": schema.TensorType.UINT8, "bool": schema.TensorType.BOOL,
    "int4": schema.TensorType.INT4, "int2": schema.TensorType.INT2, "bfloat16": schema.TensorType.BFLOAT16,
}  # fmt: skip


def litert_file(*constants: tuple[str, np.ndarray] | tuple[str, np.ndarray, np.ndarray]) -> bytes:
    """Return a file with constants: type, values (the packed bytes for int4 and int2, with the shape in values), scales."""
    model = schema.ModelT()
    model.version = 3
    model.description = b"constants"
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    model.operatorCodes = [code]
    graph = schema.SubGraphT()
    graph.name = b"main"
    graph.tensors, graph.operators = [], []
    model.buffers = [schema.BufferT()]
    for number, (kind, values, *scales) in enumerate(constants):
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor = schema.TensorT()
        tensor.name = f"model/layer_{number}/kernel".encode()
        tensor.shape = np.asarray(values.shape, np.int32)
        tensor.type = TYPES[kind]
        tensor.buffer = number + 1
        if scales:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = scales[0].astype(np.float32)
            tensor.quantization.zeroPoint = np.zeros(len(scales[0]), np.int64)
        graph.tensors.append(tensor)
    operator = schema.OperatorT()
    operator.inputs = np.arange(len(constants), dtype=np.int32)
    operator.outputs = np.zeros(1, np.int32)
    graph.operators.append(operator)
    graph.inputs = graph.outputs = np.zeros(1, np.int32)
    model.subgraphs = [graph]
    return serialize(model)


def gaussian(shape: tuple[int, ...], deviation: float = 20.0, seed: int = 0) -> np.ndarray:
    """Return int8 weights."""
    return np.clip(np.rint(np.random.default_rng(seed).normal(0, deviation, shape)), -127, 127).astype(np.int8)


def pruned(values: np.ndarray, sparsity: float) -> np.ndarray:
    """Return the values with the smallest set to zero."""
    return np.where(
        np.abs(values.astype(np.float64)) > np.quantile(np.abs(values), sparsity), values, values.dtype.type(0)
    )


def folded(rows: int, row: int, clusters: int) -> np.ndarray:
    """Return float weights of a few values, each row times a number of its own."""
    rng = np.random.default_rng(1)
    values = np.sort(rng.normal(size=clusters)).astype(np.float32)
    return values[rng.integers(0, clusters, (rows, row))] * rng.uniform(-2, 2, (rows, 1)).astype(np.float32)


def pack_bytes(content: bytes) -> bytes:
    regions = find_regions(content)
    return b"".join(packed(content, regions, table_bits=table_bits_for(len(content), regions)))


def unpack_bytes(content: bytes) -> bytes:
    return b"".join(unpacked(io.BytesIO(content)))


def sealed(content: bytes) -> bytes:
    """Return a packed file with the checksum at its end made right."""
    return content[:-4] + zlib.crc32(content[:-4]).to_bytes(4, "little")


def _files() -> dict[str, bytes]:
    """Return a file for each way that constants are coded, and for each that they may be odd."""
    rng = np.random.default_rng(2)
    normal = rng.normal(size=(40, 60)).astype(np.float32)
    scales = rng.uniform(0.01, 0.02, 64).astype(np.float32)
    odd = normal.copy()
    odd[0, :6] = [np.nan, np.inf, -np.inf, -0.0, 1e-42, 3e38]
    odd[1, :1] = np.array([0x7FC12345], np.uint32).view(np.float32)
    bytes_of = rng.integers(0, 256, (64, 40), dtype=np.uint8)
    return {
        "nothing": litert_file(("float32", np.zeros(0, np.float32))),
        "one number": litert_file(("float32", np.ones((), np.float32))),
        "equal numbers": litert_file(("float32", np.full((30, 50), 0.5, np.float32))),
        "int8": litert_file(("int8", gaussian((64, 100)), scales)),
        "int8, 90% zeros": litert_file(("int8", pruned(gaussian((64, 300)), 0.9), scales)),
        "int8, 16 values": litert_file(("int8", (gaussian((64, 100)) // 8 * 8))),
        "int8 in lanes": litert_file(("int8", gaussian((120, 150), 9.0))),
        "int8 rows of two widths": litert_file(
            ("int8", np.concatenate([gaussian((70, 170), 4.0), gaussian((70, 170), 40.0, 1)]))
        ),
        "depthwise": litert_file(("int8", gaussian((1, 3, 3, 32)))),
        "uint8 noise": litert_file(("uint8", rng.integers(0, 256, (100, 100), dtype=np.uint8))),
        "bool": litert_file(("bool", rng.random((50, 50)) < 0.1)),
        "int16": litert_file(("int16", rng.integers(-300, 300, (40, 50), dtype=np.int16))),
        "int32": litert_file(("int32", rng.integers(-(10**6), 10**6, 300, dtype=np.int32))),
        "int64": litert_file(("int64", rng.integers(-(10**12), 10**12, 300))),
        "int4": litert_file(("int4", bytes_of & 0x77)),
        "int2": litert_file(("int2", bytes_of & 0x55)),
        "float32": litert_file(("float32", normal)),
        "float32 with odd numbers": litert_file(("float32", odd)),
        "float32, zeros of both signs": litert_file(("float32", normal * (rng.random((40, 60)) < 0.1))),
        "float32 in lanes": litert_file(("float32", rng.normal(size=(300, 100)).astype(np.float32))),
        "float32, pruned in lanes": litert_file(
            ("float32", pruned(rng.normal(size=(400, 300)).astype(np.float32), 0.9))
        ),
        "float32, 16 values": litert_file(("float32", normal.ravel()[:16][rng.integers(0, 16, (40, 60))])),
        "float32, 16 values a row": litert_file(("float32", folded(60, 100, 16))),
        "float64": litert_file(("float64", rng.normal(size=500))),
        "float16": litert_file(("float16", normal.astype(np.float16))),
        "bfloat16": litert_file(("bfloat16", (normal.view(np.uint32) >> 16).astype(np.uint16))),
        "scales of biases": litert_file(
            ("int8", gaussian((64, 30)), scales), ("int32", np.arange(64, dtype=np.int32), scales * np.float32(0.037))
        ),
        "bytes behind it": litert_file(("int8", gaussian((64, 20)))) + bytes(1001),
    }  # fmt: skip


FILES = _files()
