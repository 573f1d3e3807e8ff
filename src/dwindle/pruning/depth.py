"""Depth: whole residual blocks and transformer layers are left out, the least important first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dwindle.errors import ConfigError, UnsupportedModelError, check_choice
from dwindle.graph_editing import Ref, Taps, functional_config, rebuilt, redirected
from dwindle.graph_editing import calls as calls_of
from dwindle.model_samples import output_change, outputs_of, samples_for
from dwindle.pruning.residual_blocks import Block, residual_blocks
from dwindle.weights import check_model, select

__all__ = ["Block", "Depth", "RatedBlock", "drop_blocks", "rate_blocks", "residual_blocks"]

CRITERIA = ("output", "similarity", "magnitude")
UNITS = ("block", "layer")
Difference = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]


@dataclass(frozen=True, kw_only=True)
class RatedBlock:
    """One or more residual blocks that are left out together, and what that costs.

    Attributes:
        name: Of the block; of an attention block and the block behind it, both, with a ``+``.
        blocks: The blocks.
        parameters: That leaving them out saves.
        importance: By the criterion; the least important go first.
    """

    name: str
    blocks: tuple[Block, ...]
    parameters: int
    importance: float


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What `drop_blocks` did.

    Attributes:
        dropped: What was left out, in this order.
        kept: What could have been left out as well, the least important first.
        pinned: What can't be, with the reason.
        parameters_before: Of the model.
        parameters_after: Of the model that came out.
    """

    dropped: tuple[RatedBlock, ...]
    kept: tuple[RatedBlock, ...]
    pinned: tuple[Block, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [f"{self.parameters_before:,} parameters, {self.parameters_after:,} without {len(self.dropped)} blocks"]
        for word, rated in (("dropped", self.dropped), ("kept", self.kept)):
            lines += [f"{word}: {r.name}, {r.parameters:,} parameters, importance {r.importance:.4g}" for r in rated]
        return "\n".join([*lines, *(f"pinned: {block.name}: {block.pinned}" for block in self.pinned)])


def drop_blocks(
    model: keras.Model,
    count: int | None = None,
    *,
    fraction: float | None = None,
    layers: str | Sequence[str] | None = None,
    data: Any = None,
    criterion: str | Difference | None = None,
    unit: str = "block",
    greedy: bool = False,
    samples: int = 256,
) -> keras.Model:
    r"""Return a shallower twin: the least important residual blocks compute ``b = a`` in place of ``b = a + f(a)``.

    A block is an addition of which one side depends on the model's input through the other side only: the blocks of
    residual networks, the inverted residuals of MobileNet, attention and the layers behind it in transformers. The
    result computes what the model would with ``f`` multiplied by 0, but has no ``f``. What has been lost comes back by
    training it.

    Criteria, the importance of a block:

    - ``"output"``: how far the model's outputs move on the data without it: mean ``KL(p || q) = sum p log(p / q)`` of
      outputs that are probabilities, ``mean((y - y')^2) / var(y)`` of others, summed over the outputs.
    - ``"similarity"``: ``1 - mean(a . b / (|a| |b|))`` on the data, over vectors along the last axis.
    - ``"magnitude"``, without data: how large ``f`` is by its last weights: the root mean square of a normalization's
      ``gamma``, else ``sqrt(sum w^2 / outputs)`` of a kernel, what it makes of inputs of unit variance.
    - A function ``(expected outputs, outputs without the block) -> float``.

    Args:
        model: A built functional or sequential model, nested ones included; it is not changed.
        count: How many blocks are left out.
        fraction: Which share of them, in (0, 1], rounded.
        layers: Shell-style patterns of block names (see `residual_blocks`): only these are looked at; without ``count``
            and ``fraction`` all of them are left out.
        data: Samples, as `dwindle.data.read_data` takes them or an array; labels are not used.
        criterion: As above; None: ``"output"`` with data, else ``"magnitude"``.
        unit: ``"block"``: each block by itself; ``"layer"``: an attention block and the block behind it, a
            transformer's layer, stay or go together.
        greedy: Rate the blocks that are left anew each time one has gone; costs as many ratings as blocks are dropped.
        samples: At most this many samples are used.

    Returns:
        A new model, not compiled. Its attribute ``depth`` is a `Depth`: what went, what could, and what can't and why,
            as its ``notes`` say as well.

    Raises:
        ConfigError: For a value out of range, a criterion that needs data without any, a pattern that matches nothing,
            or more blocks than there are (says how many).
        DataError: If the data does not fit.
        UnsupportedModelError: If there is no block to leave out; says what pins those that there are.

    Example:
        >>> import keras, dwindle as dw
        >>> from dwindle.pruning.depth import drop_blocks
        >>> x = inputs = keras.Input((8,))
        >>> for _ in range(3):
        ...     x = keras.layers.Add()([x, keras.layers.Dense(8, activation="relu")(x)])
        >>> shallow = drop_blocks(keras.Model(inputs, x), 2)
        >>> len([layer for layer in shallow.layers if isinstance(layer, keras.layers.Dense)])
        1

    References:
        Veit et al. 2016, arXiv 1605.06431 (residual networks without some blocks); Men et al. 2024, ShortGPT, arXiv
        2403.03853 (similarity, there "block influence", over tokens); Kim et al. 2024, Shortened LLaMA, arXiv
        2402.02834 (the output's change, one-shot).
    """
    criterion = _check(model, count, fraction, layers, data, criterion, unit, samples)
    x = None if data is None else list(samples_for(model, data, samples).x)
    found = residual_blocks(model)
    free = [block for block in found if not block.pinned]
    pinned = tuple(block for block in found if block.pinned)
    if not free:
        raise UnsupportedModelError(f"`model` ({model.name}) has no residual block to leave out{_why(pinned)}")
    chosen = set(select([block.name for block in found], layers))
    units = _units(model, [block for block in free if block.name in chosen], unit)
    number = _number(len(units), count, fraction, layers, [block for block in pinned if block.name in chosen])
    expected = outputs_of(model, x) if x is not None and criterion not in ("similarity", "magnitude") else []
    rated = _rated(model, units, (), criterion, x, expected)
    dropped: list[RatedBlock] = []
    while len(dropped) < number:
        dropped.append(rated.pop(0))
        gone = {layer for each in dropped for block in each.blocks for layer in block.layers}
        rest = [each for each in rated if not any(_end(block) in gone for block in each.blocks)]
        if len(rest) < number - len(dropped):
            raise ConfigError(
                f"`count` is {number}, but blocks lie inside of others: no more than {len(dropped) + len(rest)} can go"
            )
        rated = rest
        if greedy and len(dropped) < number:
            left = [each.blocks for each in rated]
            rated = _rated(model, left, [block for each in dropped for block in each.blocks], criterion, x, expected)
    twin = without(model, [block for each in dropped for block in each.blocks])
    twin.depth = Depth(
        dropped=tuple(dropped), kept=tuple(rated), pinned=pinned, parameters_before=model.count_params(),
        parameters_after=twin.count_params(),
    )  # fmt: skip
    twin.notes = tuple(f"{block.name} stays: {block.pinned}" for block in pinned)
    return twin


def rate_blocks(
    model: keras.Model,
    *,
    data: Any = None,
    criterion: str | Difference | None = None,
    unit: str = "block",
    samples: int = 256,
) -> list[RatedBlock]:
    """Return the blocks that `drop_blocks` can leave out, the least important first; the arguments are its own."""
    criterion = _check(model, 1, None, None, data, criterion, unit, samples)
    x = None if data is None else list(samples_for(model, data, samples).x)
    units = _units(model, [block for block in residual_blocks(model) if not block.pinned], unit)
    expected = outputs_of(model, x) if x is not None and criterion not in ("similarity", "magnitude") else []
    return _rated(model, units, (), criterion, x, expected)


def without(model: keras.Model, blocks: Sequence[Block]) -> keras.Model:
    """Return a twin in which the blocks hand on what comes in.

    Args:
        model: A built model; it is not changed.
        blocks: Blocks of `residual_blocks` that are not pinned.
    """
    targets: dict[str, dict[Ref, Ref]] = {}
    for block in blocks:
        targets.setdefault(block.graph, {})[block.end] = block.start

    def edit(prefix: str, config: dict[str, Any]) -> dict[str, Any]:
        return redirected(config, targets[prefix]) if prefix in targets else config

    return rebuilt(model, edit)


def _end(block: Block) -> str:
    return f"{block.graph}{block.end[0]}"


def _check(
    model: Any, count: Any, fraction: Any, layers: Any, data: Any, criterion: Any, unit: str, samples: int
) -> str | Difference:
    check_model(model)
    if count is not None and fraction is not None:
        raise ConfigError("`count` and `fraction` are both given; pass one of them")
    if count is None and fraction is None and layers is None:
        raise ConfigError("`count`, `fraction` and `layers` are all left out; say how many blocks go, or which")
    if count is not None and not (isinstance(count, int | np.integer) and not isinstance(count, bool) and count >= 1):
        raise ConfigError(f"`count` is {count!r}; it must be a whole number of blocks, at least 1")
    if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction <= 1):
        raise ConfigError(f"`fraction` is {fraction!r}; it must be a share of the blocks in (0, 1], such as 0.25")
    if samples < 1:
        raise ConfigError(f"`samples` is {samples}; it must be at least 1")
    check_choice("unit", unit, UNITS)
    chosen = criterion if criterion is not None else "magnitude" if data is None else "output"
    if not callable(chosen):
        check_choice("criterion", chosen, CRITERIA)
    if data is None and chosen != "magnitude":
        raise ConfigError(f"`criterion` is {chosen!r}, which needs data; pass `data`, or use `magnitude`")
    return chosen


