"""After training, without labels: better weights for a narrow grid, found from the float file and some samples.

Each method takes a float file and gives one back, with other constants in it; the grids of the weights are then fixed
by explicit bounds, so that the quantized file gets exactly what the method chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dwindle.lifting.flatbuffer import Graph, Operation, read_graph, replace_constants
from dwindle.quantization.assignment import display_names, has_weights
from dwindle.quantization.calibration import activations
from dwindle.quantization.equalizing import KERNELS, groups_of, input_channels, weighted, with_own_biases
from dwindle.quantization.fake_quantization import quantized_range
from dwindle.quantization.schemes import Scheme
from dwindle.quantization.writing import SYMMETRIC, channel_largest, power_of_two

# Second moments are held for kernels with at most this many inputs an output: 32 MB each.
LARGEST_KERNEL = 2048
_ROWS = 4096
_SMALLEST = np.float32(1e-9)
# Inputs whose errors GPTQ spreads at once, as in its paper.
_LAZY = 128
# Weight of AdaRound's regularizer against errors in steps and inputs of mean square 1. The paper's 0.01 is for errors
# in the weights' own unit, which are far smaller; with it, here, half of the choices are still open at the end.
_PULL = 10.0


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
        channels = input_channels(operation)
        flat = kernel.reshape(-1, channels, kernel.shape[-1] // channels)
        return np.ascontiguousarray(flat.transpose(1, 2, 0))
    groups = groups_of(operation)
    return kernel.reshape(groups, kernel.shape[0] // groups, -1)


def from_rows(operation: Operation, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a kernel in the file's own shape; the inverse of `as_rows`."""
    if operation.name == "DEPTHWISE_CONV_2D":
        rows = rows.transpose(2, 0, 1)
    return np.ascontiguousarray(rows).reshape(shape)


def input_statistics(
    content: bytes, samples: Sequence[np.ndarray], *, moments: bool = True, seed: int = 0
) -> dict[int, InputStatistics]:
    """Run a float file over samples and return, by operator number, what enters its kernel.

    Memory does not grow with the number of samples. Of the positions of each batch at most 4,096 are taken, at random.

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
            rows = _patches(operation, value, generator).astype(np.float64)
            number = operation.index
            sums[number] = sums.get(number, 0.0) + rows.sum(axis=1)
            counts[number] = counts.get(number, 0) + rows.shape[1]
            if moments and rows.shape[2] <= LARGEST_KERNEL:
                products[number] = products.get(number, 0.0) + rows.transpose(0, 2, 1) @ rows
    return {
        number: InputStatistics(
            mean=total / counts[number],
            moment=None if number not in products else products[number] / counts[number],
        )
        for number, total in sums.items()
    }


def _patches(operation: Operation, value: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
    """Return what a kernel is multiplied with, shape ``(groups, positions, inputs)``.

    With a generator at most 4,096 positions, chosen before they are laid out: all of a batch's may not fit in memory.
    """
    kernel = operation.inputs[1]
    if kernel is None:
        raise ValueError("no kernel")
    if operation.name == "FULLY_CONNECTED":
        rows = value.reshape(-1, kernel.shape[-1])
        return np.asarray(rows[_picked(len(rows), generator)][None])
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
    chosen = _picked(int(np.prod(windows.shape[:3])), generator)
    windows = windows[np.unravel_index(chosen, windows.shape[:3])]
    # (positions, c, kh, kw): per channel for depthwise kernels, else kh, kw, c as the file lays them out.
    channels = value.shape[-1]
    if operation.name == "DEPTHWISE_CONV_2D":
        return windows.transpose(1, 0, 2, 3).reshape(channels, -1, height * width)
    groups = groups_of(operation)
    parts = windows.transpose(0, 2, 3, 1).reshape(-1, height * width, groups, channels // groups)
    return parts.transpose(2, 0, 1, 3).reshape(groups, -1, height * width * (channels // groups))


def _picked(count: int, generator: np.random.Generator | None) -> np.ndarray:
    if generator is None or count <= _ROWS:
        return np.arange(count)
    return generator.choice(count, _ROWS, replace=False)


def grid_bound(operation: Operation, kernel: np.ndarray, choice: Scheme, given: np.ndarray | None) -> np.ndarray:
    """Return the largest magnitude of each channel's grid, axes kept, as the quantized file will have it.

    Args:
        operation: The operator.
        kernel: Its kernel.
        choice: Its scheme.
        given: A bound that was chosen before, or None: the largest weights.
    """
    bound = given
    if bound is None:
        bound = channel_largest(operation, kernel, per_channel=choice.granularity == "channel")
    if choice.power_of_two:
        bound = power_of_two(bound, quantized_range(choice.weights)[1])
    return np.asarray(bound, np.float32)


def kernel_grid(choice: Scheme, bound: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the step of each channel, and the smallest and largest integer, of a kernel's grid."""
    low, high = quantized_range(choice.weights, narrow=choice.weights >= 8)
    return np.maximum(bound, _SMALLEST) / np.float32(high), low, high


