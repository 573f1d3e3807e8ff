"""Blame: which operator of a quantized file costs how much accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import ConfigError, ConversionError
from dwindle.file_samples import arrays_of, check_samples
from dwindle.lifting.flatbuffer import Graph, Operation, read_graph
from dwindle.lifting.float_files import as_float
from dwindle.lifting.grids import Grid, Grids
from dwindle.measuring.accuracy import check_metric, evaluate, higher_is_better
from dwindle.measuring.litert import LiteRTRunner, read_content
from dwindle.quantization.assignment import display_names, fitted, has_weights, pattern_of
from dwindle.quantization.fake_quantization import quantized_range
from dwindle.quantization.mixing import classes_of
from dwindle.quantization.schemes import SCHEMES, Scheme
from dwindle.quantization.writing import (
    SYMMETRIC,
    counterparts,
    makers_in,
    read_grids,
    stored_constant,
    write_quantized,
)

# Operators that only hand values on; there is nothing to blame them for.
_PASSING = {"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "STRIDED_SLICE", "SLICE", "SPLIT", "PACK", "UNPACK",
            "GATHER", "QUANTIZE", "DEQUANTIZE"}  # fmt: skip
SQNR_SAMPLES = 64
TRIED = 3  # operators that the advice tries with more bits


@dataclass(frozen=True, kw_only=True)
class OperatorBlame:
    """What quantizing one operator does.

    Attributes:
        name: The layer's name, or the operator's.
        operator: Its kind, such as ``CONV_2D``.
        weights: Bits of its weights; None where it has none, 32 where they are float.
        activations: Bits of its output.
        sqnr_db: Signal-to-quantization-noise ratio of its output in the quantized file, in dB; higher is better. What
            the operators before it err by is in it. None where there is no noise, or no signal.
        max_error: Largest difference of its output; None where a value is not finite.
        range: Smallest and largest value of its output in the float file.
        saturation: Share of its output's values that lie outside of the grid in the float file; None without a grid.
        only: Metric of the file in which only this operator is quantized; None where LiteRT can't hold such a file.
        without: Metric of the file in which all operators but this one are; None likewise.
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
        rows: One for each operator that is quantized and computes something, in the order of the file.
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Blame:
        """Make it from `to_dict`, or from the JSON that `save` wrote."""
        rows = [{**row, "range": None if row["range"] is None else tuple(row["range"])} for row in data["rows"]]
        return cls(**{**data, "rows": tuple(OperatorBlame(**row) for row in rows)})

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
        metric: As in `dwindle.measure`; of the first output.
        samples: At most this many samples are used.
        progress: Called with ``(done, all)`` operators.

    Returns:
        The rows, and a sentence on what to do.

    Raises:
        ConfigError: If the two files do not have the same operators, or the second is not quantized, or for an unknown
            metric.
        DataError: If the samples do not fit.
    """
    check_metric(metric)
    if samples < 1:
        raise ConfigError(f"`samples` is {samples}; it must be at least 1")
    content, quantized = as_float(read_content(float_file))[0], read_content(quantized_file)
    graph = read_graph(content)
    x, y = arrays_of(data, samples)
    runner = LiteRTRunner(content)
    check_samples(x, runner.inputs)
    grids = _grids(content, quantized)
    choices = _choices(graph, grids)
    guilty = _guilty(graph, choices)
    score = _Score(x=x, y=y, expected=runner.predict(x)[0], metric=metric)
    case = _Case(
        content=content, graph=graph, grids=grids, choices=choices, names=display_names(graph), score=score,
        ranges=_ranges(graph, grids), bounds=_bounds(graph, quantized), value=score(quantized),
        float_value=score(content),
    )  # fmt: skip
    fidelity = _fidelity(content, quantized, graph, grids, x)
    rows: dict[int, OperatorBlame] = {}
    for done, operation in enumerate(guilty, 1):
        only = [c if i == operation.index else SCHEMES["float32"] for i, c in enumerate(choices)]
        rest = [SCHEMES["float32"] if i == operation.index else c for i, c in enumerate(choices)]
        choice = choices[operation.index]
        rows[operation.index] = OperatorBlame(
            name=case.names[operation.index], operator=operation.name,
            weights=choice.weights if has_weights(operation) else None, activations=choice.activations,
            only=case.measured(only), without=case.measured(rest), **fidelity.get(operation.index, _NOTHING),
        )  # fmt: skip
        if progress is not None:
            progress(done, len(guilty))
    return Blame(
        metric=score.name, float_value=case.float_value, quantized_value=case.value, samples=len(x[0]),
        rows=tuple(rows.values()), advice=_advice(case, rows),
    )  # fmt: skip


def operator_errors(
    float_file: str | Path | bytes, quantized_file: str | Path | bytes, data: Any, *, samples: int = SQNR_SAMPLES
) -> tuple[OperatorBlame, ...]:
    """Return how far each operator's output in a quantized file is from the float file's: `blame` without its trials.

    Two runs over the samples in all, so ``only`` and ``without`` are None.

    Args:
        float_file: Path or bytes of the float ``.tflite``.
        quantized_file: Path or bytes of the file quantized from it.
        data: As in `blame`; labels are not used.
        samples: At most this many samples are used. All activations of all samples are held in memory.

    Raises:
        ConfigError: If the two files do not have the same operators, or the second is not quantized.
        DataError: If the samples do not fit.
    """
    content, quantized = as_float(read_content(float_file))[0], read_content(quantized_file)
    graph = read_graph(content)
    x, _ = arrays_of(data, samples)
    check_samples(x, LiteRTRunner(content).inputs)
    grids = _grids(content, quantized)
    choices = _choices(graph, grids)
    names, fidelity = display_names(graph), _fidelity(content, quantized, graph, grids, x, samples)
    return tuple(
        OperatorBlame(
            name=names[operation.index], operator=operation.name,
            weights=choices[operation.index].weights if has_weights(operation) else None,
            activations=choices[operation.index].activations, only=None, without=None,
            **fidelity.get(operation.index, _NOTHING),
        )
        for operation in _guilty(graph, choices)
    )  # fmt: skip


def _grids(content: bytes, quantized: bytes) -> Grids:
    try:
        return read_grids(content, quantized)
    except (ConversionError, ValueError, IndexError) as error:
        raise ConfigError(
            "the quantized file does not have the float file's operators; pass the float file that it was made from"
        ) from error


def _guilty(graph: Graph, choices: Sequence[Scheme]) -> list[Operation]:
    """Return the operators that are quantized and compute something."""
    if all(choice.weights == 32 for choice in choices):
        raise ConfigError("the second file has no quantized operator; pass a quantized .tflite")
    return [op for op in graph.operations if op.name not in _PASSING and choices[op.index].weights < 32]


_NOTHING: dict[str, Any] = {"sqnr_db": None, "max_error": None, "range": None, "saturation": None}


@dataclass(frozen=True, kw_only=True)
class _Score:
    """The metric of a file on the samples."""

    x: Sequence[np.ndarray]
    y: np.ndarray | None
    expected: np.ndarray
    metric: Any

    @property
    def name(self) -> str:
        if self.y is None:
            return "same class as the float file"
        named = getattr(self.metric, "name", None) or getattr(self.metric, "__name__", "metric")
        return self.metric if isinstance(self.metric, str) else str(named)

    @property
    def counts_samples(self) -> bool:
        """Whether the metric is a share of samples."""
        return self.y is None or self.metric == "accuracy"

    def __call__(self, content: bytes) -> float:
        found = LiteRTRunner(content).predict(self.x)[0]
        if self.y is not None:
            return evaluate(found, self.y, self.metric)
        return float((classes_of(found) == classes_of(self.expected)).mean())

    def gain(self, value: float, before: float) -> float:
        """Return by how much a value is better than another."""
        lower = self.y is not None and not higher_is_better(self.metric)
        return before - value if lower else value - before

    def noise(self, value: float) -> float:
        """Return what is no difference: two samples, or a thousandth of another metric."""
        return 2.0 / len(self.x[0]) if self.counts_samples else 1e-3 * abs(value)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """Two files and all that is read off them."""

    content: bytes
    graph: Graph
    grids: Grids
    choices: Sequence[Scheme]
    names: Sequence[str]
    score: _Score
    ranges: dict[str, tuple[float, float]] | None
    bounds: Mapping[str, np.ndarray]
    value: float
    float_value: float

    def written(self, choices: Sequence[Scheme], *, without_bounds: Collection[str] = ()) -> bytes:
        bounds = {name: bound for name, bound in self.bounds.items() if name not in without_bounds}
        return write_quantized(self.content, SCHEMES["int8"], self.ranges, choices=choices, weight_bounds=bounds)

    def measured(self, choices: Sequence[Scheme]) -> float | None:
        try:
            return self.score(self.written(choices))
        except ConversionError:
            return None


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
    """Read the range of each activation off the quantized file.

    A tensor may be on several grids, where neighbours have different widths; that of 8 bits says most, since those of
    16 bits are symmetric.
    """
    placed: list[tuple[str, Grid]] = [(graph.inputs[number].name, grid) for number, grid in grids.inputs.items()]
    placed += [
        (graph.operations[number].outputs[output].name, grid) for (number, output), grid in grids.outputs.items()
    ]
    for operation in graph.operations:
        for position, tensor in enumerate(operation.inputs):
            operand = grids.operands.get((operation.index, position))
            if tensor is not None and tensor.value is None and operand is not None:
                placed.append((tensor.name, operand))
    found: dict[str, tuple[float, float]] = {}
    for name, grid in sorted(placed, key=lambda item: item[1].bits):
        found.setdefault(name, _ends(grid))
    return found or None


def _ends(grid: Grid) -> tuple[float, float]:
    low, high = quantized_range(grid.bits, narrow=grid.bits == 16)
    return (low - grid.zero_point) * grid.scale, (high - grid.zero_point) * grid.scale


def _bounds(graph: Graph, quantized: bytes) -> dict[str, np.ndarray]:
    """Read the bound of each kernel's grid off the quantized file."""
    written = read_graph(quantized)
    makers, found = makers_in(written), {}
    for operation, twin in zip(graph.operations, counterparts(graph, written), strict=True):
        kernel, own = (op.inputs[1] if len(op.inputs) > 1 else None for op in (operation, twin))
        given = None if own is None else stored_constant(own, makers)
        if kernel is None or operation.name not in SYMMETRIC or given is None or given.scale is None:
            continue
        shape = [1] * len(kernel.shape)
        if given.scale.size > 1:
            shape[given.axis] = -1
        found[kernel.name] = (given.scale * quantized_range(given.bits)[1]).reshape(shape).astype(np.float32)
    return found


