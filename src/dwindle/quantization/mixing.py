"""Mixed precision: fewer bits where the file suffers least, until it is small enough or has lost enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dwindle.data import Data, Split, read_data
from dwindle.errors import ConfigError, DataError
from dwindle.lifting.flatbuffer import Graph, read_graph
from dwindle.quantization.assignment import assign, fitted, has_weights, pattern_of
from dwindle.quantization.calibration import Ranges
from dwindle.quantization.schemes import Scheme, with_layers
from dwindle.quantization.writing import write_quantized
from dwindle.units import parse_drop, parse_size

SAMPLES = 128
JUDGED_SAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Move:
    """Fewer bits for the operators that read one kernel.

    Attributes:
        operators: Their numbers; one, unless a layer is used several times.
        bits: What their weights get.
        saved: Bytes that the file is smaller by.
        error: Growth of the outputs' mean squared error, as a share of the outputs' own size.
    """

    operators: tuple[int, ...]
    bits: int
    saved: int
    error: float

    @property
    def cost(self) -> float:
        """Error a byte."""
        return max(self.error, 0.0) / self.saved


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
    """Measure, on written files, what each kernel costs and saves with fewer bits.

    Args:
        content: The float file.
        scheme: What all operators have to begin with.
        ranges: Calibrated ranges, where the scheme has integer activations.
        samples: One array per input; at most 128 samples are used.
        progress: Called with ``(done, all)`` measurements.

    Returns:
        The moves that make the file smaller.
    """
    from dwindle.measuring.litert import LiteRTRunner

    few = [np.asarray(array[:SAMPLES]) for array in samples]
    graph = read_graph(content)
    base = assign(graph, scheme)
    whole = write_quantized(content, scheme, ranges, choices=base)
    expected = LiteRTRunner(content).predict(few)
    before = output_error(whole, expected, few)
    options = [
        (numbers, bits)
        for numbers in _sharing(graph)
        for bits in (4, 2)
        if all(_can_have(graph, base, number, bits) for number in numbers)
    ]
    found = []
    for done, (numbers, bits) in enumerate(options, 1):
        written = write_quantized(content, scheme, ranges, choices=_narrowed(base, dict.fromkeys(numbers, bits)))
        saved = len(whole) - len(written)
        if saved > 0:
            error = output_error(written, expected, few) - before
            found.append(Move(operators=numbers, bits=bits, saved=saved, error=error))
        if progress is not None:
            progress(done, len(options))
    return found


def _sharing(graph: Graph) -> list[tuple[int, ...]]:
    """Return the numbers of the operators with weights, together those that read the same ones."""
    readers: dict[int, list[int]] = {}
    for operation in graph.operations:
        if has_weights(operation):
            constant = next(t for t in operation.inputs[:2] if t is not None and t.value is not None)
            readers.setdefault(constant.index, []).append(operation.index)
    return [tuple(numbers) for numbers in readers.values()]


def _can_have(graph: Graph, choices: Sequence[Scheme], number: int, bits: int) -> bool:
    choice = choices[number]
    if not bits < choice.weights <= 8 or (bits == 2 and not choice.dynamic):
        return False
    narrower = replace(choice, weights=bits, name="")
    return fitted(narrower, graph.operations[number]) == narrower


def _narrowed(choices: Sequence[Scheme], bits: dict[int, int]) -> list[Scheme]:
    return [replace(c, weights=bits[i], name="") if i in bits else c for i, c in enumerate(choices)]


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

    Each kernel's cost is measured alone, with the others as ``scheme`` has them; the cheapest errors a byte are taken
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
    taken: dict[tuple[int, ...], Move] = {}
    while size > limit:
        # What a move adds to the one that its kernel has already.
        more = {move: _beyond(taken.get(move.operators), move) for move in moves}
        more = {move: step for move, step in more.items() if step.saved > 0}
        if not more:
            raise ConfigError(
                f"`budget` is {limit:,} bytes; the smallest file that {scheme.name} with fewer bits gives is "
                f"{size:,} bytes; prune the model first, take a smaller one, or raise the budget"
            )
        best = min(more, key=lambda move: more[move].cost)
        taken[best.operators] = best
        size = len(write_quantized(content, scheme, ranges, choices=_narrowed(choices, _bits(taken.values()))))
    return _mixed(graph, scheme, choices, _bits(taken.values()))


def within_drop(
    content: bytes,
    scheme: Scheme,
    ranges: Ranges | None,
    samples: Sequence[np.ndarray],
    max_drop: str | float,
    *,
    judged: Split,
    progress: Callable[[int, int], None] | None = None,
) -> Scheme:
    """Return ``scheme`` with fewer bits for as many operators as a loss of at most ``max_drop`` allows.

    The cheapest errors a byte are tried first; after each the file is written and judged, and a step that loses too
    much is taken back. The loss is the float file's accuracy less the written file's, where there are labels, else the
    share of samples (of positions, where each has a class) whose class is not the float file's. Only the first output
    is judged.

    Args:
        content: The float file.
        scheme: What to begin with.
        ranges: Calibrated ranges, where the scheme has integer activations.
        samples: One array per input; the order of the steps is measured on these.
        max_drop: Largest accepted loss: 0.01 or ``"1%"``.
        judged: Samples that the loss is measured on, with labels or without.
        progress: Called with ``(done, all)`` measurements.

    Raises:
        ConfigError: If ``scheme`` itself loses more; it says how much.
        DataError: If the labels are no classes.
    """
    limit = parse_drop(max_drop)
    accepted = limit + 1e-9  # shares of samples are not exact in binary
    graph = read_graph(content)
    choices = assign(graph, scheme)
    drop = _judge(content, judged)
    start = drop(write_quantized(content, scheme, ranges, choices=choices))
    if start > accepted:
        raise ConfigError(
            f"`max_drop` is {limit:.2%}; the file in {scheme.name} loses {start:.2%} before any layer gets fewer bits; "
            "take a wider scheme such as int16x8 or int8-weights, raise `max_drop`, or leave it out and train with fit"
        )
    moves = sensitivity(content, scheme, ranges, samples, progress=progress)
    bits: dict[int, int] = {}
    for done, move in enumerate(sorted(moves, key=lambda move: (move.cost, -move.saved)), 1):
        if all(move.bits < bits.get(number, 16) for number in move.operators):
            tried = {**bits, **dict.fromkeys(move.operators, move.bits)}
            if drop(write_quantized(content, scheme, ranges, choices=_narrowed(choices, tried))) <= accepted:
                bits = tried
        if progress is not None:
            progress(done, len(moves))
    return _mixed(graph, scheme, choices, bits)


def judging_samples(data: Any) -> Split:
    """Return the samples that pick between files: validation samples, else training samples, else test samples."""
    if isinstance(data, Split):
        return data
    if isinstance(data, np.ndarray):
        return Split(x=(data,), y=None)
    if isinstance(data, list) and all(isinstance(item, np.ndarray) for item in data):
        return Split(x=tuple(data), y=None)
    found = data if isinstance(data, Data) else read_data(data)
    return found.val or found.train or found.evaluation()


def _judge(content: bytes, judged: Split) -> Callable[[bytes], float]:
    """Return the function that says how much a file loses against the float file."""
    from dwindle.measuring.accuracy import accuracy
    from dwindle.measuring.litert import LiteRTRunner

    x, y = judged.x, judged.y
    expected = LiteRTRunner(content).predict(x)[0]
    if y is None:
        wanted = classes_of(expected)
        return lambda file: float((classes_of(LiteRTRunner(file).predict(x)[0]) != wanted).mean())
    labels = y
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise DataError(
            "`max_drop` compares classes, and the labels of `data` are not whole numbers; use `budget`, or pass "
            "samples without labels to compare with the float file's largest outputs"
        )
    best = accuracy(expected, labels)
    return lambda file: best - accuracy(LiteRTRunner(file).predict(x)[0], labels)


def classes_of(outputs: np.ndarray) -> np.ndarray:
    """Return the class of each sample or position: the largest along the last axis; for one value, from 0.5 on."""
    if outputs.ndim > 1 and outputs.shape[-1] > 1:
        return np.asarray(outputs.argmax(axis=-1))
    return outputs >= 0.5


def _beyond(taken: Move | None, move: Move) -> Move:
    if taken is None:
        return move
    return replace(move, saved=move.saved - taken.saved, error=move.error - taken.error)


def _bits(moves: Any) -> dict[int, int]:
    return {number: move.bits for move in moves for number in move.operators}


def _mixed(graph: Graph, scheme: Scheme, choices: Sequence[Scheme], bits: dict[int, int]) -> Scheme:
    """Return the scheme whose layers have the widths that were found; ``scheme`` itself where there are none."""
    narrowed = _narrowed(choices, bits)
    return with_layers(scheme, [(pattern_of(graph, number), narrowed[number]) for number in sorted(bits)])