def not_refined(graph: Graph, choices: Sequence[Scheme], *, rounding: str, clipping: str) -> list[str]:
    """Say, one line an operator, which kernels a rounding or clipping method leaves as they are, and why.

    Args:
        graph: The float file's.
        choices: Each operator's scheme.
        rounding: A key of `ROUNDINGS`.
        clipping: ``"none"`` or ``"mse"``.
    """
    methods = [name for name in (rounding, clipping) if name not in ("nearest", "none")]
    lines = []
    for operation, choice, name in zip(graph.operations, choices, display_names(graph), strict=True):
        if not methods or choice.weights > 8 or not has_weights(operation) or operation.name not in SYMMETRIC:
            continue
        kernel = operation.inputs[1]
        inputs = 0 if kernel is None else as_rows(operation, np.empty(kernel.shape, np.bool_)).shape[-1]
        if not isinstance(choice.granularity, str):
            lines.append(f"`{name}` is without {' and '.join(methods)}: it has blocks of {choice.granularity} inputs")
        elif rounding != "nearest" and operation.name not in KERNELS:
            lines.append(f"`{name}` is without {rounding}: it is a {operation.name}")
        elif rounding != "nearest" and inputs > LARGEST_KERNEL:
            lines.append(
                f"`{name}` is without {rounding}: it has {inputs:,} inputs an output, more than {LARGEST_KERNEL:,}"
            )
    return lines


