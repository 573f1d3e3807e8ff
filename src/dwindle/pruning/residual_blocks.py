"""Finding residual blocks: where a graph computes ``b = a + f(a)``, so that ``f`` can be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from dwindle.graph_editing import Ref, calls, functional_config, output_refs, refs_in
from dwindle.weights import walk_layers

Call = tuple[str, int]

ATTENTION = {"MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention", "Attention", "AdditiveAttention",
             "MatMul", "Einsum"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual block, ``b = a + f(a)``.

    Attributes:
        name: Path of the addition that ends it (``nested/add`` in nested models), with the number of the call where the
            layer is called several times (``add:1``).
        layers: Paths of the layers in ``f``.
        parameters: That leaving ``f`` out saves.
        attention: Whether ``f`` attends.
        pinned: Why it can't be left out; empty where it can.
        graph: Path of the graph that it is in: empty, or ``nested/``.
        start: The tensor ``a`` in that graph.
        end: The tensor ``b`` in that graph.
    """

    name: str
    layers: tuple[str, ...]
    parameters: int
    attention: bool
    pinned: str
    graph: str
    start: Ref
    end: Ref


def residual_blocks(model: keras.Model) -> list[Block]:
    """Return the residual blocks of a model and of the models nested in it, in the order of the graph.

    ``f`` may take other tensors than ``a`` as well, such as a mask, as long as they are made without weights. An
    addition whose sides both have layers of their own, such as a shortcut with a convolution, is listed as pinned.

    Args:
        model: A built functional, sequential or lifted model.
    """
    return list(_blocks(model, ""))


def _blocks(model: keras.Model, prefix: str) -> Iterator[Block]:
    graph = _Graph(model, prefix)
    for entry in graph.config["layers"]:
        if entry["class_name"] == "Add":
            for number in range(len(entry["inbound_nodes"])):
                block = graph.block((entry["config"]["name"], number), len(entry["inbound_nodes"]))
                if block is not None:
                    yield block
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _blocks(layer, f"{prefix}{layer.name}/")


class _Graph:
    """One functional graph: who feeds whom, and which layers have weights."""

    def __init__(self, model: keras.Model, prefix: str) -> None:
        self.prefix = prefix
        self.config = functional_config(model)
        self.takes = calls(self.config)
        self.used: dict[Ref, list[Call | None]] = {}
        for call, taken in self.takes.items():
            for ref in taken:
                self.used.setdefault(ref, []).append(call)
        for ref in output_refs(self.config):
            self.used.setdefault(ref, []).append(None)
        self.classes = {entry["config"]["name"]: entry["class_name"] for entry in self.config["layers"]}
        self.layers = {layer.name: layer for layer in model.layers}
        self.shapes: dict[Ref, Any] = {}
        for entry in self.config["layers"]:
            for node in entry.get("inbound_nodes") or []:
                self.shapes.update(_shapes(node))

    def weighted(self, call: Call) -> bool:
        """Whether the layer of a call has weights."""
        layer = self.layers.get(call[0])
        return layer is not None and bool(layer.weights)

    def before(self, ref: Ref, stop: Ref | None = None) -> set[Call]:
        """Return all calls that a tensor depends on; what is before ``stop`` only where another way leads there."""
        found: set[Call] = set()
        waiting = [ref]
        while waiting:
            now = waiting.pop()
            if now != stop and now[:2] not in found:
                found.add(now[:2])
                waiting += self.takes[now[:2]]
        return found

    def block(self, call: Call, count: int) -> Block | None:
        """Return the block that an addition ends, pinned or not; None where it is no residual one."""
        operands = list(dict.fromkeys(self.takes[call]))
        if len(operands) < 2 or len(operands) != len(self.takes[call]):
            return None
        name = f"{self.prefix}{call[0]}" + (f":{call[1]}" if count > 1 else "")
        for start in operands:
            others = [ref for ref in operands if ref != start]
            inside = set().union(*(self.before(ref, start) for ref in others))
            if all(start in self._reached(ref) for ref in others):
                return self._found(name, call, start, operands, inside)
        behind = [self.before(ref) for ref in operands]
        shared = set.intersection(*behind)
        if any(self.weighted(c) for each in behind for c in each - shared):
            why = "both sides of the addition have layers of their own"
            inside = set().union(*behind) - shared
            return self._block(name, call, operands[0], inside, why)
        return None

    def _reached(self, ref: Ref) -> set[Ref]:
        return {taken for call in self.before(ref) for taken in self.takes[call]}

    def _found(self, name: str, call: Call, start: Ref, operands: Sequence[Ref], inside: set[Call]) -> Block | None:
        past = self.before(start)
        branch = inside - past
        if not any(self.weighted(c) for c in branch):
            return None
        around = [c for c in inside & past if self.weighted(c)]
        outside = sorted(
            {
                c[0]
                for c in branch
                for ref, users in self.used.items()
                if ref[:2] == c
                for user in users
                if user is None or (user not in branch and user != call)
            }
        )
        shapes = {str(self.shapes.get(ref)) for ref in operands}
        why = ""
        if len(shapes) > 1:
            why = f"the sides of the addition have shapes {' and '.join(sorted(shapes))}"
        elif around:
            why = f"its branch also takes what `{around[0][0]}` makes, which is before the block"
        elif outside:
            why = f"what `{outside[0]}` makes inside of it is used outside of it as well"
        return self._block(name, call, start, branch, why)

    def _block(self, name: str, call: Call, start: Ref, branch: set[Call], why: str) -> Block:
        names = [n for n in self.classes if any(c[0] == n for c in branch)]
        parameters = 0
        for layer in names:
            every = {c for c in self.takes if c[0] == layer}
            if every <= branch and layer in self.layers:  # a shared layer stays as long as one call does
                parameters += self.layers[layer].count_params() if self.layers[layer].weights else 0
        return Block(
            name=name, layers=tuple(f"{self.prefix}{n}" for n in names), parameters=parameters,
            attention=any(self._attends(n) for n in names), pinned=why, graph=self.prefix, start=start,
            end=(call[0], call[1], 0),
        )  # fmt: skip

    def _attends(self, name: str) -> bool:
        layer = self.layers.get(name)
        inner = [type(found).__name__ for _, found in walk_layers(layer)] if isinstance(layer, keras.Model) else []
        return bool(ATTENTION & {self.classes[name], *inner})


def _shapes(node: Any) -> Iterator[tuple[Ref, tuple[Any, ...]]]:
    if isinstance(node, Mapping):
        if node.get("class_name") == "__keras_tensor__":
            yield next(refs_in(node)), tuple(node["config"]["shape"] or ())
        else:
            for part in node.values():
                yield from _shapes(part)
    elif isinstance(node, list | tuple):
        for part in node:
            yield from _shapes(part)
