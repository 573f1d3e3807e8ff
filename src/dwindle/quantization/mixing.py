"""Mixed precision under a budget: fewer bits where the file suffers least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dwindle.errors import ConfigError
from dwindle.lifting.flatbuffer import Graph, read_graph
from dwindle.quantization.assignment import assign, display_names, fitted, has_weights, names_of
from dwindle.quantization.calibration import Ranges
from dwindle.quantization.schemes import Scheme
from dwindle.quantization.writing import write_quantized
from dwindle.units import parse_size

SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class Move:
    """Fewer bits for one operator.

    Attributes:
        operator: Its number.
        scheme: What it gets.
        saved: Bytes that the file is smaller by.
        error: Growth of the outputs' mean squared error, as a share of the outputs' own size.
    """

    operator: int
    scheme: Scheme
    saved: int
    error: float


def output_error(content: bytes, expected: Sequence[np.ndarray], samples: Sequence[np.ndarray]) -> float:
    """Return the mean squared error of a file's outputs, as a share of the expected outputs' mean square."""
    from dwindle.measuring.litert import LiteRTRunner

    found = LiteRTRunner(content).predict(samples)
    shares = [
        float(np.mean((a - b.reshape(a.shape)) ** 2) / max(float(np.mean(a**2)), 1e-12))
        for a, b in zip(expected, found, strict=True)
    ]
    return float(np.mean(shares))


def sensitivity(
    content: bytes,
    scheme: Scheme,
    ranges: Ranges | None,
    samples: Sequence[np.ndarray],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Move]:
    """Measure, on written files, what each operator with weights costs and saves with fewer bits.

    Args:
        content: The float file.
        scheme: What all operators have to begin with.
        ranges: Calibrated ranges, where the scheme has integer activations.
        samples: One array per input; at most 128 samples are used.
        progress: Called with ``(done, all)`` measurements.
    """
    from dwindle.measuring.litert import LiteRTRunner

    few = [np.asarray(array[:SAMPLES]) for array in samples]
    graph = read_graph(content)
    base = assign(graph, scheme)
    whole = write_quantized(content, scheme, ranges, choices=base)
    expected = LiteRTRunner(content).predict(few)
    before = output_error(whole, expected, few)
    options = [
        (operation.index, narrower)
        for operation, choice in zip(graph.operations, base, strict=True)
        if has_weights(operation) and choice.weights <= 8
        for narrower in _narrower(choice)
        if fitted(narrower, operation) == narrower
    ]
    found = []
    for done, (number, narrower) in enumerate(options, 1):
        choices = [narrower if index == number else choice for index, choice in enumerate(base)]
        written = write_quantized(content, scheme, ranges, choices=choices)
        saved = len(whole) - len(written)
        error = output_error(written, expected, few) - before
        if saved > 0:
            found.append(Move(operator=number, scheme=narrower, saved=saved, error=error))
        if progress is not None:
            progress(done, len(options))
    return found


def _narrower(choice: Scheme) -> list[Scheme]:
    return [
        replace(choice, weights=bits, name="")
        for bits in (4, 2)
        if bits < choice.weights and (bits > 2 or choice.dynamic)
    ]


def within_budget(
    content: bytes,
    scheme: Scheme,
    ranges: Ranges | None,
    samples: Sequence[np.ndarray],
    budget: str | int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Scheme:
    """Return ``scheme`` with fewer bits for some operators, so that the file is at most ``budget`` bytes.

    Each operator's cost is measured alone, with the others as ``scheme`` has them; the cheapest errors a byte are taken
    first, and the file is written and weighed after each.

    Args:
        content: The float file.
        scheme: What to begin with.
        ranges: Calibrated ranges, where the scheme has integer activations.
        samples: One array per input.
        budget: Bytes, or ``"60KB"``.
        progress: Called with ``(done, all)`` measurements.

    Raises:
        ConfigError: If no choice of widths makes the file that small; it says how small it gets.
    """
    limit = parse_size(budget, "budget")
    graph = read_graph(content)
    choices = assign(graph, scheme)
    size = len(write_quantized(content, scheme, ranges, choices=choices))
    if size <= limit:
        return scheme
    moves = sensitivity(content, scheme, ranges, samples, progress=progress)
    taken: dict[int, Move] = {}
    while size > limit:
        # What a move adds to the one that its operator has already.
        open_moves = [(m, m.saved - _saved(taken, m), m.error - _error(taken, m)) for m in moves]
        open_moves = [(m, saved, error) for m, saved, error in open_moves if saved > 0]
        if not open_moves:
            raise ConfigError(
                f"`budget` is {limit:,} bytes; the smallest file that {scheme.name} with fewer bits gives is "
                f"{size:,} bytes; prune the model first, take a smaller one, or raise the budget"
            )
        best = min(open_moves, key=lambda item: max(item[2], 0.0) / item[1])[0]
        taken[best.operator] = best
        choices = [taken[i].scheme if i in taken else choice for i, choice in enumerate(choices)]
        size = len(write_quantized(content, scheme, ranges, choices=choices))
    pairs = tuple((_pattern(graph, number), move.scheme) for number, move in sorted(taken.items()))
    return replace(scheme, name=f"{scheme.name}+layers", layers=(*scheme.layers, *pairs))


def _saved(taken: dict[int, Move], move: Move) -> int:
    return taken[move.operator].saved if move.operator in taken else 0


def _error(taken: dict[int, Move], move: Move) -> float:
    return taken[move.operator].error if move.operator in taken else 0.0


def _pattern(graph: Graph, number: int) -> str:
    """Return a pattern that only this operator matches: its layer's name where that is enough."""
    shown = display_names(graph)
    name = shown[number]
    matching = [i for i, op in enumerate(graph.operations) if name == shown[i] or name in names_of(op)]
    return name if matching == [number] else graph.operations[number].outputs[0].name
