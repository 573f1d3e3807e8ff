"""Measuring a file by running it: metric, bytes, latency and RAM."""

from __future__ import annotations

import functools
import hashlib
import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.errors import DataError
from dwindle.measuring.accuracy import check_metric, evaluate, higher_is_better
from dwindle.measuring.comparing import Compared, compare
from dwindle.measuring.inspecting import Inspection, Row, inspect_file, inspect_model
from dwindle.measuring.latency import Latency, compare_latency, measure_latency
from dwindle.measuring.litert import LiteRTRunner, read_content
from dwindle.measuring.memory import Memory, measure_memory
from dwindle.measuring.runners import is_onnx, runner_of

if TYPE_CHECKING:
    from dwindle.data import Data, Split
    from dwindle.measuring.runners import Runner

__all__ = [
    "Compared", "Inspection", "Latency", "LiteRTRunner", "Measurement", "Memory", "Row", "as_data", "check_metric",
    "compare", "compare_latency", "environment", "evaluate", "evaluation_split", "higher_is_better", "inspect_file",
    "inspect_model", "measure", "measure_latency", "measure_memory",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured on a file.

    Attributes:
        file: Its path.
        metric: Name of the metric.
        accuracy: Value of the metric; None without labels.
        samples: Samples that it was measured on.
        size_bytes: Size of the file.
        latency: Time of one inference.
        arena_bytes: Arena of TensorFlow Lite Micro; None where it can't run the file or is not installed.
        arena_note: Why there is no arena.
        resident_bytes: Growth of peak resident memory in LiteRT, or in ONNX Runtime.
        sha256: Hash of the file.
        parameters: Weights and biases.
        environment: Machine and versions.
    """

    file: str
    metric: str
    accuracy: float | None
    samples: int
    size_bytes: int
    latency: Latency
    arena_bytes: int | None
    arena_note: str | None
    resident_bytes: int
    sha256: str
    parameters: int
    environment: dict[str, str]

    @property
    def latency_ms(self) -> dict[str, float]:
        """Median and 90th percentile."""
        return {"p50": self.latency.p50_ms, "p90": self.latency.p90_ms}

    @property
    def ram_bytes(self) -> int:
        """The arena where it is known, else the growth of resident memory."""
        return self.resident_bytes if self.arena_bytes is None else self.arena_bytes

    @property
    def ram_source(self) -> str:
        """What `ram_bytes` is: ``tflm-arena``, ``litert-resident`` or ``onnxruntime-resident``."""
        if self.arena_bytes is not None:
            return "tflm-arena"
        return "onnxruntime-resident" if is_onnx(self.file) else "litert-resident"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` makes an equal object."""
        more = {"latency_ms": self.latency_ms, "ram_bytes": self.ram_bytes, "ram_source": self.ram_source}
        return {**asdict(self), **more}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Make a measurement from `to_dict`."""
        kept = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        return cls(**{**kept, "latency": Latency(**kept["latency"])})


def measure(file: str | Path, data: Any = None, metric: Any = "accuracy", *, threads: int = 1) -> Measurement:
    """Run a ``.tflite`` in LiteRT, or an ``.onnx`` in ONNX Runtime, and return what was measured.

    Args:
        file: Path of the file.
        data: ``(x, y)``, `Data`, or what `dwindle.data.read_data` reads; test samples are used, else validation
            samples. None: no metric.
        metric: ``"accuracy"``, another Keras metric, or a function ``(y, outputs) -> float``.
        threads: Threads of the interpreter for the latency.

    Raises:
        DataError: If the file does not exist, or the data does not fit it.
        UnsupportedModelError: If it is damaged, or its runtime can't run it.
    """
    path = Path(file)
    check_metric(metric)
    content: Any = path if is_onnx(path) else read_content(path)
    runner = runner_of(content)
    value, samples = None, 0
    if data is not None:
        value, samples = _metric(runner, data, metric)
    size, sha256 = _size_and_hash(path)
    memory = measure_memory(path)
    name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", "metric"))
    return Measurement(
        file=str(path), metric=str(name), accuracy=value, samples=samples, size_bytes=size,
        latency=measure_latency(content, threads=threads), arena_bytes=memory.arena_bytes,
        arena_note=memory.arena_note, resident_bytes=memory.resident_bytes,
        sha256=sha256, parameters=inspect_file(path).parameters,
        environment={**environment(), "threads": str(threads)},
    )  # fmt: skip


def _size_and_hash(path: Path) -> tuple[int, str]:
    if is_onnx(path):
        from dwindle.measuring.onnx_runtime import content_of

        return content_of(path)
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


def evaluation_split(runner: Runner, data: Data) -> Split:
    """Return the samples that a file is judged on, in its shapes: test samples, else validation samples.

    Where an ONNX file wants images with channels first and the data has them last, they are moved.
    """
    shapes = [tuple(None if size < 0 else size for size in spec.shape[1:]) for spec in runner.inputs]
    turned = [(*shape[1:], shape[0]) if len(shape) > 1 else shape for shape in shapes]
    try:
        return _fitted_split(runner, data, shapes)
    except DataError:
        if isinstance(runner, LiteRTRunner) or not _fits(runner, data, turned):
            raise
    split = _fitted_split(runner, data, turned)
    moved = [np.moveaxis(x, -1, 1) if x.ndim > 2 else x for x in split.x]
    return replace(split, x=tuple(moved))


def _fits(runner: Runner, data: Data, shapes: list[Any]) -> bool:
    try:
        _fitted_split(runner, data, shapes)
    except DataError:
        return False
    return True


def _fitted_split(runner: Runner, data: Data, shapes: list[Any]) -> Split:
    from dwindle.data import fit_to_model

    units = runner.outputs[0].shape[-1] if len(runner.outputs) == 1 and len(runner.outputs[0].shape) == 2 else None
    types = ["float32" if spec.scale is not None else np.dtype(spec.dtype).name for spec in runner.inputs]
    return fit_to_model(data, shapes, units, input_dtypes=types).evaluation()


def as_data(data: Any) -> Data:
    """Return `Data` as it is, and what `dwindle.data.read_data` makes of anything else."""
    from dwindle.data import Data, read_data

    return data if isinstance(data, Data) else read_data(data)


def _metric(runner: Runner, data: Any, metric: Any) -> tuple[float, int]:
    found = as_data(data)
    split = evaluation_split(runner, found)
    if split.y is None:
        raise DataError(f"data `{found.source}` has no labels, so nothing can be scored; pass x and y, or no data")
    return evaluate(runner.predict(list(split.x))[0], split.y, metric), len(split)


@functools.cache
def environment() -> dict[str, str]:
    """Return machine and versions, as text by name."""
    packages = {"keras": "keras", "litert": "ai-edge-litert", "quantizer": "ai-edge-quantizer", "numpy": "numpy",
                "dwindle": "dwindle"}  # fmt: skip
    found = {name: _version(package) for name, package in packages.items()}
    tensorflow = next((v for p in ("tensorflow-cpu", "tensorflow") if (v := _version(p)) != "not installed"), "none")
    return {
        "machine": platform.machine(), "system": platform.system(), "cpu": _cpu(), "python": platform.python_version(),
        "tensorflow": tensorflow, **found,
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
