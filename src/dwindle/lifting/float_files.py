"""Any LiteRT file as a plain float file: float16, sparse and quantized ones are widened."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import (
    Graph,
    Tensor,
    check_structure,
    given_names,
    operator_name,
    parse,
    read_graph,
    serialize,
)
from dwindle.lifting.signatures import drop_unread, with_signature

_WIDENING = {"DEQUANTIZE", "DENSIFY"}
_STEPS = {"QUANTIZE", "DEQUANTIZE"}


def as_float(content: bytes) -> tuple[bytes, list[str]]:
    """Return a file that computes in float32 what ``content`` computes, and what was changed, in words.

    float16 and sparse constants become dense float32 ones. In a quantized file integer constants become the floats
    that they stand for, integer activations become floats, and the operators that convert between them go; what the
    file's rounding did is lost. Tensors without a name get one, see `named`.

    Args:
        content: A ``.tflite`` file. A plain float one with names comes back as it is.
    """
    content = named(content)
    graph = read_graph(content)
    plain = not any(op.name in _WIDENING | _STEPS for op in graph.operations)
    sparse = [n for n, t in enumerate(parse(content).subgraphs[0].tensors) if t.sparsity is not None]
    if plain and not sparse and not any(tensor.is_quantized for tensor in graph.tensors):
        return content, []
    values = {index: value for index in sparse if (value := graph.tensors[index].value) is not None}
    notes: dict[str, None] = {"sparse weights made dense": None} if sparse else {}
    dropped, alias = set(), {}
    for operation in graph.operations:
        source = operation.inputs[0]
        if operation.name in _WIDENING and source is not None and (source.value is not None or source.index in values):
            if source.index in values:
                found = values[source.index]
                if operation.name == "DEQUANTIZE":
                    found = _real(source, found)
            elif operation.name == "DEQUANTIZE":
                found = _real(source, source.value)  # type: ignore[arg-type]
                notes[
                    f"{'float16' if source.dtype == np.float16 else f'int{source.bits}'} weights widened to float32"
                ] = None
            else:
                found = np.asarray(source.value)
            values[operation.outputs[0].index] = found
            dropped.add(operation.index)
        elif operation.name in _STEPS and source is not None:
            alias[operation.outputs[0].index] = source.index
            dropped.add(operation.index)
    if any(t.is_quantized and t.value is None for t in graph.tensors) or alias:
        notes["the file was quantized; its weights are the floats that its integers stand for"] = None
    return _rewritten(content, graph, values, dropped, alias), list(notes)


def named(content: bytes) -> bytes:
    """Return a file with the names that `read_graph` gives to tensors without one, as in a compact file, written in it.

    Raises:
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
    """
    model = parse(content)
    if all(tensor.name for graph in model.subgraphs for tensor in graph.tensors or []):
        return content
    check_structure(content)
    for number, graph in enumerate(model.subgraphs):
        prefix = f"subgraph_{number}/" if number else ""
        for tensor, name in zip(graph.tensors or [], given_names(model, graph), strict=True):
            tensor.name = tensor.name or f"{prefix}{name}".encode()
    return serialize(model)


def _real(tensor: Tensor, value: np.ndarray) -> np.ndarray:
    """Return the floats that a constant stands for."""
    if tensor.scale is None or tensor.zero_point is None:
        return np.asarray(value, np.float32)
    shape = [1] * value.ndim
    if tensor.scale.size > 1:
        shape[tensor.axis] = -1
    scale = tensor.scale.reshape(shape) if value.ndim else tensor.scale[0]
    zero = np.ravel(tensor.zero_point)
    point = zero.reshape(shape) if zero.size > 1 else zero[0]
    return np.asarray((value.astype(np.float64) - point) * scale, np.float32)


def _rewritten(
    content: bytes, graph: Graph, values: dict[int, np.ndarray], dropped: set[int], alias: dict[int, int]
) -> bytes:
    model = parse(content)
    main = model.subgraphs[0]

    def source(index: int) -> int:
        while index in alias:
            index = alias[index]
        return index

    def constant(tensor: Any, value: np.ndarray) -> None:
        buffer = schema.BufferT()
        buffer.data = np.ascontiguousarray(value, np.float32).view(np.uint8).reshape(-1)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1

    for given in graph.tensors:
        tensor = main.tensors[given.index]
        scaled = given.scale is not None and given.dtype in (np.int8, np.uint8, np.int16, np.int32, np.int64)
        found = values.get(given.index)
        if found is not None and given.is_quantized:
            found = _real(given, found)
        elif found is None and given.value is not None and scaled:
            found = _real(given, given.value)
        if found is not None:
            constant(tensor, found)
        if found is not None or scaled:
            tensor.type, tensor.quantization, tensor.sparsity = schema.TensorType.FLOAT32, None, None
    main.operators = [op for number, op in enumerate(main.operators) if number not in dropped]
    for operation in main.operators:
        operation.inputs = np.array([source(i) for i in operation.inputs], np.int32)
        if operator_name(model, operation) == "FULLY_CONNECTED" and operation.builtinOptions is not None:
            operation.builtinOptions.asymmetricQuantizeInputs = False
    main.outputs = np.array([source(i) for i in main.outputs], np.int32)
    for signature in model.signatureDefs or []:
        for entry in signature.outputs or []:
            entry.tensorIndex = source(entry.tensorIndex)
    drop_unread(model)
    return serialize(model)


def modern(content: bytes) -> bytes:
    """Return a file as it is written since 2021, which `ai-edge-quantizer` takes for granted.

    Older ones have no signature, and their operators have numbers of one byte, in a field of their own.
    """
    model = parse(content)
    old = [code for code in model.operatorCodes if code.builtinCode < code.deprecatedBuiltinCode]
    if model.signatureDefs and not old:
        return content
    model = copy.deepcopy(model)
    for code in model.operatorCodes:
        code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
    if not model.signatureDefs:
        with_signature(model)
    return serialize(model)