def _number(available: int, count: int | None, fraction: float | None, layers: Any, pinned: Sequence[Block]) -> int:
    if available == 0:
        raise UnsupportedModelError(f"`layers` ({layers}) names no block that can be left out{_why(pinned)}")
    number = available
    if count is not None:
        number = int(count)
    elif fraction is not None:
        number = max(1, math.floor(fraction * available + 0.5))
    if number > available:
        raise ConfigError(f"`count` is {number}, but there are {available} blocks that can be left out{_why(pinned)}")
    return number


def _why(pinned: Sequence[Block]) -> str:
    told = "; ".join(f"`{block.name}` can't go: {block.pinned}" for block in pinned[:4])
    return f"; {told}" if told else ""


def _units(model: keras.Model, blocks: Sequence[Block], unit: str) -> list[tuple[Block, ...]]:
    """Return what goes together: each block, or an attention block with the next one."""
    if unit == "block":
        return [(block,) for block in blocks]
    graphs = {"": functional_config(model)}
    units: list[tuple[Block, ...]] = []
    for block in blocks:
        before = units[-1][-1] if units else None
        follows = (
            before is not None and len(units[-1]) == 1 and before.attention and not block.attention
            and before.graph == block.graph and _leads(_graph_at(model, block.graph, graphs), before.end, block.start)
        )  # fmt: skip
        if follows:
            units[-1] = (*units[-1], block)
        else:
            units.append((block,))
    return units


