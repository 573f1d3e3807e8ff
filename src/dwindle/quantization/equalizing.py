"""Cross-layer equalization, and biases that belong to one kernel alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, parse, read_graph, replace_constants, serialize
from dwindle.quantization.writing import channel_largest

KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# Operators through which a channel's positive factor passes unchanged.
_HOMOGENEOUS = {"MAX_POOL_2D", "AVERAGE_POOL_2D", "MEAN", "RELU", "LEAKY_RELU", "PRELU", "PAD"}
_SWEEPS = 100


def equalize(content: bytes) -> bytes:
    """Return a file that computes the same, the ranges of consecutive kernels brought together channel by channel.

    Channel ``i`` between two kernels is divided by ``s_i = sqrt(r1_i / r2_i)`` in the first and multiplied in the
    second, for the largest weights ``r1_i``, ``r2_i`` that make and read it; pair after pair, until all factors are
    within 1% of 1. Between the two may be operators that a positive factor passes, such as ReLU and pooling; not ReLU6,
    whose ceiling would have to move. Biases are scaled along, large ones are not absorbed.

    Args:
        content: A float file.

    References:
        Nagel et al. 2019, arXiv 1906.04721, section 4.1 (without the absorption of high biases).
    """
    content = with_own_biases(content)
    graph = read_graph(content)
    pairs = list(_pairs(graph))
    values = {
        tensor.name: tensor.value.astype(np.float64)
        for pair in pairs
        for operation in pair
        for tensor in operation.inputs[1:3]
        if tensor is not None and tensor.value is not None
    }
    for _ in range(_SWEEPS):
        farthest = 0.0
        for first, second in pairs:
            factor = _factors(first, second, values)
            farthest = max(farthest, float(np.abs(np.log(factor)).max()))
            _scale(first, second, factor, values)
        if farthest < 0.01:
            break
    return replace_constants(content, values)


def weighted(graph: Graph) -> list[Operation]:
    """Return the operators with a constant kernel whose inputs can be laid out as rows."""
    found = []
    for operation in graph.operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if operation.name in KERNELS and kernel is not None and kernel.value is not None:
            found.append(operation)
    return found


def input_channels(operation: Operation) -> int:
    """Return the size of an operator's input along its last axis."""
    given = operation.inputs[0]
    return 1 if given is None else int(given.shape[-1])


