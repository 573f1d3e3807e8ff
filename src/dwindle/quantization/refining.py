"""After training, without labels: better weights for a narrow grid, found from the float file and some samples.

Each method takes a float file and gives one back, with other constants in it; the grids of the weights are then fixed
by explicit bounds, so that the quantized file gets exactly what the method chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dwindle.lifting.flatbuffer import Graph, Operation, Tensor, read_graph, replace_constants
from dwindle.quantization.calibration import activations
from dwindle.quantization.fake_quantization import quantized_range
from dwindle.quantization.schemes import Scheme
from dwindle.quantization.writing import SYMMETRIC, channel_largest

_KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# Second moments are held for kernels with at most this many inputs an output: 16 MB each.
LARGEST_KERNEL = 2048
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What enters an operator, over the samples.

    Attributes:
        mean: Mean of each kernel input, shape ``(groups, inputs)``; one group but for depthwise kernels.
        moment: Mean of products ``x x^T``, shape ``(groups, inputs, inputs)``; None for kernels that are too large.
    """

    mean: np.ndarray
    moment: np.ndarray | None


def as_rows(operation: Operation, kernel: np.ndarray) -> np.ndarray:
    """Return a kernel as ``(groups, outputs a group, inputs)``; the group is the channel of a depthwise kernel."""
    if operation.name == "DEPTHWISE_CONV_2D":
        channels = _input_channels(operation)
        flat = kernel.reshape(-1, channels, kernel.shape[-1] // channels)
        return np.ascontiguousarray(flat.transpose(1, 2, 0))
    groups = _groups(operation)
    return kernel.reshape(groups, kernel.shape[0] // groups, -1)


def from_rows(operation: Operation, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a kernel in the file's own shape; the inverse of `as_rows`."""
    if operation.name == "DEPTHWISE_CONV_2D":
        rows = rows.transpose(2, 0, 1)
    return np.ascontiguousarray(rows).reshape(shape)


def _input_channels(operation: Operation) -> int:
    given = operation.inputs[0]
    return 1 if given is None else int(given.shape[-1])


def _groups(operation: Operation) -> int:
    kernel = operation.inputs[1]
    if operation.name != "CONV_2D" or kernel is None:
        return 1
    return max(1, _input_channels(operation) // kernel.shape[-1])


def weighted(graph: Graph) -> list[Operation]:
    """Return the operators with a constant kernel whose inputs can be laid out as rows."""
    found = []
    for operation in graph.operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if operation.name in _KERNELS and kernel is not None and kernel.value is not None:
            found.append(operation)
    return found


def input_statistics(
    content: bytes, samples: Sequence[np.ndarray], *, moments: bool = True, seed: int = 0
) -> dict[int, InputStatistics]:
    """Run a float file over samples and return, by operator number, what enters its kernel.

    Of each batch at most 4,096 positions of an image are taken, at random.

    Args:
        content: The float file.
        samples: One array per input.
        moments: Whether second moments are taken too.
        seed: Of the random positions.
    """
    generator = np.random.default_rng(seed)
    graph = read_graph(content)
    readers: dict[str, list[Operation]] = {}
    for operation in weighted(graph):
        given = operation.inputs[0]
        if given is not None and given.value is None:
            readers.setdefault(given.name, []).append(operation)
    sums: dict[int, np.ndarray] = {}
    products: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    for _, value, tensor in activations(content, samples, names=set(readers)):
        for operation in readers[tensor.name]:
            rows = _patches(operation, value)
            if rows.shape[1] > _ROWS:
                rows = rows[:, generator.choice(rows.shape[1], _ROWS, replace=False)]
            rows = rows.astype(np.float64)
            number = operation.index
            sums[number] = sums.get(number, 0.0) + rows.sum(axis=1)
            counts[number] = counts.get(number, 0) + rows.shape[1]
            if moments and rows.shape[2] <= LARGEST_KERNEL:
                products[number] = products.get(number, 0.0) + np.einsum("gnd,gne->gde", rows, rows, optimize=True)
    return {
        number: InputStatistics(
            mean=total / counts[number],
            moment=None if number not in products else products[number] / counts[number],
        )
        for number, total in sums.items()
    }


def _patches(operation: Operation, value: np.ndarray) -> np.ndarray:
    """Return what a kernel is multiplied with, shape ``(groups, positions, inputs)``."""
    kernel = operation.inputs[1]
    if kernel is None:
        raise ValueError("no kernel")
    if operation.name == "FULLY_CONNECTED":
        return value.reshape(1, -1, kernel.shape[-1])
    height, width = kernel.shape[1:3]
    options = operation.options
    strides = options["strideH"], options["strideW"]
    dilation = options["dilationHFactor"], options["dilationWFactor"]
    spans = (height - 1) * dilation[0] + 1, (width - 1) * dilation[1] + 1
    if options["padding"] == 0:  # same
        pads = []
        for size, stride, span in zip(value.shape[1:3], strides, spans, strict=True):
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            pads.append((total // 2, total - total // 2))
        value = np.pad(value, ((0, 0), *pads, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(value, spans, axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
    # (n, h, w, c, kh, kw): per channel for depthwise kernels, else kh, kw, c as the file lays them out.
    channels = value.shape[-1]
    if operation.name == "DEPTHWISE_CONV_2D":
        return windows.transpose(3, 0, 1, 2, 4, 5).reshape(channels, -1, height * width)
    groups = _groups(operation)
    parts = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, height * width, groups, channels // groups)
    return parts.transpose(2, 0, 1, 3).reshape(groups, -1, height * width * (channels // groups))


def clipped_bounds(graph: Graph, choices: Sequence[Scheme]) -> dict[str, np.ndarray]:
    """Return, for each quantized kernel, the bound per channel whose grid has the least squared error.

    Candidates are 30% to 100% of the largest weight, in steps of 1%.
    """
    found = {}
    for operation, choice in zip(graph.operations, choices, strict=True):
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if operation.name not in SYMMETRIC or choice.weights > 8 or kernel is None or kernel.value is None:
            continue
        if not isinstance(choice.granularity, str):
            continue
        weight = kernel.value.astype(np.float64)
        largest = channel_largest(operation, weight, per_channel=choice.granularity == "channel")
        low, high = quantized_range(choice.weights, narrow=choice.weights >= 8)
        axes = tuple(axis for axis in range(weight.ndim) if largest.shape[axis] == 1)
        best, bound = np.full(largest.shape, np.inf), largest.copy()
        for share in np.linspace(0.3, 1.0, 71):
            scale = np.maximum(largest * share, 1e-9) / high
            error = ((np.clip(np.rint(weight / scale), low, high) * scale - weight) ** 2).sum(axis=axes, keepdims=True)
            better = error < best
            best, bound = np.where(better, error, best), np.where(better, largest * share, bound)
        found[kernel.name] = bound.astype(np.float32)
    return found


def gptq(rows: np.ndarray, scale: np.ndarray, low: int, high: int, moment: np.ndarray) -> np.ndarray:
    """Round a kernel input by input, and let the inputs not yet rounded make up for each error.

    Args:
        rows: Kernel ``(outputs, inputs)``.
        scale: Step of each output, ``(outputs, 1)``.
        low: Smallest integer.
        high: Largest integer.
        moment: Mean ``x x^T`` of the inputs, ``(inputs, inputs)``.

    Returns:
        Integers, of the kernel's shape.

    References:
        Frantar et al. 2023, arXiv 2210.17323.
    """
    weight = rows.astype(np.float64).copy()
    hessian = moment.astype(np.float64).copy()
    diagonal = np.einsum("ii->i", hessian)
    diagonal[diagonal == 0] = 1.0
    diagonal += 0.01 * diagonal.mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        found[:, column] = np.clip(np.rint(weight[:, column] / scale[:, 0]), low, high)
        error = (weight[:, column] - found[:, column] * scale[:, 0]) / upper[column, column]
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return found


def adaround(rows: np.ndarray, scale: np.ndarray, low: int, high: int, moment: np.ndarray) -> np.ndarray:
    """Learn for each weight whether it is rounded up or down, so that the layer's output changes least.

    The output's mean squared error is ``dW M dW^T`` for the inputs' second moment ``M``, so no sample is needed twice.
    Arguments and result as in `gptq`.

    References:
        Nagel et al. 2020, arXiv 2004.10568.
    """
    steps = 800
    weight = rows.astype(np.float64) / scale
    floor = np.clip(np.floor(weight), low, high)
    rest = np.clip(weight - floor, 0.01, 0.99)
    value = -np.log(1.2 / (rest + 0.1) - 1.0)
    size = max(float(np.einsum("ii->", moment)) / len(moment), 1e-12)
    relative = moment / size
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step in range(1, steps + 1):
        gate = 1.0 / (1.0 + np.exp(-value))
        soft = np.clip(1.2 * gate - 0.1, 0.0, 1.0)
        slope = np.where((soft > 0) & (soft < 1), 1.2 * gate * (1 - gate), 0.0)
        gradient = 2.0 * ((np.clip(floor + soft, low, high) - weight) @ relative)
        if step > steps // 5:  # the first fifth is without the pull towards 0 and 1
            beta = 20.0 - 18.0 * (step - steps // 5) / (steps - steps // 5)
            away = np.abs(2.0 * soft - 1.0)
            gradient += 0.01 * -beta * 2.0 * np.sign(2.0 * soft - 1.0) * away ** (beta - 1.0)
        gradient *= slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value -= 0.02 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
    found: np.ndarray = np.clip(floor + (value >= 0), low, high)
    nearest = np.clip(np.rint(weight), low, high)

    def error(chosen: np.ndarray) -> np.ndarray:
        apart = chosen - weight
        return np.asarray(((apart @ moment) * apart).sum(axis=1))

    worse = error(found) > error(nearest)  # learning may end where an output was better off before
    found[worse] = nearest[worse]
    return found


Rounding = Callable[[np.ndarray, np.ndarray, int, int, np.ndarray], np.ndarray]
# How kernels are rounded; None: each weight to the nearest step.
ROUNDINGS: dict[str, Rounding | None] = {"nearest": None, "adaround": adaround, "gptq": gptq}


def round_weights(
    content: bytes,
    choices: Sequence[Scheme],
    bounds: Mapping[str, np.ndarray],
    statistics: Mapping[int, InputStatistics],
    method: Rounding,
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the file with its kernels on the grids that they will be stored on, and the bounds of those grids.

    Args:
        content: The float file.
        choices: Each operator's scheme.
        bounds: Bounds that are given; the largest weight of each channel where one is not.
        statistics: What `input_statistics` returned.
        method: One of `ROUNDINGS`.
    """
    graph = read_graph(content)
    values: dict[str, np.ndarray] = {}
    found = dict(bounds)
    for operation in weighted(graph):
        choice, known = choices[operation.index], statistics.get(operation.index)
        kernel = operation.inputs[1]
        if choice.weights > 8 or known is None or known.moment is None or kernel is None or kernel.value is None:
            continue
        if not isinstance(choice.granularity, str) or kernel.name in values:
            continue
        bound = found.get(kernel.name)
        if bound is None:
            bound = channel_largest(operation, kernel.value, per_channel=choice.granularity == "channel")
        low, high = quantized_range(choice.weights, narrow=choice.weights >= 8)
        scale = np.maximum(np.asarray(bound, np.float32), np.float32(1e-9)) / np.float32(high)
        rows = as_rows(operation, kernel.value)
        steps = as_rows(operation, np.broadcast_to(scale, kernel.shape))
        integers = np.stack(
            [method(w, s[:, :1], low, high, m) for w, s, m in zip(rows, steps, known.moment, strict=True)]
        )
        values[kernel.name] = from_rows(operation, integers * steps, kernel.shape).astype(np.float32)
        found[kernel.name] = np.asarray(bound, np.float32)
    return replace_constants(content, values), found


def rounded_kernel(operation: Operation, kernel: Tensor, choice: Scheme, bound: np.ndarray | None) -> np.ndarray:
    """Return a kernel as the quantized file holds it, as floats."""
    if kernel.value is None:
        raise ValueError("no constant")
    if bound is None:
        bound = channel_largest(operation, kernel.value, per_channel=choice.granularity == "channel")
    low, high = quantized_range(choice.weights, narrow=choice.weights >= 8)
    scale = np.maximum(np.asarray(bound, np.float32), np.float32(1e-9)) / np.float32(high)
    return np.asarray(np.clip(np.rint(kernel.value / scale), low, high) * scale)


def correct_biases(
    content: bytes,
    original: bytes,
    choices: Sequence[Scheme],
    bounds: Mapping[str, np.ndarray],
    statistics: Mapping[int, InputStatistics],
) -> bytes:
    """Return the file with biases that take up the shift of each output's mean that rounding its kernel makes.

    ``b' = b - (W_rounded - W) E[x]``

    References:
        Nagel et al. 2019, arXiv 1906.04721, section 4.2.
    """
    before = {op.index: op for op in weighted(read_graph(original))}
    values: dict[str, np.ndarray] = {}
    for operation in weighted(read_graph(content)):
        kernel = operation.inputs[1]
        bias = operation.inputs[2] if len(operation.inputs) > 2 else None
        choice, known = choices[operation.index], statistics.get(operation.index)
        if bias is None or bias.value is None or kernel is None or known is None or choice.weights > 8:
            continue
        if not isinstance(choice.granularity, str) or bias.name in values:
            continue
        source = before[operation.index].inputs[1]
        if source is None or source.value is None:
            continue
        apart = rounded_kernel(operation, kernel, choice, bounds.get(kernel.name)) - source.value
        shift = np.einsum("goi,gi->go", as_rows(operation, apart.astype(np.float64)), known.mean).reshape(-1)
        values[bias.name] = (bias.value - shift.reshape(bias.shape)).astype(np.float32)
    return replace_constants(content, values)


# Operators through which a channel's positive factor passes unchanged.
_HOMOGENEOUS = {"MAX_POOL_2D", "AVERAGE_POOL_2D", "RELU", "LEAKY_RELU", "PRELU", "PAD"}


def equalize(content: bytes) -> bytes:
    """Return a file that computes the same, the ranges of consecutive kernels brought together channel by channel.

    Channel ``i`` between two kernels is divided by ``s_i = sqrt(r1_i / r2_i)`` in the first and multiplied in the
    second, for the largest weights ``r1_i``, ``r2_i`` that make and read it. Between them may be operators that
    a positive factor passes, such as ReLU and pooling.

    References:
        Nagel et al. 2019, arXiv 1906.04721, section 4.1.
    """
    for _ in range(20):
        graph = read_graph(content)
        values: dict[str, np.ndarray] = {}
        largest = 0.0
        for first, second in _pairs(graph):
            tensors = [t for op in (first, second) for t in op.inputs[1:3] if t is not None]
            if any(t.name in values for t in tensors):
                continue
            factor = _factors(first, second)
            largest = max(largest, float(np.abs(np.log(factor)).max()))
            _scale(first, second, factor, values)
        content = replace_constants(content, values)
        if largest < 0.01:
            break
    return content


def _pairs(graph: Graph) -> list[tuple[Operation, Operation]]:
    """Return kernels that follow each other with nothing else reading what is between them."""
    readers: dict[int, list[Operation]] = {}
    for operation in graph.operations:
        for tensor in operation.inputs:
            if tensor is not None and tensor.value is None:
                readers.setdefault(tensor.index, []).append(operation)
    ends = {tensor.index for tensor in graph.outputs}
    uses: dict[str, int] = {}
    for operation in weighted(graph):
        for tensor in operation.inputs[1:3]:
            if tensor is not None:
                uses[tensor.name] = uses.get(tensor.name, 0) + 1
    found = []
    for first in weighted(graph):
        if first.options.get("fusedActivationFunction", 0) not in (0, 1) or _groups(first) > 1:
            continue
        tensor = first.outputs[0]
        while True:
            following = readers.get(tensor.index, [])
            if len(following) != 1 or tensor.index in ends:
                break
            second = following[0]
            if second.name in _HOMOGENEOUS and second.options.get("fusedActivationFunction", 0) in (0, 1):
                tensor = second.outputs[0]
                continue
            shared = any(uses[t.name] > 1 for op in (first, second) if op.name in _KERNELS
                         for t in op.inputs[1:3] if t is not None)  # fmt: skip
            same = second.name in _KERNELS and _groups(second) == 1 and not shared and _reads(second, first)
            if same:
                found.append((first, second))
            break
    return found


def _reads(second: Operation, first: Operation) -> bool:
    kernel = second.inputs[1]
    channels = first.outputs[0].shape[-1]
    if kernel is None or kernel.value is None or second.inputs[0] is None or second.inputs[0].value is not None:
        return False
    if second.name == "DEPTHWISE_CONV_2D":
        return kernel.shape[-1] == channels
    return kernel.shape[-1] == channels


def _factors(first: Operation, second: Operation) -> np.ndarray:
    made, read = first.inputs[1], second.inputs[1]
    if made is None or made.value is None or read is None or read.value is None:
        raise ValueError("no constants")
    high = channel_largest(first, made.value).reshape(-1)
    low = np.abs(read.value).reshape(-1, read.shape[-1]).max(axis=0)
    usable = (high > 1e-8) & (low > 1e-8)
    return np.where(usable, np.sqrt(np.where(usable, high, 1.0) / np.where(usable, low, 1.0)), 1.0)


def _scale(first: Operation, second: Operation, factor: np.ndarray, values: dict[str, np.ndarray]) -> None:
    made, read = first.inputs[1], second.inputs[1]
    if made is None or made.value is None or read is None or read.value is None:
        raise ValueError("no constants")
    along = factor if first.name == "DEPTHWISE_CONV_2D" else factor.reshape(-1, *[1] * (made.value.ndim - 1))
    values[made.name] = (made.value / along).astype(np.float32)
    bias = first.inputs[2] if len(first.inputs) > 2 else None
    if bias is not None and bias.value is not None:
        values[bias.name] = (bias.value / factor.reshape(bias.shape)).astype(np.float32)
    values[read.name] = (read.value * factor).astype(np.float32)
