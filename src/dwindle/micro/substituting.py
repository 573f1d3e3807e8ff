"""Operators that TensorFlow Lite Micro lacks, written as others that compute the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import layer_name, operator_name, parse, read_graph, serialize

# What its kernel of CONCATENATION takes.
_MOST_INPUTS = 10


def substituted(content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Return a file with the operators of `SUBSTITUTES` written as others, and what was done, in sentences.

    Args:
        content: A ``.tflite`` file.

    Returns:
        The file, or the very bytes that came in where there is nothing to write otherwise.
    """
    model = copy.deepcopy(parse(content))
    operations = read_graph(content).operations
    notes: list[str] = []
    for graph in model.subgraphs:
        made: list[Any] = []
        for number, operation in enumerate(graph.operators or []):
            name = operator_name(model, operation)
            found = SUBSTITUTES[name](model, graph, operation) if name in SUBSTITUTES else None
            made.extend([operation] if found is None else found)
            if found is not None:
                layer = f" of layer `{layer_name(operations[number])}`" if graph is model.subgraphs[0] else ""
                notes.append(f"{name}{layer} is written as {operator_name(model, found[0])}")
        graph.operators = made
    return (serialize(model), tuple(notes)) if notes else (content, ())


def _code(model: Any, name: str) -> int:
    """Return the number of an operator among the codes, added if it is not there."""
    number = getattr(schema.BuiltinOperator, name)
    for index, code in enumerate(model.operatorCodes):
        if max(int(code.builtinCode or 0), int(code.deprecatedBuiltinCode or 0)) == number:
            return index
    added = schema.OperatorCodeT()
    added.builtinCode, added.deprecatedBuiltinCode, added.version = number, min(number, 127), 2
    model.operatorCodes.append(added)
    return len(model.operatorCodes) - 1


def _select(model: Any, graph: Any, operation: Any) -> list[Any] | None:
    """SELECT of three tensors of one shape is SELECT_V2, which also broadcasts."""
    shapes = {tuple(np.ravel(graph.tensors[index].shape)) for index in operation.inputs}
    if len(shapes) != 1:
        return None
    operation.opcodeIndex = _code(model, "SELECT_V2")
    operation.builtinOptionsType = schema.BuiltinOptions.SelectV2Options
    operation.builtinOptions = schema.SelectV2OptionsT()
    return [operation]


def _tile(model: Any, graph: Any, operation: Any) -> list[Any] | None:
    """TILE is CONCATENATION of a tensor with itself, axis by axis."""
    data = model.buffers[graph.tensors[operation.inputs[1]].buffer].data
    wide = graph.tensors[operation.inputs[1]].type == schema.TensorType.INT64
    if data is None:
        return None
    counts = np.asarray(data, np.uint8).view(np.int64 if wide else np.int32)
    axes = [axis for axis, count in enumerate(counts) if count > 1]
    if not axes or counts.min() < 1 or counts.max() > _MOST_INPUTS:
        return None
    code = _code(model, "CONCATENATION")
    source, made = int(operation.inputs[0]), []
    for axis in axes:
        place = int(operation.outputs[0])
        if axis != axes[-1]:
            between = copy.deepcopy(graph.tensors[source])
            between.shape = np.array(between.shape, np.int32)
            between.shape[axis] *= counts[axis]
            between.shapeSignature, between.name, between.buffer = None, None, 0
            graph.tensors.append(between)
            place = len(graph.tensors) - 1
        step = schema.OperatorT()
        step.opcodeIndex, step.builtinOptionsType = code, schema.BuiltinOptions.ConcatenationOptions
        step.builtinOptions = schema.ConcatenationOptionsT()
        step.builtinOptions.axis = axis
        step.inputs = np.full(int(counts[axis]), source, np.int32)
        step.outputs = np.array([place], np.int32)
        made.append(step)
        source = place
    return made


# Operator to a function of the file's tree, the subgraph and the operator that gives those in its place; None where
# it can't be done.
SUBSTITUTES: dict[str, Callable[[Any, Any, Any], list[Any] | None]] = {"SELECT": _select, "TILE": _tile}