def _fidelity(
    content: bytes, quantized: bytes, graph: Graph, grids: Grids, x: Sequence[np.ndarray], samples: int = SQNR_SAMPLES
) -> dict[int, dict[str, Any]]:
    """Compare each operator's output in the two files on a few samples."""
    from dwindle.exporting.verify import activations_of

    few = [array[:samples] for array in x]
    before, after = activations_of(content, few), activations_of(quantized, few)
    found = {}
    for operation, twin in zip(graph.operations, counterparts(graph, read_graph(quantized)), strict=True):
        expected, got = before.get(operation.outputs[0].name), after.get(twin.outputs[0].name)
        if expected is None or got is None or expected.shape != got.shape:
            continue
        noise = float(np.mean((expected - got) ** 2, dtype=np.float64))
        signal = float(np.mean(expected**2, dtype=np.float64))
        finite = np.isfinite(noise) and np.isfinite(signal)
        found[operation.index] = {
            "sqnr_db": float(10 * np.log10(signal / noise)) if finite and noise > 0 and signal > 0 else None,
            "max_error": float(np.abs(expected - got).max()) if finite else None,
            "range": (float(expected.min()), float(expected.max())),
            "saturation": _saturation(operation, grids, expected),
        }
    return found


def _saturation(operation: Operation, grids: Grids, expected: np.ndarray) -> float | None:
    grid = grids.outputs.get((operation.index, 0))
    if grid is None:
        return None
    low, high = _ends(grid)
    return float(((expected < low - grid.scale / 2) | (expected > high + grid.scale / 2)).mean())