def clipped_bounds(graph: Graph, choices: Sequence[Scheme]) -> dict[str, np.ndarray]:
    """Return, for each quantized kernel, the bound per channel whose grid has the least squared error.

    Candidates are 30% to 100% of the largest weight, in steps of 1%; on steps that are powers of two, the finest that
    clips nothing, its half and its quarter. Kernels with blocks are left out.
    """
    found = {}
    for operation, choice in zip(graph.operations, choices, strict=True):
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        if operation.name not in SYMMETRIC or choice.weights > 8 or kernel is None or kernel.value is None:
            continue
        if not isinstance(choice.granularity, str):
            continue
        weight = kernel.value.astype(np.float64)
        largest = grid_bound(operation, kernel.value, choice, None)
        shares = (1.0, 0.5, 0.25) if choice.power_of_two else np.linspace(1.0, 0.3, 71)
        axes = tuple(axis for axis in range(weight.ndim) if largest.shape[axis] == 1)
        best, bound = np.full(largest.shape, np.inf), largest
        for share in shares:
            candidate = (largest * share).astype(np.float32)
            scale, low, high = kernel_grid(choice, candidate)
            error = ((np.clip(np.rint(weight / scale), low, high) * scale - weight) ** 2).sum(axis=axes, keepdims=True)
            better = error < best
            best, bound = np.where(better, error, best), np.where(better, candidate, bound)
        found[kernel.name] = bound
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
        Frantar et al. 2023, arXiv 2210.17323, algorithm 1; with its 1% dampening, of the mean over inputs that are not
        always 0, and its lazy updates. We differ: an output is rounded to nearest where that has the smaller error.
    """
    weight = rows.astype(np.float64).copy()
    hessian = moment.astype(np.float64).copy()
    diagonal = np.einsum("ii->i", hessian)
    live = diagonal > 0
    typical = float(diagonal[live].mean()) if live.any() else 1.0
    diagonal[~live] = typical  # an input that is always 0 does not matter, and must not matter to the others
    diagonal += 0.01 * typical
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = np.zeros_like(weight)
    count = weight.shape[1]
    for start in range(0, count, _LAZY):
        end = min(start + _LAZY, count)
        errors = np.zeros((len(weight), end - start))
        for column in range(start, end):
            found[:, column] = np.clip(np.rint(weight[:, column] / scale[:, 0]), low, high)
            error = (weight[:, column] - found[:, column] * scale[:, 0]) / upper[column, column]
            weight[:, column + 1 : end] -= np.outer(error, upper[column, column + 1 : end])
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return _or_nearest(found, rows.astype(np.float64) / scale, low, high, moment)


def _or_nearest(found: np.ndarray, exact: np.ndarray, low: int, high: int, moment: np.ndarray) -> np.ndarray:
    """Return integers, those of outputs that nearest rounding serves better rounded to nearest."""
    nearest = np.clip(np.rint(exact), low, high)

    def error(chosen: np.ndarray) -> np.ndarray:
        apart = chosen - exact
        return np.asarray(((apart @ moment) * apart).sum(axis=1))

    return np.where((error(found) > error(nearest))[:, None], nearest, found)


def adaround(rows: np.ndarray, scale: np.ndarray, low: int, high: int, moment: np.ndarray) -> np.ndarray:
    """Learn for each weight whether it is rounded up or down, so that the layer's output changes little.

    The output's mean squared error is ``dW M dW^T`` for the inputs' second moment ``M``, so no sample is needed twice.
    Arguments and result as in `gptq`.

    References:
        Nagel et al. 2020, arXiv 2004.10568, section 3.2: rectified sigmoid, regularizer and annealing as there. We
        differ: inputs are the float file's and the activation function is left out, which is what makes ``M`` all that
        is needed; 800 steps of Adam over all samples at once; an output is rounded to nearest where that has the
        smaller error.
    """
    steps = 800
    weight = rows.astype(np.float64) / scale
    floor = np.clip(np.floor(weight), low, high)
    rest = np.clip(weight - floor, 0.01, 0.99)
    value = -np.log(1.2 / (rest + 0.1) - 1.0)
    relative = moment / (float(np.trace(moment)) / len(moment) or 1.0)
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step in range(1, steps + 1):
        gate = 1.0 / (1.0 + np.exp(-value))
        soft = np.clip(1.2 * gate - 0.1, 0.0, 1.0)
        slope = np.where((soft > 0) & (soft < 1), 1.2 * gate * (1 - gate), 0.0)
        gradient = 2.0 * ((np.clip(floor + soft, low, high) - weight) @ relative)
        if step > steps // 5:  # the first fifth is without the pull towards 0 and 1
            beta = 20.0 - 18.0 * (step - steps // 5) / (steps - steps // 5)
            away = np.abs(2.0 * soft - 1.0)
            gradient += _PULL * -beta * 2.0 * np.sign(2.0 * soft - 1.0) * away ** (beta - 1.0)
        gradient *= slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value -= 0.02 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
    return _or_nearest(np.clip(floor + (value >= 0), low, high), weight, low, high, moment)


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
    values: dict[str, np.ndarray] = {}
    found = dict(bounds)
    operations = weighted(read_graph(content))
    for operation in operations:
        choice, kernel = choices[operation.index], operation.inputs[1]
        if choice.weights > 8 or kernel is None or kernel.value is None or kernel.name in values:
            continue
        # A kernel that several operators read is rounded for what enters all of them.
        moments = [
            statistics[other.index].moment
            for other in operations
            if other.inputs[1] is not None and other.inputs[1].index == kernel.index and other.index in statistics
        ]
        known = [moment for moment in moments if moment is not None]
        if not known or not isinstance(choice.granularity, str):
            continue  # `not_refined` says so
        bound = grid_bound(operation, kernel.value, choice, found.get(kernel.name))
        scale, low, high = kernel_grid(choice, bound)
        rows = as_rows(operation, kernel.value)
        steps = as_rows(operation, np.broadcast_to(scale, kernel.shape))
        moment = np.mean(known, axis=0)
        integers = np.stack([method(w, s[:, :1], low, high, m) for w, s, m in zip(rows, steps, moment, strict=True)])
        values[kernel.name] = from_rows(operation, integers * steps, kernel.shape).astype(np.float32)
        found[kernel.name] = bound
    return replace_constants(content, values), found


def rounded_kernel(operation: Operation, kernel: np.ndarray, choice: Scheme, given: np.ndarray | None) -> np.ndarray:
    """Return a kernel as the quantized file holds it, as floats."""
    scale, low, high = kernel_grid(choice, grid_bound(operation, kernel, choice, given))
    return np.asarray(np.clip(np.rint(kernel / scale), low, high) * scale)


def correct_biases(
    content: bytes,
    original: bytes,
    choices: Sequence[Scheme],
    bounds: Mapping[str, np.ndarray],
    statistics: Mapping[int, InputStatistics],
) -> bytes:
    """Return the file with biases that take up the shift of each output's mean that rounding its kernel makes.

    ``b' = b - (W_rounded - W) E[x]``; an operator without a bias gets one, and so does one whose bias is another's too.
    Where one kernel is used several times, its bias takes up the mean of the shifts.

    Args:
        content: The file to change, its kernels perhaps moved by `round_weights`.
        original: The float file before that, with the same operators.
        choices: Each operator's scheme.
        bounds: As for `round_weights`.
        statistics: What `input_statistics` returned for ``original``.

    References:
        Nagel et al. 2019, arXiv 1906.04721, section 4.2, with E[x] measured on samples.
    """
    content = with_own_biases(content, missing=True)
    before = {op.index: op.inputs[1] for op in weighted(read_graph(original))}
    shifts: dict[str, list[np.ndarray]] = {}
    values: dict[str, np.ndarray] = {}
    for operation in weighted(read_graph(content)):
        kernel, bias = operation.inputs[1], operation.inputs[2]
        choice, known, source = choices[operation.index], statistics.get(operation.index), before[operation.index]
        if kernel is None or kernel.value is None or source is None or source.value is None or known is None:
            continue
        if bias is None or bias.value is None or choice.weights > 8 or not isinstance(choice.granularity, str):
            continue
        apart = rounded_kernel(operation, kernel.value, choice, bounds.get(kernel.name)) - source.value
        shift = np.einsum("goi,gi->go", as_rows(operation, apart.astype(np.float64)), known.mean).reshape(bias.shape)
        shifts.setdefault(bias.name, []).append(shift)
        values[bias.name] = (bias.value - np.mean(shifts[bias.name], axis=0)).astype(np.float32)
    return replace_constants(content, values)
