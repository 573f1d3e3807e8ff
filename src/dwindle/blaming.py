"""Blame: which operator of a quantized file costs how much accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import ConfigError, DataError
from dwindle.lifting.flatbuffer import Graph, Operation, read_graph
from dwindle.lifting.float_files import as_float
from dwindle.lifting.grids import Grids
from dwindle.measuring.accuracy import evaluate, higher_is_better
from dwindle.measuring.litert import LiteRTRunner, read_content
from dwindle.quantization.assignment import display_names, fitted, has_weights
from dwindle.quantization.schemes import SCHEMES, Scheme
from dwindle.quantization.writing import read_grids, write_quantized

# Operators that only hand values on; there is nothing to blame them for.
_PASSING = {"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "STRIDED_SLICE", "SLICE", "SPLIT", "PACK", "UNPACK",
            "GATHER", "QUANTIZE", "DEQUANTIZE"}  # fmt: skip
SQNR_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class OperatorBlame:
    """What quantizing one operator does.

    Attributes:
        name: The layer's name, or the operator's.
        operator: Its kind, such as ``CONV_2D``.
        weights: Bits of its weights; None where it has none, 32 where they are float.
        activations: Bits of its output.
        sqnr_db: Signal-to-quantization-noise ratio of its output in the quantized file, in dB; higher is better.
        max_error: Largest difference of its output.
        range: Smallest and largest value of its output in the float file.
        saturation: Share of its output's values at an end of the grid that lie outside of it in the float file.
        only: Metric of the file in which only this operator is quantized.
        without: Metric of the file in which all operators but this one are.
    """

    name: str
    operator: str
    weights: int | None
    activations: int
    sqnr_db: float | None
    max_error: float | None
    range: tuple[float, float] | None
    saturation: float | None
    only: float | None
    without: float | None


@dataclass(frozen=True, kw_only=True)
class Blame:
    """Which operator costs how much.

    Attributes:
        metric: Name of the metric.
        float_value: Of the float file.
        quantized_value: Of the quantized file.
        samples: Number of samples that it was measured on.
        rows: One an operator, in the order of the file.
        advice: What to do, in a sentence.
    """

    metric: str
    float_value: float
    quantized_value: float
    samples: int
    rows: tuple[OperatorBlame, ...]
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        from dwindle.files import check_output_file, write_bytes

        path = check_output_file(path, suffixes=(".json",))
        return write_bytes(path, json.dumps(self.to_dict(), indent=2).encode("utf8"))


def blame(
    float_file: str | Path | bytes,
    quantized_file: str | Path | bytes,
    data: Any,
    *,
    metric: Any = "accuracy",
    samples: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Blame:
    """Find out which operators of a quantized file cost accuracy, by running files in which only some are quantized.

    Per operator: how far its output in the quantized file is from the float file's (SQNR, largest error, saturation),
    and the metric of two files written for it, one in which only it is quantized, one in which all but it are. Cost:
    two runs over the samples for each operator that computes.

    Args:
        float_file: Path or bytes of the float ``.tflite``.
        quantized_file: Path or bytes of the file quantized from it, by dwindle or ai-edge-quantizer.
        data: Labelled samples: ``(x, y)``, `Data`, or what `dwindle.data.read_data` reads. Without labels the metric
            is the share of samples for which a file and the float file name the same class.
        metric: As in `dwindle.measure`.
        samples: At most this many samples are used.
        progress: Called with ``(done, all)`` operators.

    Returns:
        The rows, and a sentence on what to do.

    Raises:
        ConfigError: If the two files do not have the same operators, or the second is not quantized.
        DataError: If the samples do not fit.
    """
    content, quantized = read_content(float_file), read_content(quantized_file)
    content, _ = as_float(content)
    graph = read_graph(content)
    x, y = _samples(data, samples)
    if len(x) != len(graph.inputs):
        raise DataError(f"the data has {len(x)} arrays and the file has {len(graph.inputs)} inputs")
    try:
        grids = read_grids(content, quantized)
    except Exception as error:
        raise ConfigError(
            "the quantized file does not have the float file's operators; pass the float file that it was made from"
        ) from error
    choices = _choices(graph, grids)
    if all(choice.weights == 32 for choice in choices):
        raise ConfigError("the second file has no quantized operator; pass a quantized .tflite")
    ranges, bounds = _ranges(graph, grids), _bounds(graph, quantized)
    expected = LiteRTRunner(content).predict(x)
    score = _Score(x=x, y=y, expected=expected, metric=metric)
    whole = write_quantized(content, SCHEMES["int8"], ranges, choices=choices, weight_bounds=bounds)
    names = display_names(graph)
    fidelity = _fidelity(content, quantized, graph, grids, x)
    guilty = [op for op in graph.operations if op.name not in _PASSING and choices[op.index].weights < 32]
    rows, without = [], {}
    for done, operation in enumerate(guilty, 1):
        only = [c if i == operation.index else SCHEMES["float32"] for i, c in enumerate(choices)]
        rest = [SCHEMES["float32"] if i == operation.index else c for i, c in enumerate(choices)]
        values = [score(_written(content, ranges, bounds, some)) for some in (only, rest)]
        without[operation.index] = values[1]
        choice = choices[operation.index]
        rows.append(
            OperatorBlame(
                name=names[operation.index], operator=operation.name,
                weights=choice.weights if has_weights(operation) else None, activations=choice.activations,
                only=values[0], without=values[1], **fidelity.get(operation.index, _NOTHING),
            )
        )  # fmt: skip
        if progress is not None:
            progress(done, len(guilty))
    value = score(quantized)
    advice = _advice(content, graph, choices, ranges, bounds, score, value, without, names, len(whole))
    return Blame(
        metric=score.name, float_value=score(content), quantized_value=value, samples=len(x[0]), rows=tuple(rows),
        advice=advice,
    )  # fmt: skip


_NOTHING: dict[str, Any] = {"sqnr_db": None, "max_error": None, "range": None, "saturation": None}


def _samples(data: Any, limit: int) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    from dwindle.data import Data, Split, read_data

    if isinstance(data, np.ndarray):
        return (data[:limit],), None
    if isinstance(data, list) and all(isinstance(item, np.ndarray) for item in data):
        return tuple(item[:limit] for item in data), None
    split = data if isinstance(data, Split) else None
    if split is None:
        found = data if isinstance(data, Data) else read_data(data)
        split = found.evaluation()
    y = getattr(split, "y", None)
    return tuple(array[:limit] for array in split.x), None if y is None else np.asarray(y)[:limit]


@dataclass(frozen=True, kw_only=True)
class _Score:
    """The metric of a file on the samples; higher is better."""

    x: Sequence[np.ndarray]
    y: np.ndarray | None
    expected: Sequence[np.ndarray]
    metric: Any

    @property
    def name(self) -> str:
        if self.y is None:
            return "same class as the float file"
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "name", "metric")

    def __call__(self, content: bytes) -> float:
        found = LiteRTRunner(content).predict(self.x)[0]
        if self.y is not None:
            return evaluate(found, self.y, self.metric)
        return float((found.argmax(-1) == self.expected[0].argmax(-1)).mean())


def _written(content: bytes, ranges: Any, bounds: Any, choices: Sequence[Scheme]) -> bytes:
    return write_quantized(content, SCHEMES["int8"], ranges, choices=choices, weight_bounds=bounds)


def _choices(graph: Graph, grids: Grids) -> list[Scheme]:
    """Read each operator's scheme off the quantized file."""
    found = []
    for operation in graph.operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        weight = None if kernel is None else grids.weights.get(kernel.name)
        output = grids.outputs.get((operation.index, 0))
        if output is None and weight is None:
            found.append(SCHEMES["float32"])
        elif output is None and weight is not None:
            grain: str | int = weight.block or ("channel" if weight.per_channel else "tensor")
            dynamic = operation.index in grids.dynamic
            found.append(Scheme(weights=weight.bits, dynamic=dynamic, granularity=grain))
        elif output is not None:
            bits = weight.bits if weight is not None and not weight.asymmetric else 8
            grain = "channel" if weight is None or weight.per_channel or weight.asymmetric else "tensor"
            found.append(Scheme(weights=bits, activations=output.bits, granularity=grain))
    return found


