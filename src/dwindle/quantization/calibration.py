"""Calibration: the range of every activation of a float file, over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from dwindle.errors import DataError
from dwindle.lifting.flatbuffer import read_graph

Ranges = dict[str, tuple[float, float]]


def calibrate(
    content: bytes,
    samples: Sequence[np.ndarray],
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Ranges:
    """Run a float file over samples and keep each activation's smallest and largest value.

    Args:
        content: A float ``.tflite`` file, batch axis resizable or 1.
        samples: One array per input, shape ``(n, ...)``.
        batch_size: Samples a run where the file takes several at once.
        progress: Called with ``(done, all)`` samples.

    Returns:
        Tensor name to ``(min, max)``, for each float tensor that is not constant.

    Raises:
        DataError: If there is no sample, or a tensor is not finite on them.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    count = len(samples[0]) if samples else 0
    if count == 0:
        raise DataError("calibration data has no samples; pass at least a few dozen, such as 200 training images")
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
    wanted = [t for t in graph.tensors if t.value is None and t.dtype == np.float32]
    produced = {t.index for op in graph.operations for t in op.outputs} | set(indices)
    wanted = [t for t in wanted if t.index in produced]
    size = batch_size if _takes_batches(interpreter, indices) else 1
    ranges: Ranges = {}
    current = 0
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
            if value.size == 0:
                continue
            low, high = float(value.min()), float(value.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(
                    f"calibration: `{tensor.name}` is not finite on samples {start} to {start + current - 1}; "
                    "check the data and the model for NaN and overflow"
                )
            before = ranges.get(tensor.name, (low, high))
            ranges[tensor.name] = (min(before[0], low), max(before[1], high))
        if progress is not None:
            progress(min(start + size, count), count)
    return ranges


def _takes_batches(interpreter: object, indices: Sequence[int]) -> bool:
    details = {item["index"]: item for item in interpreter.get_input_details()}  # type: ignore[attr-defined]
    return all(list(details[index]["shape_signature"])[:1] == [-1] for index in indices)
