"""Running LiteRT files: the one place where the interpreter is used for predictions."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import DataError, UnsupportedModelError

# Entries of the samples that run together: 64 images of 128 x 128, or 6 of 224 x 224 with three channels.
_ENTRIES_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a file.

    Attributes:
        name: Its name in the signature, else the tensor's.
        index: The tensor's number.
        shape: Sizes, -1 where it can be resized.
        dtype: NumPy type.
        scale: Quantization scale, or None.
        zero_point: Quantization zero point, or None.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: type[np.generic]
    scale: float | None
    zero_point: int | None


def read_content(source: str | Path | bytes) -> bytes:
    """Return a file's bytes, checked to be a whole LiteRT file.

    A broken file must never reach the interpreter, which would crash on it.

    Raises:
        DataError: If the file does not exist.
        UnsupportedModelError: If it is no LiteRT file, or truncated or damaged.
    """
    from dwindle.lifting.flatbuffer import check_structure

    if isinstance(source, bytes | bytearray):
        content, name = bytes(source), "the file"
    else:
        try:
            content, name = Path(source).read_bytes(), f"`{source}`"
        except OSError as error:
            raise DataError(f"`{source}` can't be read: {error.strerror}; pass a .tflite file") from None
    try:
        check_structure(content)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    return content


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what the interpreter's C++ side prints."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as log:
            os.dup2(log.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
    finally:
        os.close(saved)


class LiteRTRunner:
    """A file in the LiteRT interpreter.

    Args:
        source: Path or bytes of a ``.tflite``.
        threads: Threads of the interpreter.

    Attributes:
        inputs: The file's inputs, in its order.
        outputs: The file's outputs, in its order.

    Raises:
        DataError: If the file does not exist.
        UnsupportedModelError: If it is broken, or has an operator that LiteRT can't run.
    """

    def __init__(self, source: str | Path | bytes, *, threads: int = 1) -> None:
        from ai_edge_litert.interpreter import Interpreter

        from dwindle.lifting.flatbuffer import read_graph

        content = read_content(source)
        graph = read_graph(content)
        try:
            with quiet_stderr():
                self._interpreter = Interpreter(model_content=content, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"LiteRT can't run the file: {reason}") from None
        details = {d["index"]: d for d in self._interpreter.get_input_details()}
        self.inputs = tuple(
            _spec(details[t.index], name) for t, name in zip(graph.inputs, graph.input_names, strict=True)
        )
        details = {d["index"]: d for d in self._interpreter.get_output_details()}
        self.outputs = tuple(
            _spec(details[t.index], name) for t, name in zip(graph.outputs, graph.output_names, strict=True)
        )
        self._shapes = [tuple(int(v) for v in details["shape"]) for details in self._interpreter.get_input_details()]

    @property
    def takes_batches(self) -> bool:
        """Whether every input's first axis can be resized."""
        return all(spec.shape[:1] == (-1,) for spec in self.inputs)

    def run(self, *x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run once; float arrays are quantized for integer inputs, and integer outputs come back as float32.

        Args:
            *x: One array per input, batch axis included.
        """
        given = [quantize(array, spec) for array, spec in zip(x, self.inputs, strict=True)]
        return tuple(dequantize(a, spec) for a, spec in zip(self.run_raw(*given), self.outputs, strict=True))

    def run_raw(self, *x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run once on arrays of the file's own types."""
        resized = False
        for number, (array, spec) in enumerate(zip(x, self.inputs, strict=True)):
            if array.shape != self._shapes[number]:
                self._interpreter.resize_tensor_input(spec.index, array.shape)
                self._shapes[number] = array.shape
                resized = True
        if resized:
            with quiet_stderr():
                self._interpreter.allocate_tensors()
        for array, spec in zip(x, self.inputs, strict=True):
            self._interpreter.set_tensor(spec.index, np.ascontiguousarray(array, dtype=spec.dtype))
        self._interpreter.invoke()
        return tuple(self._interpreter.get_tensor(spec.index) for spec in self.outputs)

    def predict(self, x: Sequence[np.ndarray], *, batch_size: int = 64) -> list[np.ndarray]:
        """Return the outputs for ``n`` samples, as float32 arrays of shape ``(n, ...)``.

        Args:
            x: One array per input, shape ``(n, ...)``.
            batch_size: Samples a run, where the file takes several; fewer of large ones.
        """
        count = len(x[0])
        size = samples_at_once(x, batch_size) if self.takes_batches else 1
        parts = [self.run(*(array[i : i + size] for array in x)) for i in range(0, count, size)]
        return [np.concatenate([part[number] for part in parts]) for number in range(len(self.outputs))]

    def invoke(self) -> None:
        """Run once on whatever the inputs hold."""
        self._interpreter.invoke()


def samples_at_once(x: Sequence[np.ndarray], most: int) -> int:
    """Return how many samples to run together: at most ``most``, and fewer of large ones, whose activations are large.

    Args:
        x: One array per input, shape ``(n, ...)``.
        most: The limit for small samples.
    """
    entries = sum(math.prod(array.shape[1:]) for array in x)
    return max(1, min(most, _ENTRIES_AT_ONCE // max(1, entries)))


def _spec(details: Any, name: str) -> TensorSpec:
    scales = details["quantization_parameters"]["scales"]
    points = details["quantization_parameters"]["zero_points"]
    shape = details["shape_signature"] if len(details["shape_signature"]) else details["shape"]
    integer = np.issubdtype(details["dtype"], np.integer)
    return TensorSpec(
        name=name, index=int(details["index"]), shape=tuple(int(v) for v in shape), dtype=details["dtype"],
        scale=float(scales[0]) if integer and len(scales) else None,
        zero_point=int(points[0]) if integer and len(points) else None,
    )  # fmt: skip


def quantize(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Return ``clip(round(x / s) + z)`` for an integer input with a scale (half to even); else the array itself."""
    if spec.scale is None or spec.zero_point is None or not np.issubdtype(array.dtype, np.floating):
        return array
    info = np.iinfo(spec.dtype)  # type: ignore[type-var]
    values = np.rint(array.astype(np.float32) / np.float32(spec.scale)) + spec.zero_point
    clipped: np.ndarray = np.clip(values, info.min, info.max)
    return clipped.astype(spec.dtype)


def dequantize(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Return ``(q - z) s`` as float32 for an integer output with a scale; else the array itself."""
    if spec.scale is None or spec.zero_point is None:
        return array
    return (array.astype(np.float32) - spec.zero_point) * np.float32(spec.scale)
