"""Writing quantized files, through ai-edge-quantizer; and reading back where it rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dwindle.errors import ConversionError, UnsupportedModelError
from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, parse, read_graph, serialize
from dwindle.lifting.float_files import modern
from dwindle.lifting.grids import Grid, Grids, WeightGrid
from dwindle.quantization.assignment import QUANTIZER_NAMES, assign
from dwindle.quantization.calibration import Ranges
from dwindle.quantization.fake_quantization import LARGEST_BIAS, quantized_range
from dwindle.quantization.near_zero import kept_float
from dwindle.quantization.schemes import SCHEMES, Scheme

Statistics = dict[str, dict[str, np.ndarray]]

_INSERTED = {"QUANTIZE", "DEQUANTIZE"}
# Operators whose constant is a symmetric weight; in the others it is an operand like any activation.
SYMMETRIC = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL", "EMBEDDING_LOOKUP",
             "CONV_3D"}  # fmt: skip


def write_quantized(
    content: bytes,
    scheme: Scheme,
    ranges: Ranges | None,
    *,
    io_type: str = "float32",
    weight_bounds: Mapping[str, np.ndarray] | None = None,
    choices: Sequence[Scheme] | None = None,
) -> bytes:
    """Return a quantized file made from a float file.

    A kind of operator whose quantized form LiteRT's kernels refuse to run stays float, and so do operators around
    values that integers can't tell from 0 (see `dwindle.quantization.near_zero`).

    Args:
        content: The float file.
        scheme: Widths; one that is not float32.
        ranges: Calibrated ranges, for schemes with fixed activation ranges.
        io_type: Type of the file's inputs and outputs where activations are integers.
        weight_bounds: Float tensor name to the largest magnitude of each channel's grid, of a shape that broadcasts
            against the weight; the largest weight where it is left out.
        choices: One scheme for each operator, instead of what ``scheme`` gives it.

    Raises:
        ConversionError: If the quantizer fails; its message is passed on.
    """
    kept: list[str] = []
    graph = read_graph(content)
    per_operator = list(choices) if choices is not None else assign(graph, scheme)
    bounds = {name: np.asarray(bound, np.float32) for name, bound in (weight_bounds or {}).items()}
    bounds.update(_power_of_two_bounds(graph, per_operator, bounds))
    if ranges is not None:
        ranges = _power_of_two_ranges(graph, per_operator, ranges)
        per_operator = kept_float(graph, per_operator, ranges)
    while True:
        job = _Job(content=content, graph=graph, scheme=scheme, choices=per_operator, io_type=io_type, kept=kept)
        try:
            written = job.write(ranges, bounds)
        except ConversionError:
            # The quantizer does not say which operator it stumbles over, so each kind is left out in turn.
            kind = next((k for k in _kinds(graph, kept) if replace(job, kept=[*kept, k]).works(ranges, bounds)), None)
            if kind is None:
                raise
            kept.append(kind)
            continue
        refused = _refused_operator(written)
        if refused in kept or refused not in {operation.name for operation in graph.operations}:
            return written  # what runs it says what is wrong
        kept.append(refused)


def _kinds(graph: Graph, kept: Sequence[str]) -> list[str]:
    """Return the kinds of operators, those without weights first, that the quantizer knows and has not left out."""
    from ai_edge_quantizer import qtyping

    known = {name.value for name in qtyping.TFLOperationName}
    found = dict.fromkeys(operation.name for operation in graph.operations)
    listed = [kind for kind in found if QUANTIZER_NAMES.get(kind, kind) in known and kind not in kept]
    return sorted(listed, key=lambda kind: kind in SYMMETRIC)


def _refused_operator(content: bytes) -> str | None:
    """Return the kind of operator that LiteRT's kernels refuse in a quantized file, such as SPLIT; None if none."""
    from dwindle.measuring.litert import LiteRTRunner

    try:
        LiteRTRunner(content)
    except UnsupportedModelError as error:
        found = re.search(r"(?:delegate|tensorflow/lite/kernels\S*) (\w+) node|Node number \d+ \((\w+)\)", str(error))
        return (found.group(1) or found.group(2)) if found else None
    return None


