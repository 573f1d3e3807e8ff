"""Which operators stay float since their integers could not be told from 0.

``1 / x`` and ``log x`` change most where ``x`` is small, and there an integer grid, which is laid out for the largest
``x``, has the fewest steps: a variance of a thousandth of the largest is 0 on a grid of 8 bits, its reciprocal is
anything, and LiteRT stops at a division by 0. What is computed from such values alone, up to the next layer with
weights, stays float as well, since its own values span as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dwindle.lifting.flatbuffer import Graph, Operation, Tensor
from dwindle.quantization.calibration import Ranges
from dwindle.quantization.schemes import SCHEMES, Scheme

#: An argument has to stay this many steps of its grid away from 0: the step is then at most a quarter of it.
CLEAR_STEPS = 4
# The place of the argument that must not come close to 0.
_ARGUMENTS = {"DIV": 1, "RSQRT": 0, "LOG": 0}
_ENTRY_BY_ENTRY = {"ADD", "SUB", "MUL", "DIV", "RESHAPE", "NEG"}
# What is 0 where its input is.
_PASSED = {"SQRT", "RESHAPE", "EXPAND_DIMS", "SQUEEZE", "BROADCAST_TO"}
_STATISTICS = _ENTRY_BY_ENTRY | {
    "SQUARED_DIFFERENCE", "SQUARE", "SQRT", "EXP", "ABS", "RELU", "MAXIMUM", "MINIMUM", "MEAN", "SUM", "REDUCE_MAX",
    "BROADCAST_TO", "EXPAND_DIMS", "SQUEEZE",
}  # fmt: skip


def kept_float(graph: Graph, choices: Sequence[Scheme], ranges: Ranges) -> list[Scheme]:
    """Return one scheme for each operator: those around values that come too close to 0 are float32.

    Args:
        graph: The float file's.
        choices: One scheme for each operator.
        ranges: Calibrated ranges.
    """
    makers = {tensor.index: operation for operation in graph.operations for tensor in operation.outputs}
    found = {
        operation.index
        for operation, choice in zip(graph.operations, choices, strict=True)
        if choice.own_needs_data and any(_close(t, choice, ranges) for t in _arguments(operation, makers))
    }
    if not found:
        return list(choices)
    _follow(graph, found)
    _trace_back(graph, found)
    return [
        SCHEMES["float32"] if operation.index in found and choice.own_needs_data else choice
        for operation, choice in zip(graph.operations, choices, strict=True)
    ]


def _arguments(operation: Operation, makers: Mapping[int, Operation]) -> Iterator[Tensor]:
    """Yield the tensors that must not come close to 0: the argument, and what it is the root of or a copy of."""
    place = _ARGUMENTS.get(operation.name)
    argument = operation.inputs[place] if place is not None else None
    while argument is not None and argument.value is None:
        yield argument
        maker = makers.get(argument.index)
        argument = maker.inputs[0] if maker is not None and maker.name in _PASSED else None


def _close(tensor: Tensor, scheme: Scheme, ranges: Ranges) -> bool:
    low, high = ranges.get(tensor.name, (1.0, 1.0))
    step = (max(high, 0.0) - min(low, 0.0)) / (2**scheme.activations - 1)
    return bool(max(low, -high) < CLEAR_STEPS * step)


def _follow(graph: Graph, found: set[int]) -> None:
    """Add what is computed entry by entry from results of ``found``; a sum only where both operands come from there."""
    made = {tensor.index for operation in graph.operations if operation.index in found for tensor in operation.outputs}
    for operation in graph.operations:
        moving = [tensor.index for tensor in operation.inputs if tensor is not None and tensor.value is None]
        enough = all if operation.name in ("ADD", "SUB") else any
        if operation.name in _ENTRY_BY_ENTRY and moving and enough(index in made for index in moving):
            found.add(operation.index)
            made |= {tensor.index for tensor in operation.outputs}


def _trace_back(graph: Graph, found: set[int]) -> None:
    """Add what is computed for operators of ``found`` alone."""
    readers: dict[int, set[int]] = {}
    for operation in graph.operations:
        for tensor in operation.inputs:
            if tensor is not None:
                readers.setdefault(tensor.index, set()).add(operation.index)
    ends = {tensor.index for tensor in graph.outputs}
    for operation in reversed(graph.operations):
        made = {tensor.index for tensor in operation.outputs}
        those = set().union(*(readers.get(index, set()) for index in made))
        if operation.name in _STATISTICS and those and those <= found and not made & ends:
            found.add(operation.index)
