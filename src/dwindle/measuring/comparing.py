"""Several files side by side: measured alike, timed in turns, and their outputs compared with the first one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One file of a comparison.

    Attributes:
        measurement: What `dwindle.measure` says of it; the latency is that of the turns.
        times_smaller: Size of the first file over this one's.
        times_faster: Median latency of the first file over this one's.
        same_class: Share of samples whose largest output is in the same place as the first file's; None without data,
            where outputs are no scores of classes, or of other shapes.
        max_difference: Largest difference from the first file's outputs; None as above, and of other shapes.
    """

    measurement: Any
    times_smaller: float
    times_faster: float
    same_class: float | None
    max_difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            **self.measurement.to_dict(), "times_smaller": self.times_smaller, "times_faster": self.times_faster,
            "same_class": self.same_class, "max_difference": self.max_difference,
        }  # fmt: skip


def compare(
    files: Sequence[str | Path], data: Any = None, metric: Any = "accuracy", *, threads: int = 1
) -> list[Compared]:
    """Measure several ``.tflite`` or ``.onnx`` files, each in its own runtime, and compare each with the first.

    Args:
        files: Paths, the first one is what the others are compared with.
        data: As in `dwindle.measure`. None: no metric, and no outputs to compare.
        metric: As in `dwindle.measure`.
        threads: Threads of each interpreter.

    Raises:
        ConfigError: If there are not at least two files.
        DataError: If a file does not exist, or the data does not fit it.
        UnsupportedModelError: If one is damaged, or its runtime can't run it.
    """
    from dwindle.measuring import as_data, compare_latency, measure

    if isinstance(files, str | Path) or len(files) < 2:
        raise ConfigError(f"`files` is {files!r}; pass at least two .tflite or .onnx files to compare")
    data = None if data is None else as_data(data)
    found = [measure(file, data, metric, threads=threads) for file in files]
    timed = compare_latency(list(files), threads=threads)
    found = [replace(one, latency=latency) for one, latency in zip(found, timed, strict=True)]
    outputs = [_outputs(file, data) for file in files]
    first = found[0]
    return [
        Compared(
            measurement=one, times_smaller=first.size_bytes / one.size_bytes,
            times_faster=first.latency.p50_ms / one.latency.p50_ms, **_difference(outputs[0], given),
        )
        for one, given in zip(found, outputs, strict=True)
    ]  # fmt: skip


def _outputs(file: str | Path, data: Any) -> np.ndarray | None:
    from dwindle.measuring import evaluation_split
    from dwindle.measuring.runners import runner_of

    if data is None:
        return None
    runner = runner_of(file)
    return runner.predict(list(evaluation_split(runner, data).x))[0]


def _difference(first: np.ndarray | None, other: np.ndarray | None) -> dict[str, float | None]:
    if first is None or other is None or first.shape != other.shape:
        return {"same_class": None, "max_difference": None}
    scores = first.ndim == 2 and first.shape[1] > 1
    return {
        "same_class": float((first.argmax(-1) == other.argmax(-1)).mean()) if scores else None,
        "max_difference": float(np.abs(first.astype(np.float64) - other).max()),
    }