def _ranges(graph: Graph, grids: Grids) -> dict[str, tuple[float, float]] | None:
    """Read the range of each activation off the quantized file."""
    from dwindle.quantization.fake_quantization import quantized_range

    found = {}
    for number, grid in grids.inputs.items():
        low, high = quantized_range(grid.bits)
        found[graph.inputs[number].name] = ((low - grid.zero_point) * grid.scale, (high - grid.zero_point) * grid.scale)
    for (number, output), grid in grids.outputs.items():
        low, high = quantized_range(grid.bits, narrow=grid.bits == 16)
        name = graph.operations[number].outputs[output].name
        found[name] = ((low - grid.zero_point) * grid.scale, (high - grid.zero_point) * grid.scale)
    for operation in graph.operations:  # inputs of float type are rounded behind the input
        for position, tensor in enumerate(operation.inputs):
            operand = grids.operands.get((operation.index, position))
            if tensor is not None and operand is not None and tensor.name not in found and tensor.value is None:
                low, high = quantized_range(operand.bits, narrow=operand.bits == 16)
                found[tensor.name] = (
                    (low - operand.zero_point) * operand.scale,
                    (high - operand.zero_point) * operand.scale,
                )
    return found or None


def _bounds(graph: Graph, quantized: bytes) -> dict[str, np.ndarray]:
    """Read the bound of each kernel's grid off the quantized file."""
    from dwindle.quantization.fake_quantization import quantized_range
    from dwindle.quantization.writing import SYMMETRIC

    stored = {t.name: t for t in read_graph(quantized).tensors if t.value is not None and t.is_quantized}
    found = {}
    for operation in graph.operations:
        kernel = operation.inputs[1] if len(operation.inputs) > 1 else None
        given = None if kernel is None else stored.get(kernel.name)
        if kernel is None or operation.name not in SYMMETRIC or given is None or given.scale is None:
            continue
        shape = [1] * len(kernel.shape)
        if given.scale.size > 1:
            shape[given.axis] = -1
        found[kernel.name] = (given.scale * quantized_range(given.bits)[1]).reshape(shape).astype(np.float32)
    return found


