"""Calibration: the range of every activation of a float file, over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from dwindle.errors import DataError, check_choice
from dwindle.lifting.flatbuffer import Tensor, read_graph

Ranges = dict[str, tuple[float, float]]
_BINS = 2048


def calibrate(
    content: bytes,
    samples: Sequence[np.ndarray],
    *,
    method: str = "min-max",
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Ranges:
    """Run a float file over samples and choose each activation's range.

    Memory does not grow with the number of samples: ``"min-max"`` keeps two numbers a tensor; the others run the
    samples twice, and keep a histogram of 2,048 bins between the ends that the first run found.

    Args:
        content: A float ``.tflite`` file, batch axis resizable or 1.
        samples: One array per input, shape ``(n, ...)``.
        method: ``"min-max"``, the smallest and largest value; ``"percentile"``, all but 0.01% at either end; ``"mse"``,
            the range whose 8-bit grid has the least squared error; ``"entropy"``, the range whose 8-bit histogram
            has the least Kullback-Leibler divergence from the whole one.
        batch_size: Samples a run where the file takes several at once.
        progress: Called with ``(done, all)`` samples of all runs.

    Returns:
        Tensor name to ``(min, max)``, for each float tensor that is not constant.

    Raises:
        ConfigError: For an unknown method.
        DataError: If there is no sample, or a tensor is not finite on them.

    References:
        Migacz 2017, "8-bit inference with TensorRT" (entropy).
    """
    check_choice("method", method, METHODS)
    count = len(samples[0]) if samples else 0
    if count == 0:
        raise DataError("calibration data has no samples; pass at least a few dozen, such as 200 training images")
    choose = METHODS[method]
    runs = 1 if choose is None else 2
    ranges: Ranges = {}
    for done, value, tensor in activations(content, samples, batch_size=batch_size):
        low, high = float(value.min()), float(value.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(
                f"calibration: `{tensor.name}` is not finite on samples before number {done}; "
                "check the data and the model for NaN and overflow"
            )
        before = ranges.get(tensor.name, (low, high))
        ranges[tensor.name] = (min(before[0], low), max(before[1], high))
        if progress is not None:
            progress(done, runs * count)
    if choose is None:
        return ranges
    counts = {name: np.zeros(_BINS, np.int64) for name in ranges}
    for done, value, tensor in activations(content, samples, batch_size=batch_size):
        low, high = ranges[tensor.name]
        if high > low:
            counts[tensor.name] += np.histogram(value, bins=_BINS, range=(low, high))[0]
        if progress is not None:
            progress(count + done, runs * count)
    return {
        name: choose(counts[name], np.linspace(low, high, _BINS + 1)) if high > low else (low, high)
        for name, (low, high) in ranges.items()
    }


def activations(
    content: bytes, samples: Sequence[np.ndarray], *, batch_size: int = 64, names: Collection[str] | None = None
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield ``(samples done, value, tensor)`` for every float activation, or those named, batch by batch."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    graph = read_graph(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        interpreter = Interpreter(
            model_content=content,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
            num_threads=1,
        )
    # The interpreter lists inputs in the order of the graph, which is the order of the model's inputs.
    indices = [tensor.index for tensor in graph.inputs]
    produced = {t.index for op in graph.operations for t in op.outputs} | set(indices)
    wanted = [t for t in graph.tensors if t.value is None and t.dtype == np.float32 and t.index in produced]
    wanted = [t for t in wanted if names is None or t.name in names]
    size = batch_size if _takes_batches(interpreter, indices) else 1
    count, current = len(samples[0]), 0
    for start in range(0, count, size):
        chunk = [np.asarray(array[start : start + size]) for array in samples]
        if len(chunk[0]) != current:
            current = len(chunk[0])
            for index, array in zip(indices, chunk, strict=True):
                interpreter.resize_tensor_input(index, array.shape)
            interpreter.allocate_tensors()
        for index, array, tensor in zip(indices, chunk, graph.inputs, strict=True):
            interpreter.set_tensor(index, np.ascontiguousarray(array, dtype=tensor.dtype))
        interpreter.invoke()
        for tensor in wanted:
            value = interpreter.get_tensor(tensor.index)
            if value.size:
                yield min(start + size, count), value, tensor


def _takes_batches(interpreter: Any, indices: Sequence[int]) -> bool:
    details = {item["index"]: item for item in interpreter.get_input_details()}
    return all(list(details[index]["shape_signature"])[:1] == [-1] for index in indices)


def _percentile(counts: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    share = np.cumsum(counts) / counts.sum()
    low = int(np.searchsorted(share, 1e-4))
    high = int(np.searchsorted(share, 1 - 1e-4))
    return float(edges[low]), float(edges[min(high + 1, _BINS)])


def _candidates(edges: np.ndarray) -> Iterator[tuple[float, float]]:
    """Yield ranges to try: the whole one, and ever more of it cut at both ends in proportion."""
    for share in np.linspace(1.0, 0.2, 41):
        yield float(edges[0] * share if edges[0] < 0 else 0.0), float(edges[-1] * share if edges[-1] > 0 else 0.0)


def _rounded(centres: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return values on the asymmetric 8-bit grid of a range."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-9) / 255
    point = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(centres / scale) + point, 0, 255) - point) * scale)


def _mse(counts: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    centres = (edges[:-1] + edges[1:]) / 2
    return min(_candidates(edges), key=lambda ends: float(counts @ (centres - _rounded(centres, *ends)) ** 2))


def _entropy(counts: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    centres = (edges[:-1] + edges[1:]) / 2
    # Zero is on every grid; counted, the zeros of a ReLU would ask for a narrow range whatever the rest is like.
    counts = np.where((edges[:-1] <= 0) & (edges[1:] > 0), 0, counts)
    if not counts.any():
        return float(edges[0]), float(edges[-1])
    whole = counts / counts.sum()

    def divergence(ends: tuple[float, float]) -> float:
        grid, inverse = np.unique(_rounded(centres, *ends), return_inverse=True)
        filled = (counts > 0).astype(float)
        mass = np.bincount(inverse, counts, len(grid))
        spread = np.bincount(inverse, filled, len(grid))
        inside = (centres >= min(ends[0], 0.0)) & (centres <= max(ends[1], 0.0))
        # What is clipped lies at the ends of the grid, so the bins out there hold nothing.
        guess = np.where(inside & (counts > 0), (mass / np.maximum(spread, 1))[inverse], 0.0) / counts.sum()
        guess = np.maximum(guess, 1e-12)
        some = whole > 0
        return float(np.sum(whole[some] * np.log(whole[some] / guess[some])))

    return min(_candidates(edges), key=divergence)


# How a range is chosen from a histogram; None where the ends themselves are the range.
METHODS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, float]] | None] = {
    "min-max": None,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