def groups_of(operation: Operation) -> int:
    """Return the number of groups of a convolution; 1 for other operators, depthwise ones too."""
    kernel = operation.inputs[1]
    if operation.name != "CONV_2D" or kernel is None:
        return 1
    return max(1, input_channels(operation) // kernel.shape[-1])


def with_own_biases(content: bytes, *, missing: bool = False) -> bytes:
    """Return the file with a bias tensor for each kernel; the converter merges equal constants, such as zeros.

    Args:
        content: A float file. It comes back as it is where there is nothing to do.
        missing: Whether operators without a bias get one of zeros.
    """
    graph = read_graph(content)
    names = {tensor.name for tensor in graph.tensors}
    readers: dict[int, set[int]] = {}  # bias to what reads it: a kernel, or -1 for anything else
    for operation in graph.operations:
        for position, tensor in enumerate(operation.inputs):
            if tensor is not None and tensor.value is not None:
                kernel = operation.inputs[1] if operation.name in KERNELS and position == 2 else None
                readers.setdefault(tensor.index, set()).add(-1 if kernel is None else kernel.index)
    model = parse(content)
    made: dict[tuple[int, int], int] = {}
    for operation in weighted(graph):
        kernel, bias = operation.inputs[1], operation.inputs[2] if len(operation.inputs) > 2 else None
        if kernel is None or kernel.dtype != np.float32 or (bias is None and not missing):
            continue
        if bias is not None and (bias.value is None or len(readers[bias.index]) == 1):
            continue
        key = (kernel.index, -1 if bias is None else bias.index)
        if key not in made:
            size = kernel.shape[-1] if operation.name == "DEPTHWISE_CONV_2D" else kernel.shape[0]
            value = np.zeros(size, np.float32) if bias is None or bias.value is None else bias.value
            made[key] = _add_constant(model, _unused(f"{kernel.name}_bias", names), value)
        place = model.subgraphs[0].operators[operation.index]
        place.inputs = np.array([*list(place.inputs)[:2], made[key], *list(place.inputs)[3:]], np.int32)
    return serialize(model) if made else content


def _unused(name: str, names: set[str]) -> str:
    count, found = 0, name
    while found in names:
        count += 1
        found = f"{name}_{count}"
    names.add(found)
    return found


def _add_constant(model: Any, name: str, value: np.ndarray) -> int:
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = np.ascontiguousarray(value, np.float32).view(np.uint8).reshape(-1).copy()
    model.buffers.append(buffer)
    tensor.name, tensor.shape, tensor.type = name.encode("utf8"), np.array(value.shape, np.int32), 0
    tensor.buffer, tensor.hasRank = len(model.buffers) - 1, True
    model.subgraphs[0].tensors.append(tensor)
    return len(model.subgraphs[0].tensors) - 1


def _pairs(graph: Graph) -> Iterator[tuple[Operation, Operation]]:
    """Yield kernels that follow each other with nothing else reading what is between them, nor their constants."""
    readers: dict[int, list[Operation]] = {}
    for operation in graph.operations:
        for tensor in operation.inputs:
            if tensor is not None:
                readers.setdefault(tensor.index, []).append(operation)
    ends = {tensor.index for tensor in graph.outputs}

    def own(operation: Operation) -> bool:
        constants = [tensor for tensor in operation.inputs[1:3] if tensor is not None]
        return all(len(readers[t.index]) == 1 and t.value is not None and t.dtype == np.float32 for t in constants)

    for first in weighted(graph):
        if not _passes(first) or groups_of(first) > 1 or not own(first):
            continue
        tensor = first.outputs[0]
        while len(readers.get(tensor.index, ())) == 1 and tensor.index not in ends:
            second = readers[tensor.index][0]
            if second.name in _HOMOGENEOUS and _passes(second):
                tensor = second.outputs[0]
                continue
            if second.name in KERNELS and own(second) and _reads(second, tensor, first.outputs[0].shape[-1]):
                yield first, second
            break


def _passes(operation: Operation) -> bool:
    """Whether what an operator ends in, nothing or ReLU, and what it averages over leave a channel's factor alone."""
    if operation.options.get("fusedActivationFunction", 0) not in (0, 1):
        return False
    if operation.name != "MEAN":
        return True
    given, axes = operation.inputs[0], operation.inputs[1]
    if given is None or axes is None or axes.value is None:
        return False
    return len(given.shape) - 1 not in [int(axis) % len(given.shape) for axis in np.ravel(axes.value)]


def _reads(second: Operation, tensor: Tensor, channels: int) -> bool:
    given, kernel = second.inputs[0], second.inputs[1]
    if given is None or kernel is None or given.index != tensor.index or groups_of(second) > 1:
        return False
    return given.shape[-1] == channels and kernel.shape[-1] == channels


def _factors(first: Operation, second: Operation, values: dict[str, np.ndarray]) -> np.ndarray:
    made, read = _kernel(first), _kernel(second)
    high = channel_largest(first, values[made.name]).reshape(-1)
    low = np.abs(values[read.name]).reshape(-1, read.shape[-1]).max(axis=0)
    usable = (high > 1e-8) & (low > 1e-8)
    return np.where(usable, np.sqrt(np.where(usable, high, 1.0) / np.where(usable, low, 1.0)), 1.0)


def _scale(first: Operation, second: Operation, factor: np.ndarray, values: dict[str, np.ndarray]) -> None:
    made, read = _kernel(first), _kernel(second)
    along = factor if first.name == "DEPTHWISE_CONV_2D" else factor.reshape(-1, *[1] * (len(made.shape) - 1))
    values[made.name] = values[made.name] / along
    bias = first.inputs[2] if len(first.inputs) > 2 else None
    if bias is not None:
        values[bias.name] = values[bias.name] / factor.reshape(bias.shape)
    values[read.name] = values[read.name] * factor


def _kernel(operation: Operation) -> Tensor:
    kernel = operation.inputs[1]
    if kernel is None:
        raise ValueError("no kernel")
    return kernel
