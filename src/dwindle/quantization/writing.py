"""Writing quantized files, through ai-edge-quantizer; and reading back where it rounds."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dwindle.errors import ConversionError, UnsupportedModelError
from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, parse, read_graph, serialize
from dwindle.lifting.lifted import Grid, Grids
from dwindle.quantization.calibration import Ranges
from dwindle.quantization.fake_quantization import LARGEST_BIAS, quantized_range
from dwindle.quantization.schemes import Scheme

Statistics = dict[str, dict[str, np.ndarray]]

_INSERTED = {"QUANTIZE", "DEQUANTIZE"}


def write_quantized(content: bytes, scheme: Scheme, ranges: Ranges | None, *, io_type: str = "float32") -> bytes:
    """Return a quantized file made from a float file.

    A kind of operator whose quantized form LiteRT's kernels refuse to run stays float.

    Args:
        content: The float file.
        scheme: Widths; one that is not float32.
        ranges: Calibrated ranges, for schemes with fixed activation ranges.
        io_type: Type of the file's inputs and outputs where activations are integers.

    Raises:
        ConversionError: If the quantizer fails; its message is passed on.
    """
    kept: list[str] = []
    while True:
        written = _write(content, scheme, ranges, io_type, kept)
        refused = _refused_operator(written)
        if refused is None or refused in kept:
            return written
        kept.append(refused)


def _refused_operator(content: bytes) -> str | None:
    """Return the kind of operator that LiteRT's kernels refuse in a quantized file, such as SPLIT; None if none."""
    from dwindle.measuring.litert import LiteRTRunner

    try:
        LiteRTRunner(content)
    except UnsupportedModelError as error:
        found = re.search(r"delegate (\w+) node", str(error))
        return found.group(1) if found else None
    return None


def _write(content: bytes, scheme: Scheme, ranges: Ranges | None, io_type: str, kept_float: Sequence[str]) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer

    every = qtyping.TFLOperationName.ALL_SUPPORTED
    tool = quantizer.Quantizer(bytearray(content))
    names = quantizer.AlgorithmName
    if scheme.weights == 16:
        tool.update_quantization_recipe(
            ".*",
            every,
            qtyping.OpQuantizationConfig(
                weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
                compute_precision=qtyping.ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
            names.FLOAT_CASTING,
        )
    elif scheme.dynamic:
        tool.add_dynamic_config(".*", every, scheme.weights)
    else:
        tool.add_static_config(".*", every, scheme.activations, scheme.weights)
        if io_type == "float32":
            for place in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
                tool.update_quantization_recipe(".*", place, algorithm_key=names.NO_QUANTIZE)
        for kind in kept_float:
            tool.update_quantization_recipe(".*", qtyping.TFLOperationName(kind), algorithm_key=names.NO_QUANTIZE)
    if ranges is None:
        return _run(tool, None, scheme)
    statistics = _as_statistics(content, ranges)
    quantized = _run(tool, statistics, scheme)
    bounds = _bounds_for_biases(content, quantized)
    return _run(tool, {**statistics, **bounds}, scheme) if bounds else quantized


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


def _bounds_for_biases(content: bytes, quantized: bytes) -> Statistics:
    """Return wider ranges for weights whose channels are so small that their bias would overflow 32 bits.

    The quantizer would clip such a bias, in a channel that pruning has emptied for instance, to nothing.
    """
    grids = read_grids(content, quantized)
    found: Statistics = {}
    for operation in read_graph(content).operations:
        operand = grids.operands.get((operation.index, 0))
        if operand is None or len(operation.inputs) < 3:
            continue
        kernel, bias = operation.inputs[1], operation.inputs[2]
        if kernel is None or bias is None or kernel.value is None or bias.value is None:
            continue
        bits, per_channel = grids.weights.get(kernel.name, (0, False))
        if not bits:
            continue
        axis = kernel.value.ndim - 1 if operation.name == "DEPTHWISE_CONV_2D" else 0
        others = tuple(i for i in range(kernel.value.ndim) if i != axis or not per_channel)
        largest = np.abs(kernel.value).max(axis=others, keepdims=True)
        values = np.abs(bias.value)
        values = values.reshape(largest.shape) if per_channel else values.max()
        needed = values * np.float32(quantized_range(bits)[1] / operand.scale / LARGEST_BIAS)
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
    real = [op for op in quantized.operations if op.name not in _INSERTED or _in_original(op, original)]
    if [op.name for op in real] != [op.name for op in original.operations]:
        raise ConversionError("the quantized file does not have the float file's operators")
    makers = {tensor.index: op for op in quantized.operations for tensor in op.outputs}
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
                constant = _stored(tensor, makers)
                if constant is not None and constant.scale is not None and constant.bits <= 8:
                    per_channel = constant.scale.size > 1
                    grids.weights[source.name] = (constant.bits, per_channel)
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


def _in_original(op: Operation, original: Graph) -> bool:
    return any(op.name == other.name and op.outputs[0].name == other.outputs[0].name for other in original.operations)


def _grid(tensor: Tensor) -> Grid:
    scale, zero_point = np.ravel(tensor.scale), np.ravel(tensor.zero_point)  # type: ignore[arg-type]
    return Grid(scale=float(scale[0]), zero_point=int(zero_point[0]), bits=tensor.bits)


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


def _stored(tensor: Tensor, makers: dict[int, Operation]) -> Tensor | None:
    """Return the constant behind a tensor, through a DEQUANTIZE if there is one."""
    found: Tensor | None = tensor
    while found is not None and found.value is None:
        maker = makers.get(found.index)
        found = maker.inputs[0] if maker is not None and maker.name in _INSERTED else None
    return found