def _advice(case: _Case, rows: Mapping[int, OperatorBlame]) -> str:
    """Try more bits for the operators that cost most, and say what helps."""
    score, value = case.score, case.value
    noise, loss = score.noise(case.float_value), score.gain(case.float_value, value)
    if loss <= noise:
        return "Nothing to do: the quantized file is as good as the float one on these samples."
    whole = case.written(case.choices)
    rebuilt = score(whole)
    care = ""
    if abs(rebuilt - value) > noise:
        care = (
            f" The figures are of files rounded anew from the float file, and all of it comes to {rebuilt:.4g} that "
            f"way, not {value:.4g}: pass the float file that the quantized one was made from."
        )
    gains = {n: score.gain(row.without, rebuilt) for n, row in rows.items() if row.without is not None}
    alone = [(n,) for n in sorted(gains, key=lambda n: -gains[n])[:TRIED] if gains[n] > noise]
    losses = {n: score.gain(case.float_value, row.only) for n, row in rows.items() if row.only is not None}
    # What one operator makes and the next reads is on one grid, which only both together leave.
    worst = sorted(losses, key=lambda n: -losses[n])[:TRIED]
    together = [tuple(i for i in _with_readers(case.graph, n) if case.choices[i].weights < 32) for n in worst]
    helps = [step for step in _steps(case, alone, whole, rebuilt) if step.gain > noise]
    helps = helps or [step for step in _steps(case, together, whole, rebuilt) if step.gain > noise]
    if not helps:
        return (
            f"No few operators make up for the loss of {_points(loss, score)}: train with dw.quantize(...).fit, or "
            f"try another calibration (percentile, mse).{care}"
        )
    best = max(step.gain for step in helps)
    step = min((step for step in helps if step.gain >= best - noise), key=lambda step: step.extra)
    what = "in float" if step.scheme.weights == 32 else f"with {step.scheme.weights}-bit weights"
    if step.scheme.activations == 16:
        what = "in 16 bits"
    pairs = ", ".join(f"{pattern_of(case.graph, number)!r}: {step.scheme.name!r}" for number in step.operators)
    base = _base(case)
    how = f"add {pairs} to its scheme" if base is None else f"scheme {{'*': {base!r}, {pairs}}}"
    named = [f"`{case.names[n]}`" for n in step.operators if case.graph.operations[n].name not in _PASSING]
    won = f"{'+' if score.counts_samples else 'better by '}{_points(step.gain, score)}"
    return f"Keep {' and '.join(named)} {what}: {won} for {round(step.extra / 1000, 1) + 0.0:+.1f} KB ({how}).{care}"