def _fidelity(
    content: bytes, quantized: bytes, graph: Graph, grids: Grids, x: Sequence[np.ndarray]
) -> dict[int, dict[str, Any]]:
    """Compare each operator's output in the two files on a few samples."""
    from dwindle.exporting.verify import activations_of

    few = [array[:SQNR_SAMPLES] for array in x]
    before, after = activations_of(content, few), activations_of(quantized, few)
    found = {}
    for operation in graph.operations:
        name = operation.outputs[0].name
        expected, got = before.get(name), after.get(name)
        if expected is None or got is None or expected.shape != got.shape:
            continue
        noise = float(np.mean((expected - got) ** 2))
        signal = float(np.mean(expected**2))
        found[operation.index] = {
            "sqnr_db": None if noise == 0 or signal == 0 else float(10 * np.log10(signal / noise)),
            "max_error": float(np.abs(expected - got).max()),
            "range": (float(expected.min()), float(expected.max())),
            "saturation": _saturation(operation, grids, expected),
        }
    return found


def _saturation(operation: Operation, grids: Grids, expected: np.ndarray) -> float | None:
    from dwindle.quantization.fake_quantization import quantized_range

    grid = grids.outputs.get((operation.index, 0))
    if grid is None:
        return None
    low, high = ((end - grid.zero_point) * grid.scale for end in quantized_range(grid.bits))
    return float(((expected < low - grid.scale / 2) | (expected > high + grid.scale / 2)).mean())


def _advice(
    content: bytes, graph: Graph, choices: Sequence[Scheme], ranges: Any, bounds: Any, score: _Score, value: float,
    without: dict[int, float], names: Sequence[str], size: int,
) -> str:  # fmt: skip
    """Try more bits for the operators that cost most, and say what helps."""
    lower = score.y is not None and not higher_is_better(score.metric)
    gains = {number: (value - other) if lower else (other - value) for number, other in without.items()}
    noise = 2.0 / len(score.x[0])  # two samples
    loss = (value - score(content)) if lower else (score(content) - value)
    if loss <= noise:
        return "Nothing to do: the quantized file is as good as the float one on these samples."
    worst = [number for number, gain in sorted(gains.items(), key=lambda item: -item[1])[:3] if gain > noise]
    tried = []
    for number in worst:
        for wider in _wider(choices[number]):
            if fitted(wider, graph.operations[number]) != wider:
                continue
            some = [wider if i == number else choice for i, choice in enumerate(choices)]
            own = _kernels(graph, number)
            file = _written(content, ranges, {name: bound for name, bound in bounds.items() if name not in own}, some)
            gain = (value - score(file)) if lower else (score(file) - value)
            tried.append((gain, len(file) - size, names[number], wider))
    tried = [item for item in tried if item[0] > noise]
    if not tried:
        return (
            f"No single operator makes up for the loss of {_points(loss, score)}: train with dw.quantize(...).fit, or "
            "try another calibration (percentile, mse)."
        )
    gain, extra, name, wider = max(tried, key=lambda item: (item[0], -item[1]))
    what = (
        "in float"
        if wider.weights == 32
        else "in 16 bits"
        if wider.activations == 16
        else f"with {wider.weights}-bit weights"
    )
    won, cost = _points(gain, score), f"{extra / 1000:+.1f} KB"
    return f"Keep `{name}` {what}: {won} for {cost} (scheme {{'{name}': '{wider.name}'}})."


def _kernels(graph: Graph, number: int) -> set[str]:
    return {tensor.name for tensor in graph.operations[number].inputs if tensor is not None}


def _points(gain: float, score: _Score) -> str:
    if score.y is None or score.metric == "accuracy":
        return f"{gain * 100:+.2f} points"
    return f"{gain:+.4g} {score.name}"


def _wider(choice: Scheme) -> list[Scheme]:
    """Return what could be tried instead, the cheapest first."""
    wider = []
    if choice.weights < 8:
        kept = "int8" if choice.activations == 8 else "int16x8" if choice.activations == 16 else None
        wider.append(SCHEMES[kept] if kept else Scheme(weights=8, dynamic=choice.dynamic, name="int8-dynamic"))
    if choice.activations == 8:
        wider.append(SCHEMES["int16x8"])
    wider.append(SCHEMES["float32"])
    return wider