def config(scheme: Scheme) -> Any:
    """Return a scheme in the quantizer's terms."""
    from ai_edge_quantizer import qtyping

    tensor, kind = qtyping.TensorQuantizationConfig, qtyping.TensorDataType
    integer, floating = qtyping.ComputePrecision.INTEGER, qtyping.ComputePrecision.FLOAT
    if scheme.weights == 16:
        return qtyping.OpQuantizationConfig(
            weight_tensor_config=tensor(num_bits=16, dtype=kind.FLOAT), compute_precision=floating,
            explicit_dequantize=True,
        )  # fmt: skip
    grain = {"channel": "CHANNELWISE", "tensor": "TENSORWISE"}.get(
        str(scheme.granularity), f"BLOCKWISE_{scheme.granularity}"
    )
    weights = tensor(num_bits=scheme.weights, symmetric=True, granularity=qtyping.QuantGranularity(grain))
    if not scheme.own_needs_data:
        return qtyping.OpQuantizationConfig(
            weight_tensor_config=weights, compute_precision=integer if scheme.dynamic else floating,
            explicit_dequantize=not scheme.dynamic,
        )  # fmt: skip
    activations = tensor(num_bits=scheme.activations, symmetric=scheme.activations == 16)
    return qtyping.OpQuantizationConfig(
        activation_tensor_config=activations, weight_tensor_config=weights, compute_precision=integer
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of the quantizer."""

    content: bytes
    graph: Graph
    scheme: Scheme
    choices: Sequence[Scheme]
    io_type: str
    kept: Sequence[str]

    def write(self, ranges: Ranges | None, bounds: Mapping[str, np.ndarray]) -> bytes:
        given: Statistics = {name: {"min": -bound, "max": bound} for name, bound in bounds.items()}
        if ranges is None:
            return _run(self._tool(), given or None, self.scheme)
        statistics = {**_as_statistics(self.content, ranges), **given}
        quantized = _run(self._tool(), statistics, self.scheme)
        wider = _bounds_for_biases(self.content, quantized, bounds)
        return _run(self._tool(), {**statistics, **wider}, self.scheme) if wider else quantized

    def works(self, ranges: Ranges | None, bounds: Mapping[str, np.ndarray]) -> bool:
        """Whether the quantizer writes a file."""
        try:
            self.write(ranges, bounds)
        except ConversionError:
            return False
        return True

    def _tool(self) -> Any:
        from ai_edge_quantizer import qtyping, quantizer

        tool = quantizer.Quantizer(bytearray(modern(self.content)))
        base = max(set(self.choices), key=list(self.choices).count) if self.choices else self.scheme
        every = qtyping.TFLOperationName.ALL_SUPPORTED
        self._rule(tool, ".*", every, base)
        for operation, choice in zip(self.graph.operations, self.choices, strict=True):
            if choice != base:
                self._rule(tool, f"^{re.escape(operation.outputs[0].name)};", every, choice)
        if any(choice.own_needs_data for choice in self.choices):
            for name in self._in_loops():
                self._rule(tool, f"^{re.escape(name)};", every, SCHEMES["float32"])
        places = (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT)
        for place in places:
            self._rule(tool, "^.*", place, self._interface())
        for kind in self.kept:
            name = qtyping.TFLOperationName(QUANTIZER_NAMES.get(kind, kind))
            self._rule(tool, "^.*$", name, SCHEMES["float32"])
        return tool

    def _in_loops(self) -> list[str]:
        """Return the outputs of the operators inside loops, whose ranges nobody can watch from outside."""
        return [
            bytes(graph.tensors[operator.outputs[0]].name).decode()
            for graph in parse(self.content).subgraphs[1:]
            for operator in graph.operators
            if len(operator.outputs)
        ]

    def _interface(self) -> Scheme:
        if self.io_type == "float32":
            return SCHEMES["float32"]
        return SCHEMES["int16x8" if self.io_type == "int16" else "int8"]

    def _rule(self, tool: Any, pattern: str, kind: Any, scheme: Scheme) -> None:
        from ai_edge_quantizer import qtyping, quantizer

        names = quantizer.AlgorithmName
        if scheme.weights == 32:
            tool.update_quantization_recipe(pattern, kind, algorithm_key=names.NO_QUANTIZE)
            return
        algorithm = names.FLOAT_CASTING if scheme.weights == 16 else names.MIN_MAX_UNIFORM_QUANT
        if self.io_type == "uint8" and kind in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            unsigned = qtyping.TensorQuantizationConfig(num_bits=8, symmetric=False, dtype=qtyping.TensorDataType.UINT)
            found = dataclasses.replace(config(scheme), activation_tensor_config=unsigned)
            tool.update_quantization_recipe(pattern, kind, found, algorithm)
            return
        tool.update_quantization_recipe(pattern, kind, config(scheme), algorithm)


def power_of_two(bound: np.ndarray | float, highest: int) -> np.ndarray:
    """Return the bound of the finest grid with a power-of-two step on which ``bound`` is not clipped."""
    step = np.exp2(np.ceil(np.log2(np.maximum(np.asarray(bound, np.float64), 1e-9) / highest)))
    return np.asarray(step * highest)


def _power_of_two_bounds(
    graph: Graph, choices: Sequence[Scheme], bounds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    found = {}
    for operation, choice in zip(graph.operations, choices, strict=True):
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if not choice.power_of_two or operation.name not in SYMMETRIC or kernel is None or kernel.value is None:
            continue
        largest = bounds.get(kernel.name)
        if largest is None:
            largest = channel_largest(operation, kernel.value, per_channel=choice.granularity == "channel")
        found[kernel.name] = power_of_two(largest, quantized_range(choice.weights)[1]).astype(np.float32)
    return found


def _power_of_two_ranges(graph: Graph, choices: Sequence[Scheme], ranges: Ranges) -> Ranges:
    found = dict(ranges)
    for operation, choice in zip(graph.operations, choices, strict=True):
        if not choice.power_of_two:
            continue
        later = operation.inputs[1:] if operation.name in SYMMETRIC else ()
        weights = [t for t in later if t is not None and t.value is not None]
        for tensor in (*operation.inputs, *operation.outputs):
            if tensor is None or tensor.dtype != np.float32 or any(tensor is w for w in weights):
                continue
            if tensor.name in ranges or tensor.value is not None:
                low, high = ranges.get(tensor.name, (0.0, 0.0))
                if tensor.value is not None:
                    low, high = float(tensor.value.min()), float(tensor.value.max())
                bound = float(power_of_two(max(-low, high, 1e-9), 127))
                found[tensor.name] = (-bound * 128 / 127, bound)
    return found


def channel_axis(operation: Operation, rank: int) -> int:
    """Return the axis of a kernel, as the file has it, along which its output channels lie."""
    return rank - 1 if operation.name == "DEPTHWISE_CONV_2D" else 0


def channel_largest(operation: Operation, value: np.ndarray, *, per_channel: bool = True) -> np.ndarray:
    """Return the largest magnitude in each output channel of a kernel of the file (axes kept), or in all of it."""
    axis = channel_axis(operation, value.ndim)
    others = tuple(i for i in range(value.ndim) if i != axis or not per_channel)
    found: np.ndarray = np.abs(value).max(axis=others, keepdims=True)
    return found


def _run(tool: Any, statistics: Statistics | None, scheme: Scheme) -> bytes:
    try:
        with _quiet():
            result = tool.quantize(statistics, enable_progress_bar=False, enable_progress_report=False)
    except Exception as error:
        raise ConversionError(
            f"ai-edge-quantizer could not write scheme `{scheme.name}`: {type(error).__name__}: {error}"
        ) from error
    if result.quantized_model is None:
        raise ConversionError(f"ai-edge-quantizer wrote no file for scheme `{scheme.name}`")
    # The quantizer puts constants behind the flatbuffer, where TensorFlow Lite Micro does not find them.
    return serialize(parse(bytes(result.quantized_model)))


def _bounds_for_biases(content: bytes, quantized: bytes, given: Mapping[str, np.ndarray]) -> Statistics:
    """Return wider ranges for weights whose channels are so small that their bias would overflow 32 bits.

    The quantizer would clip such a bias, in a channel that pruning has emptied for instance, to nothing.
    """
    grids = read_grids(content, quantized)
    found: Statistics = {}
    for operation in read_graph(content).operations:
        operand = grids.operands.get((operation.index, 0))
        if operand is None or len(operation.inputs) < 3 or operand.bits > 8:
            continue
        kernel, bias = operation.inputs[1], operation.inputs[2]
        if kernel is None or bias is None or kernel.value is None or bias.value is None:
            continue
        stored = grids.weights.get(kernel.name)
        if stored is None:
            continue
        largest = given.get(kernel.name)
        if largest is None:
            largest = channel_largest(operation, kernel.value, per_channel=stored.per_channel)
        values = np.abs(bias.value)
        values = values.reshape(largest.shape) if stored.per_channel else values.max()
        needed = values * np.float32(quantized_range(stored.bits)[1] / operand.scale / LARGEST_BIAS)
        if (needed > largest).any():
            bound = np.maximum(largest, needed).astype(np.float32)
            found[kernel.name] = {"min": -bound, "max": bound}
    return found


def _as_statistics(content: bytes, ranges: Ranges) -> Statistics:
    ranks = {tensor.name: len(tensor.shape) for tensor in read_graph(content).tensors}
    return {
        name: {"min": np.full([1] * ranks.get(name, 0), low, np.float32),
               "max": np.full([1] * ranks.get(name, 0), high, np.float32)}
        for name, (low, high) in ranges.items()
    }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's chatter off the screen."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
            # A bias that overflows is found and mended by `_bounds_for_biases`.
            np.errstate(invalid="ignore", over="ignore"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def read_grids(float_content: bytes, quantized_content: bytes) -> Grids:
    """Read off a quantized file where it rounds, in terms of the float file's operators and tensors.

    The quantizer keeps the operators in their order and inserts QUANTIZE and DEQUANTIZE between them; those are
    the grids that a value passes on its way.

    Raises:
        ConversionError: If the two files do not have the same operators.
    """
    original, quantized = read_graph(float_content), read_graph(quantized_content)
    real = counterparts(original, quantized)
    makers = makers_in(quantized)
    kept = {id(op) for op in real}
    grids = Grids()
    for before, after in zip(original.operations, real, strict=True):
        for number, made in enumerate(after.outputs):
            if made.is_quantized:
                grids.outputs[before.index, number] = _grid(made)
        for position, tensor in enumerate(after.inputs):
            source = before.inputs[position] if position < len(before.inputs) else None
            if tensor is None or source is None or source.dtype != np.float32:
                continue
            if source.value is not None:
                constant = stored_constant(tensor, makers)
                if constant is not None and constant.is_quantized:
                    per_channel = constant.block > 0 or (constant.scale is not None and constant.scale.size > 1)
                    grids.weights[source.name] = WeightGrid(
                        bits=constant.bits, per_channel=per_channel, block=constant.block,
                        asymmetric=before.name not in SYMMETRIC,
                    )  # fmt: skip
                    if before.name not in SYMMETRIC:
                        grids.operands[before.index, position] = _grid(constant)
                    if constant is tensor and position == 1 and after.outputs[0].dtype == np.float32:
                        grids.dynamic.add(before.index)
                continue
            if tensor.is_quantized:
                grids.operands[before.index, position] = _grid(tensor)
            path = _passed(tensor, makers, kept)
            if path:
                grids.edges[before.index, position] = path
    for number, (given, entry) in enumerate(zip(quantized.inputs, original.inputs, strict=True)):
        if given.is_quantized and entry.dtype == np.float32:
            grids.inputs[number] = _grid(given)
    for number, result in enumerate(quantized.outputs):
        path = _passed(result, makers, kept)
        if path:
            grids.final[number] = path
    return grids


def counterparts(original: Graph, quantized: Graph) -> list[Operation]:
    """Return the operator of a quantized file for each one of the float file, by their order: names may be left out.

    Raises:
        ConversionError: If the two files do not have the same operators.
    """
    real = [op for op in quantized.operations if op.name not in _INSERTED or _in_original(op, original)]
    if [op.name for op in real] != [op.name for op in original.operations]:
        raise ConversionError("the quantized file does not have the float file's operators")
    return real


def makers_in(graph: Graph) -> dict[int, Operation]:
    """Return the operator that makes each tensor, by the tensor's number."""
    return {tensor.index: operation for operation in graph.operations for tensor in operation.outputs}


def _in_original(op: Operation, original: Graph) -> bool:
    return any(op.name == other.name and op.outputs[0].name == other.outputs[0].name for other in original.operations)


def _grid(tensor: Tensor) -> Grid:
    scale, zero_point = np.ravel(tensor.scale), np.ravel(tensor.zero_point)  # type: ignore[arg-type]
    shift = 128 if tensor.dtype == np.uint8 else 0
    return Grid(scale=float(scale[0]), zero_point=int(zero_point[0]) - shift, bits=tensor.bits)


def _passed(tensor: Tensor, makers: dict[int, Operation], kept: set[int]) -> tuple[Grid, ...]:
    """Return the grids of the QUANTIZE operators between a tensor and what really produced it."""
    passed: list[Grid] = []
    while (maker := makers.get(tensor.index)) is not None and id(maker) not in kept:
        if tensor.is_quantized:
            passed.append(_grid(tensor))
        source = maker.inputs[0]
        if source is None:
            break
        tensor = source
    return tuple(reversed(passed))


def stored_constant(tensor: Tensor, makers: dict[int, Operation]) -> Tensor | None:
    """Return the constant behind a tensor, through a DEQUANTIZE if there is one.

    Args:
        tensor: A tensor of a quantized file.
        makers: From `makers_in`.
    """
    found: Tensor | None = tensor
    while found is not None and found.value is None:
        maker = makers.get(found.index)
        found = maker.inputs[0] if maker is not None and maker.name in _INSERTED else None
    return found
