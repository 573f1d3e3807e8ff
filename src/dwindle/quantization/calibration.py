"""Calibration: the range of every activation of a float file, over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from dwindle.errors import DataError, check_choice
from dwindle.lifting.flatbuffer import Tensor, parse, read_graph, serialize

Ranges = dict[str, tuple[float, float]]
_BINS = 2048
_BYTES = 64_000_000


def calibrate(
    content: bytes,
    samples: Sequence[np.ndarray],
    *,
    method: str = "min-max",
    bits: int = 8,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Ranges:
    """Run a float file over samples and choose each activation's range.

    Memory does not grow with the number of samples: ``"min-max"`` keeps two numbers a tensor; the others run the
    samples twice, and keep a histogram of 2,048 bins between the ends that the first run found.

    Args:
        content: A float ``.tflite`` file, batch axis resizable or 1.
        samples: One array per input, shape ``(n, ...)``.
        method: ``"min-max"``, the smallest and largest value; ``"percentile"``, all but 0.01% at either end, to a bin;
            ``"mse"``, of the whole range and 40 that are cut at both ends in proportion, down to a fifth, the one whose
            grid has the least squared error; ``"entropy"``, the one whose histogram on its grid has the least
            Kullback-Leibler divergence from the whole one. Ranges of the last two always hold 0.
        bits: Width of the activations, 8 or 16, which ``"mse"`` and ``"entropy"`` choose for.
        batch_size: Samples a run where the file takes several at once.
        progress: Called with ``(done, all)`` samples of all runs.

    Returns:
        Tensor name to ``(min, max)``, for each float tensor that is not constant.

    Raises:
        ConfigError: For an unknown method.
        DataError: If there is no sample, the samples are constant or all zero, or a tensor is not finite on them.

    References:
        Migacz 2017, "8-bit inference with TensorRT" (entropy). We differ: the grid is asymmetric, the reference is the
        whole histogram, so what a range clips counts against it, and the bin of 0, which every grid holds, is left out.
    """
    check_choice("method", method, METHODS)
    count = len(samples[0]) if samples else 0
    if count == 0:
        raise DataError("calibration data has no samples; pass at least a few dozen, such as 200 training images")
    _check_samples(content, samples)
    choose = METHODS[method]
    runs = 1 if choose is None else 2
    say = _once_each(progress, runs * count)
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
        say(done)
    if choose is None:
        return ranges
    counts = {name: np.zeros(_BINS, np.int64) for name in ranges}
    for done, value, tensor in activations(content, samples, batch_size=batch_size):
        low, high = ranges[tensor.name]
        if high > low:
            counts[tensor.name] += _histogram(value, low, high)
        say(count + done)
    return {
        name: choose(counts[name], np.linspace(low, high, _BINS + 1), bits) if high > low else (low, high)
        for name, (low, high) in ranges.items()
    }


def _once_each(progress: Callable[[int, int], None] | None, every: int) -> Callable[[int], None]:
    """Return a function that passes a number on when it changes."""
    last = 0

    def say(done: int) -> None:
        nonlocal last
        if progress is not None and done != last:
            progress(done, every)
        last = done

    return say


def _check_samples(content: bytes, samples: Sequence[np.ndarray]) -> None:
    """Raise where samples say nothing about ranges: no grid can be made for an input that is always 0."""
    inputs = read_graph(content).inputs
    if len(samples) != len(inputs):
        raise DataError(f"calibration data has {len(samples)} arrays and the file has {len(inputs)} inputs")
    ends = [(array.min(), array.max()) for array in map(np.asarray, samples)]
    for (low, high), array, tensor in zip(ends, samples, inputs, strict=True):
        if low == high == 0 and tensor.dtype == np.float32:
            raise DataError(
                f"calibration data is 0 everywhere in all {len(array):,} samples of input `{tensor.name}`, so there is "
                "no range to find; pass samples such as the model was trained on"
            )
    if all(low == high for low, high in ends):
        raise DataError(
            f"calibration data is constant, {ends[0][0]:g} everywhere in all {len(samples[0]):,} samples, so there is "
            "no range to find; pass samples such as the model was trained on"
        )


def _histogram(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return how many values lie in each of the bins between two ends, the upper one included.

    NumPy's own refuses ranges that are narrow for float32, such as those of a sum of probabilities.
    """
    places = ((np.ravel(value).astype(np.float64) - low) * (_BINS / (high - low))).astype(np.int64)
    return np.bincount(np.clip(places, 0, _BINS - 1), minlength=_BINS)