def _graph_at(model: keras.Model, path: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if path not in known:
        found = model
        for name in path.rstrip("/").split("/"):
            found = found.get_layer(name)
        known[path] = functional_config(found)
    return known[path]


def _leads(config: Mapping[str, Any], end: Ref, start: Ref) -> bool:
    """Whether a tensor is another one, or made from nothing else by a chain of layers, as a normalization is."""
    taken = calls_of(config)
    while start != end:
        before = taken[start[:2]]
        if len(before) != 1:
            return False
        start = before[0]
    return True


def _rated(
    model: keras.Model, units: Sequence[tuple[Block, ...]], gone: Sequence[Block], criterion: str | Difference,
    x: list[np.ndarray] | None, expected: Sequence[np.ndarray],
) -> list[RatedBlock]:  # fmt: skip
    """Return the units with their importance in the model without ``gone``, the least important first."""
    if criterion == "magnitude":
        values = [sum(_size(model, block) for block in unit) for unit in units]
    elif criterion == "similarity":
        values = _distances(model, units, gone, x or [])
    else:
        difference = criterion if callable(criterion) else output_change
        values = [difference(expected, outputs_of(without(model, [*gone, *unit]), x or [])) for unit in units]
    rated = [
        RatedBlock(
            name="+".join(block.name for block in unit), blocks=unit, importance=float(value),
            parameters=sum(block.parameters for block in unit),
        )
        for unit, value in zip(units, values, strict=True)
    ]  # fmt: skip
    return sorted(rated, key=lambda each: each.importance)


def _distances(
    model: keras.Model, units: Sequence[tuple[Block, ...]], gone: Sequence[Block], x: Sequence[np.ndarray]
) -> list[float]:
    """Return ``1 - cos`` of what goes into each unit and what comes out of it."""
    reduced = without(model, gone) if gone else model
    # Names stay; numbers of calls need not.
    now = {block.name: block for block in residual_blocks(reduced)}
    ends = [(now.get(unit[0].name, unit[0]), now.get(unit[-1].name, unit[-1])) for unit in units]
    wanted: dict[str, list[Ref]] = {}
    for first, last in ends:
        wanted.setdefault(first.graph, []).extend([first.start, last.end])
    taps = Taps(reduced, wanted)
    sums, counts = [0.0] * len(units), [0] * len(units)
    for begin in range(0, len(x[0]), 32):
        values = taps.read([array[begin : begin + 32] for array in x])
        for number, (first, last) in enumerate(ends):
            pairs = zip(values[first.graph, first.start], values[last.graph, last.end], strict=True)
            for a, b in pairs:
                cosine = _cosine(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
                sums[number] += float((1.0 - cosine).sum())
                counts[number] += cosine.size
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    sizes = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = sizes[0] * sizes[1]
    both = (sizes[0] == 0) & (sizes[1] == 0)  # nothing in, nothing out
    found: np.ndarray = np.divide((a * b).sum(axis=1), product, out=both.astype(np.float64), where=product > 0)
    return found


def _size(model: keras.Model, block: Block) -> float:
    """Return how large the branch's output is by the weights of the layers that come last in it."""
    graph = model
    for name in block.graph.rstrip("/").split("/") if block.graph else []:
        graph = graph.get_layer(name)
    taken = calls_of(functional_config(graph))
    inside = {path[len(block.graph) :] for path in block.layers}
    waiting, seen, total = [ref for ref in taken[block.end[:2]] if ref != block.start], set(), 0.0
    while waiting:
        call = waiting.pop()[:2]
        if call in seen or call[0] not in inside:
            continue
        seen.add(call)
        size = _gain(graph.get_layer(call[0]))
        if size is None:
            waiting += taken[call]
        else:
            total += size**2
    return math.sqrt(total)


def _gain(layer: Any) -> float | None:
    """Return the size of what a layer makes of inputs of unit variance; None for one without such weights."""
    weights = [(v.name, np.asarray(keras.ops.convert_to_numpy(v), np.float64)) for v in layer.weights]
    if (
        weights
        and (gammas := [value for name, value in weights if name == "gamma"])
        and not any(name == "kernel" for name, _ in weights[-2:])
    ):
        return float(np.sqrt((gammas[-1] ** 2).mean()))
    kernels = [value for _, value in weights if value.ndim >= 2]
    return float(np.sqrt((kernels[-1] ** 2).sum() / kernels[-1].shape[-1])) if kernels else None
