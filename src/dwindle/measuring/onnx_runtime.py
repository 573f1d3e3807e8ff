"""Running ONNX files in ONNX Runtime, with the interface of `dwindle.measuring.litert.LiteRTRunner`."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import DataError, MissingDependencyError, UnsupportedModelError
from dwindle.measuring.litert import TensorSpec, samples_at_once

_TYPES = {
    "float": "float32", "float16": "float16", "double": "float64", "bool": "bool", **{
        f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
    },
}  # fmt: skip


def require_onnxruntime() -> Any:
    """Return the `onnxruntime` package, its warnings held back.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "ONNX files are run by the `onnxruntime` package; install it with pip install 'dwindle[onnx]'"
        ) from None
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


class OnnxRunner:
    """A file in ONNX Runtime, on the CPU.

    Args:
        source: Path or bytes of an ``.onnx``.
        threads: Threads of one run.
        limit_s: Seconds after which `run` is stopped; None for no limit. What a file repeats has no end by itself.
        checked: Whether the file has been read before, and found to be sound.
        brief: Whether it runs once or twice only: weights are not copied into an order that is faster.

    Attributes:
        inputs: The file's inputs, in its order; -1 stands for a length that is open.
        outputs: The file's outputs, in its order.
        lengths: Lengths of each output's axes: numbers, names, or None; empty also where nothing tells the axes.
        stopped: Whether the last run took longer than its limit.

    Raises:
        DataError: If the file does not exist.
        UnsupportedModelError: If it is damaged, or ONNX Runtime can't run it.
        MissingDependencyError: If `onnxruntime` is not installed.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        threads: int = 1,
        limit_s: float | None = None,
        checked: bool = False,
        brief: bool = False,
    ) -> None:
        runtime = self._runtime = require_onnxruntime()
        if not isinstance(source, bytes):
            path = Path(source)
            if not path.is_file():
                raise DataError(f"`{path}` can't be read: there is no such file; pass an .onnx file")
            if not checked:
                from dwindle.lifting.onnx.graph import read_graph

                read_graph(path)  # says what is wrong with a damaged file, and keeps external data in its folder
            source = str(path)
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        settings.log_severity_level = 4
        if brief:
            settings.add_session_config_entry("session.disable_prepacking", "1")
            settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session = runtime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"ONNX Runtime can't run the file: {reason}") from None
        self.inputs = tuple(_spec(given, k) for k, given in enumerate(self._session.get_inputs()))
        self.outputs = tuple(_spec(given, k) for k, given in enumerate(self._session.get_outputs()))
        self.lengths = tuple(tuple(given.shape or ()) for given in self._session.get_outputs())
        self.stopped = False
        self._limit_s = limit_s
        self._names = [spec.name for spec in self.outputs]
        self._fed: dict[str, np.ndarray] = {}

    @property
    def takes_batches(self) -> bool:
        """Whether every input's first axis is open."""
        return all(spec.shape[:1] == (-1,) for spec in self.inputs)

    def run(self, *x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run once.

        Args:
            *x: One array per input, batch axis included.
        """
        fed = {spec.name: np.ascontiguousarray(array, spec.dtype) for array, spec in zip(x, self.inputs, strict=True)}
        self.stopped = False
        try:
            return tuple(self._session.run(self._names, fed) if self._limit_s is None else self._limited(fed))
        except Exception as error:
            if self.stopped:
                raise UnsupportedModelError(f"ONNX Runtime was stopped after {self._limit_s:g} s") from None
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"ONNX Runtime can't run the file on these inputs: {reason}") from None

    def _limited(self, fed: dict[str, np.ndarray]) -> list[Any]:
        options = self._runtime.RunOptions()

        def stop() -> None:
            self.stopped = options.terminate = True

        timer = threading.Timer(self._limit_s or 0.0, stop)
        timer.start()
        try:
            return list(self._session.run(self._names, fed, options))
        finally:
            timer.cancel()

    def predict(self, x: Sequence[np.ndarray], *, batch_size: int = 64) -> list[np.ndarray]:
        """Return the outputs for ``n`` samples, as arrays of shape ``(n, ...)``.

        Args:
            x: One array per input, shape ``(n, ...)``.
            batch_size: Samples a run, where the file takes several; fewer of large ones.
        """
        size = samples_at_once(x, batch_size) if self.takes_batches else 1
        parts = [self.run(*(array[i : i + size] for array in x)) for i in range(0, len(x[0]), size)]
        return [np.concatenate([part[number] for part in parts]) for number in range(len(self.outputs))]

    def invoke(self) -> None:
        """Run once on one sample of zeros; lengths that are open are 1."""
        if not self._fed:
            self._fed = {
                spec.name: np.zeros([1 if n < 0 else n for n in spec.shape], spec.dtype) for spec in self.inputs
            }
        self._session.run(self._names, self._fed)


def _spec(given: Any, index: int) -> TensorSpec:
    kind = given.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _TYPES:
        raise UnsupportedModelError(f"`{given.name}` of the file is of type {given.type}; only numbers are run")
    shape = tuple(n if isinstance(n, int) else -1 for n in given.shape)
    return TensorSpec(name=given.name, index=index, shape=shape, dtype=np.dtype(_TYPES[kind]).type, scale=None,
                      zero_point=None)  # fmt: skip


def content_of(path: Path) -> tuple[int, str]:
    """Return the bytes of a file with its external data, and the hash of both."""
    from dwindle.lifting.onnx.graph import external_files

    files = [path, *external_files(path)]
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return sum(file.stat().st_size for file in files), found.hexdigest()