def activations(
    content: bytes, samples: Sequence[np.ndarray], *, batch_size: int = 64, names: Collection[str] | None = None
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield ``(samples done, value, tensor)`` for every float activation, or those named, batch by batch.

    As many samples run at once as keep the activations of a batch under 64 MB, at most ``batch_size``.
    """
    graph = read_graph(content)
    # The interpreter lists inputs in the order of the graph, which is the order of the model's inputs.
    indices = [tensor.index for tensor in graph.inputs]
    produced = {t.index for op in graph.operations for t in op.outputs} | set(indices)
    wanted = [t for t in graph.tensors if t.value is None and t.dtype == np.float32 and t.index in produced]
    wanted = [t for t in wanted if names is None or t.name in names]
    interpreter = _watching(content, [t.index for t in wanted if t.index not in indices])
    bytes_a_sample = 4 * sum(int(np.prod(np.maximum(tensor.shape, 1))) for tensor in wanted)
    most = max(1, min(batch_size, _BYTES // max(bytes_a_sample, 1)))
    size = most if _takes_batches(interpreter, indices) else 1
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


def _watching(content: bytes, indices: Sequence[int]) -> Any:
    """Return an interpreter that keeps the given tensors: the fast one with them as outputs where that works."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from dwindle.measuring.litert import quiet_stderr

    model = parse(content)
    model.subgraphs[0].outputs = np.array(list(dict.fromkeys(indices)), np.int32)
    model.signatureDefs = None
    watched = serialize(model)
    del model
    try:
        with quiet_stderr():
            interpreter = Interpreter(model_content=watched, num_threads=1)
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError):  # an operator that only the plain kernels run
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            interpreter = Interpreter(
                model_content=content,
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                experimental_preserve_all_tensors=True,
                num_threads=1,
            )
    return interpreter


def _takes_batches(interpreter: Any, indices: Sequence[int]) -> bool:
    details = {item["index"]: item for item in interpreter.get_input_details()}
    return all(list(details[index]["shape_signature"])[:1] == [-1] for index in indices)


def _percentile(counts: np.ndarray, edges: np.ndarray, bits: int) -> tuple[float, float]:
    del bits
    share = np.cumsum(counts) / counts.sum()
    low = int(np.searchsorted(share, 1e-4))
    high = int(np.searchsorted(share, 1 - 1e-4))
    return float(edges[low]), float(edges[min(high + 1, _BINS)])


def _candidates(edges: np.ndarray) -> Iterator[tuple[float, float]]:
    """Yield ranges to try: the whole one, and ever more of it cut at both ends in proportion."""
    for share in np.linspace(1.0, 0.2, 41):
        yield float(edges[0] * share if edges[0] < 0 else 0.0), float(edges[-1] * share if edges[-1] > 0 else 0.0)


def _rounded(centres: np.ndarray, ends: tuple[float, float], bits: int) -> np.ndarray:
    """Return values on the asymmetric grid of a range."""
    steps = 2**bits - 1
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = max(high - low, 1e-9) / steps
    point = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(centres / scale) + point, 0, steps) - point) * scale)


def _mse(counts: np.ndarray, edges: np.ndarray, bits: int) -> tuple[float, float]:
    centres = (edges[:-1] + edges[1:]) / 2
    return min(_candidates(edges), key=lambda ends: float(counts @ (centres - _rounded(centres, ends, bits)) ** 2))


def _entropy(counts: np.ndarray, edges: np.ndarray, bits: int) -> tuple[float, float]:
    centres = (edges[:-1] + edges[1:]) / 2
    # Zero is on every grid; counted, the zeros of a ReLU would ask for a narrow range whatever the rest is like.
    counts = np.where((edges[:-1] <= 0) & (edges[1:] > 0), 0, counts)
    if not counts.any():
        return float(edges[0]), float(edges[-1])
    whole = counts / counts.sum()

    def divergence(ends: tuple[float, float]) -> float:
        grid, inverse = np.unique(_rounded(centres, ends, bits), return_inverse=True)
        inside = (centres >= min(ends[0], 0.0)) & (centres <= max(ends[1], 0.0))
        filled = inside & (counts > 0)
        # Each level's mass, with what is clipped to it, lies evenly in those of its bins that are not empty.
        mass = np.bincount(inverse, counts, len(grid))
        spread = np.bincount(inverse, filled, len(grid))
        guess = np.where(filled, (mass / np.maximum(spread, 1))[inverse], 0.0) / counts.sum()
        guess = np.maximum(guess, 1e-12)
        some = whole > 0
        return float(np.sum(whole[some] * np.log(whole[some] / guess[some])))

    return min(_candidates(edges), key=divergence)


# How a range is chosen from a histogram; None where the ends themselves are the range.
METHODS: dict[str, Callable[[np.ndarray, np.ndarray, int], tuple[float, float]] | None] = {
    "min-max": None,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