@dataclass(frozen=True, kw_only=True)
class _Step:
    """More bits for some operators, measured."""

    operators: tuple[int, ...]
    scheme: Scheme
    gain: float
    extra: int


def _steps(case: _Case, groups: Sequence[tuple[int, ...]], whole: bytes, rebuilt: float) -> list[_Step]:
    found = []
    for group in groups:
        for wider in _wider(case.choices[group[0]]):
            if any(fitted(wider, case.graph.operations[number]) != wider for number in group):
                continue
            some = [wider if i in group else choice for i, choice in enumerate(case.choices)]
            own = {name for number in group for name in _kernels(case.graph, number)}
            try:
                file = case.written(some, without_bounds=own)
            except ConversionError:
                continue
            gain = case.score.gain(case.score(file), rebuilt)
            found.append(_Step(operators=group, scheme=wider, gain=gain, extra=len(file) - len(whole)))
    return found


def _with_readers(graph: Graph, number: int) -> tuple[int, ...]:
    """Return an operator and those that read its output, also behind operators that only hand it on."""
    group, made = [number], {tensor.index for tensor in graph.operations[number].outputs}
    for operation in graph.operations[number + 1 :]:
        if any(tensor is not None and tensor.index in made for tensor in operation.inputs):
            group.append(operation.index)
            if operation.name in _PASSING:
                made |= {tensor.index for tensor in operation.outputs}
    return tuple(group)


def _base(case: _Case) -> str | None:
    """Return the name of the scheme that the whole file has; None where its layers differ, or it has no name."""
    grids = [*case.grids.outputs.values(), *case.grids.operands.values()]
    steps = [*(grid.scale for grid in grids), *(float(b.flat[0]) / 127 for b in case.bounds.values())]
    power_of_two = bool(steps) and all(np.log2(step) % 1 == 0 for step in steps if step > 0)
    for name, scheme in SCHEMES.items():
        if scheme.power_of_two == power_of_two and all(
            _same(fitted(scheme, operation), choice)
            for operation, choice in zip(case.graph.operations, case.choices, strict=True)
            if has_weights(operation)
        ):
            return name
    return None


def _same(first: Scheme, second: Scheme) -> bool:
    widths = [(s.weights, s.activations, s.dynamic, s.granularity) for s in (first, second)]
    return widths[0] == widths[1]


def _kernels(graph: Graph, number: int) -> set[str]:
    return {tensor.name for tensor in graph.operations[number].inputs if tensor is not None}


def _points(gain: float, score: _Score) -> str:
    return f"{gain * 100:.2f} points" if score.counts_samples else f"{gain:.4g} {score.name}"


def _wider(choice: Scheme) -> list[Scheme]:
    """Return what could be tried instead, the cheapest first."""
    wider = []
    if choice.weights < 8:
        names = {8: "int8", 16: "int16x8", 32: "int8-dynamic" if choice.dynamic else "int8-weights"}
        wider.append(SCHEMES[names[choice.activations]])
    if choice.activations == 8:
        wider.append(SCHEMES["int16x8"])
    wider.append(SCHEMES["float32"])
    return wider
