"""Building the Keras model of an ONNX graph, with channels last."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import keras
import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.constants import Repeated
from dwindle.lifting.onnx.cutting import cut_out, types_of
from dwindle.lifting.onnx.folding import fold
from dwindle.lifting.onnx.graph import Graph, Node, read_by, subgraph
from dwindle.lifting.onnx.islands import OnnxIsland
from dwindle.lifting.onnx.operators import OPERATORS
from dwindle.lifting.onnx.patterns import simplified
from dwindle.lifting.onnx.sizes import BATCH, Size, known, size
from dwindle.lifting.onnx.values import Arranger, Moving, of

# Operators that want channels on the second axis.
_SPATIAL = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
            "BatchNormalization", "InstanceNormalization", "GroupNormalization"}  # fmt: skip
# Operators whose result depends on the shapes of their inputs alone.
_OF_SHAPES = {"Shape", "Size"}


_NO_ENTRY = "no entry in the table of ONNX operators"


@dataclass(frozen=True)
class Frozen:
    """Nodes that stay as they are in the file.

    Attributes:
        nodes: The nodes.
        layer: The layer that runs them.
        inputs: Names of the tensors that it takes.
        outputs: Names of the tensors that it gives.
    """

    nodes: tuple[Node, ...]
    layer: OnnxIsland
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Builder(Arranger):
    """Walks a graph once and makes the Keras layers.

    Args:
        graph: The graph.
        open_batch: Whether a first axis of length 1 of every input becomes one of any length.
        channels_last: Whether inputs with at least three axes, and outputs that have them in that order, have their
            channels last.
        lenient: Whether nodes stay as they are where their operator has an entry, but not for how it is used; those
            whose operator has none always do.

    Attributes:
        nodes: What is built, without nodes that no output needs.
        notes: What the user should know.
        turned: For each output whether it has its channels last, other than in the file.
        islands: Nodes that stay as they are.
    """

    def __init__(
        self, graph: Graph, *, open_batch: bool = True, channels_last: bool = False, lenient: bool = False
    ) -> None:
        super().__init__()
        self.graph = graph
        self.open_batch = open_batch
        self.channels_last = channels_last
        self.lenient = lenient
        self.notes: list[str] = []
        self.islands: list[Frozen] = []
        self.turned: list[bool] = []
        self.values: dict[str, Any] = dict(graph.constants)
        self.nodes = [replace(node) for node in simplified(graph)]  # what is taken in changes a node's ends
        self._readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in read_by(node):
                self._readers.setdefault(name, []).append(node)
        self._taken: set[int] = set()
        self._names: set[str] = set()
        self._given = {_base(node.name) for node in self.nodes}
        self._layers: dict[str, Any] = {}
        self._node: Node | None = None
        self._open: set[Size] = set()
        self._kept = set(graph.outputs)  # names that are read from outside of the nodes that are walked
        self._types: dict[str, int] = {}
        self._reserve_names()

    def run(self) -> tuple[Any, Any]:
        """Return the inputs and outputs of the model."""
        keys = [self._input(*described) for described in self.graph.inputs]
        self.walk(self.nodes)
        return keys, [self._output(name) for name in self.graph.outputs]

    def forget_constants(self) -> None:
        """Let go of what the layers have taken over; nothing can be built after it."""
        self.graph.constants.clear()
        self.values = {name: value for name, value in self.values.items() if isinstance(value, Moving | tuple)}

    def walk(self, nodes: Sequence[Node]) -> None:
        """Compute every node whose result somebody reads."""
        waiting = list(nodes)[::-1]
        while waiting:
            node = waiting.pop()
            if id(node) in self._taken:
                continue
            if self._is_unknown(node, set()):
                self._keep(self._neighbours(node, waiting), _NO_ENTRY)
            else:
                self._operate(node)

    def _is_unknown(self, node: Node, made: set[str]) -> bool:
        """Return whether a node depends on the model's inputs, or on names that are made, and has no entry."""
        if node.kind in OPERATORS or node.kind in _OF_SHAPES:
            return False
        read = {node.inputs[0]} if node.kind == "If" else read_by(node)
        return bool(read & made) or any(isinstance(self._read(name), Moving | tuple) for name in read)

    def _neighbours(self, node: Node, waiting: list[Node]) -> list[Node]:
        """Return a node and those that follow and read its results, as long as they have no entry either."""
        found, made = [node], set(node.outputs)
        while waiting:
            following = waiting[-1]
            if id(following) not in self._taken:
                read = read_by(following)
                if not read & made and all(isinstance(self.values.get(name), np.ndarray) for name in read):
                    self._operate(following)  # a constant of one that comes later
                elif read & made and self._is_unknown(following, made):
                    found.append(following)
                    made.update(following.outputs)
                else:
                    break
            waiting.pop()
        return found

    def _keep(self, nodes: Sequence[Node], reason: str) -> None:
        """Leave nodes as they are, in one island."""
        operators = ", ".join(dict.fromkeys(node.kind for node in nodes))
        what = f"{operators} `{nodes[0].name}`"
        if any(node.stands_for_several for node in nodes):
            raise UnsupportedModelError(f"{what} has {reason}")
        inside = {id(node) for node in nodes}
        wanted = [
            name for name in dict.fromkeys(name for node in nodes for name in node.outputs if name)
            if name in self._kept or any(id(reader) not in inside for reader in self._readers.get(name, ()))
        ]  # fmt: skip
        if not wanted:  # in a branch, which is walked as it is
            return
        if not self._types:
            self._types = types_of(self.graph.message)
        cut = cut_out(nodes, self.values, wanted, self.graph, self._types)
        name = self.name(nodes[0].name)
        try:
            layer = OnnxIsland.of(cut, operators, reason, declared=self.graph.shapes, name=name)
            if self.open_batch and all(shape[:1] in ((1,), ()) for _, shape, _ in self.graph.inputs):
                # A file for one sample may have that 1 inside of the nodes.
                layer.check([np.zeros([_example(n) for n in self.values[entry].sizes]) for entry in cut.inputs])
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{what} has {reason}, and can't stay as it is either: {error}") from None
        given = [self.plain(self.values[entry]) for entry in cut.inputs]
        results = layer(given if len(given) > 1 else given[0])
        sizes = {str(n): n for entry in cut.inputs for n in self.values[entry].sizes}
        for result, output, lengths in zip(keras.tree.flatten(results), wanted, layer.shapes, strict=True):
            found = of(result, unknown=output)
            found.sizes = tuple(
                n if isinstance(n, int) else sizes.get(str(n)) or size(1, (f"{output}.{axis}",))
                for axis, n in enumerate(lengths)
            )
            self.values[output] = found
        self.islands.append(Frozen(tuple(nodes), layer, cut.inputs, tuple(wanted)))
        self.note(f"stays as in the file, in ONNX Runtime and without a gradient: `{name}` ({operators}), since it has "
                  f"{reason}")  # fmt: skip

    def _input(self, name: str, shape: tuple[Any, ...], dtype: str) -> Any:
        lengths: list[int | None] = [n if isinstance(n, int) else None for n in shape]
        if lengths[:1] == [1] and self.open_batch:
            lengths[0] = None
        order = list(range(len(lengths)))
        if self.channels_last and (len(lengths) > 3 or (len(lengths) == 3 and self._is_spatial(name))):
            order = [0, *order[2:], 1]
        if dtype == "object":
            raise UnsupportedModelError(f"input `{name}` is text; only numbers are read")
        held = "int32" if dtype == "int64" and keras.backend.backend() == "jax" else dtype
        key = keras.Input(batch_shape=[lengths[k] for k in order], dtype=held, name=self.name(name))
        self.values[name] = of(key, order, unknown=name)
        return key

    def _is_spatial(self, name: str) -> bool:
        """Return whether an input with three axes has channels and space, rather than steps and features."""
        kinds = {node.kind for node in self._readers.get(name, ())}
        return bool(kinds & _SPATIAL)

    def _output(self, name: str) -> Any:
        value = self.values.get(name)
        if isinstance(value, Moving):
            turned = self.channels_last and value.rank > 2 and value.axes == (0, *range(2, value.rank), 1)
            self.turned.append(turned)
            return value.tensor if turned else self.plain(value)
        if value is None:
            raise UnsupportedModelError(f"output `{name}` is made by no node; the file is damaged")
        if value.dtype == object:
            raise UnsupportedModelError(f"output `{name}` is a length that is not known before the model runs, or text")
        self.turned.append(False)
        like = next(self.values[given].tensor for given, _, _ in self.graph.inputs)
        layer = Repeated(shape=value.shape, samples=False, dtype=value.dtype.name, name=self.name(name))
        return self.filled(layer, like, value=value)

    def _operate(self, node: Node) -> None:
        inputs = [self._read(name) for name in node.inputs]
        self._node = node
        self._open = {n for value in inputs if isinstance(value, Moving) for n in value.sizes if isinstance(n, Size)}
        if node.kind in _OF_SHAPES and isinstance(inputs[0], Moving):
            self.values[node.outputs[0]] = _shape(node, inputs[0])
            return
        if node.kind == "If":
            self._branch(node, inputs[0])
            return
        if not any(isinstance(value, Moving | tuple) for value in inputs):
            results: Any = fold(node, inputs)
            if results is not None:
                self._store(node, results)
                return
        if node.kind not in OPERATORS:
            self._keep([node], _NO_ENTRY)
            return
        before = (set(self._names), set(self._taken), node.inputs, node.outputs, self.transposes, list(self.notes))
        try:
            results = self._by_entry(node, inputs)
        except UnsupportedModelError as error:
            if not self.lenient:
                raise
            self._names, self._taken, node.inputs, node.outputs, self.transposes, self.notes = before
            self._keep([node], f"no entry for this use: {error}")
            return
        self._store(node, results)

    def _by_entry(self, node: Node, inputs: Sequence[Any]) -> list[Any]:
        try:
            results = OPERATORS[node.kind](self, node, inputs)
            if self.lenient:  # what fails must fail here, not where somebody reads it
                count = self.transposes
                for value in results if isinstance(results, list) else [results]:
                    _ = value.tensor if isinstance(value, Moving) else None
                self.transposes = count
        except UnsupportedModelError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"{node.kind} `{node.name}` can't be built: {text}") from error
        return results if isinstance(results, list) else [results]

    def _store(self, node: Node, results: Sequence[Any]) -> None:
        for name, value in zip(node.outputs, results, strict=False):
            if name:
                self.values[name] = value

    def _read(self, name: str) -> Any:
        if not name:
            return None
        if name not in self.values:
            raise UnsupportedModelError(f"`{name}` is read but never made; the file is damaged")
        return self.values[name]

    def _branch(self, node: Node, condition: np.ndarray) -> None:
        taken = node.attributes["then_branch" if bool(condition.ravel()[0]) else "else_branch"]
        nodes, constants, outputs = subgraph(taken, node.version)
        self.values |= constants
        for inner in nodes:
            for name in read_by(inner):
                self._readers.setdefault(name, []).append(inner)
        for name in outputs:
            self._readers.setdefault(name, []).append(node)
        self._kept.update(outputs)
        self.walk(nodes)
        self._store(node, [self.values[name] for name in outputs])

    def plain(self, value: Any) -> Any:
        """Return a Keras tensor in ONNX's order of axes; a constant as an array."""
        return super().plain(value) if isinstance(value, Moving) else value

    def value(self, tensor: Any, axes: Sequence[int] | None = None, *, at_least_zero: bool = False) -> Moving:
        """Return a value for a Keras tensor."""
        unknown = self._node.outputs[0] if self._node is not None else ""
        found = of(tensor, axes, unknown=unknown, at_least_zero=at_least_zero)
        if tuple(tensor.shape).count(None) == 1 and len(self._open) == 1:
            # Samples and positions may lie on one axis; what is computed from them does as well.
            (length,) = self._open
            found.sizes = tuple(length if isinstance(n, Size) else n for n in found.sizes)
        return found

    def note(self, text: str) -> None:
        """Write down what the user should know."""
        if text not in self.notes:
            self.notes.append(text)

    def layer(self, factory: Callable[..., Any], node: Node, **options: Any) -> Any:
        """Make a layer named after the node."""
        return factory(name=self.name(node.name), **options)

    def shared(self, node: Node, places: Sequence[int], factory: Callable[..., Any], **options: Any) -> Any:
        """Return a layer for a node, the same one for nodes with the same options and constants."""
        names = [node.inputs[place] if place < len(node.inputs) else "" for place in places]
        key = json.dumps([factory.__name__, names, options], default=str, sort_keys=True)
        if not any(name in self.graph.constants for name in names):
            return self.layer(factory, node, **options)
        if key not in self._layers:
            self._layers[key] = self.layer(factory, node, **options)
        return self._layers[key]

    def filled(self, layer: Any, tensor: Any, **weights: np.ndarray | None) -> Any:
        """Call a layer and set its weights."""
        built = layer.built
        result = layer(tensor)
        if not built:
            for name, value in weights.items():
                if value is not None:
                    getattr(layer, name).assign(value)
        return result

    def added_behind(self, node: Node, accept: Callable[[np.ndarray], np.ndarray | None]) -> np.ndarray | None:
        """Return the constant that only the next node adds to this one's result, and take that node in."""
        name = node.outputs[0]
        readers = self._readers.get(name, [])
        if len(readers) != 1 or readers[0].kind != "Add" or name in self.graph.outputs:
            return None
        reader = readers[0]
        other = reader.inputs[1] if reader.inputs[0] == name else reader.inputs[0]
        constant = self.values.get(other)
        if not isinstance(constant, np.ndarray) or constant.dtype == object:
            return None
        found = accept(constant)
        if found is not None:
            self._taken.add(id(reader))
            # The sum is this node's result, and its constant one of this node's.
            node.outputs = (reader.outputs[0],)
            node.inputs = (*(name for name in node.inputs if name), other)
        return found

    def name(self, given: str) -> str:
        """Return a name that no layer has yet, close to the file's."""
        base = _base(given)
        found, count = base, 0
        while found in self._names or (count and found in self._given):
            count += 1
            found = f"{base}_{count}"
        self._names.add(found)
        return found

    def _reserve_names(self) -> None:
        """Keep the names that layers will have out of those that Keras gives to operations without a layer."""
        highest: dict[str, int] = {}
        for node in self.nodes:
            base = _base(node.name)
            prefix, _, count = base.rpartition("_")
            pair = (prefix, int(count)) if prefix and count.isdigit() and len(count) < 6 else (base, 0)
            highest[pair[0]] = max(highest.get(pair[0], 0), pair[1]) + 1
        for prefix, most in highest.items():
            while keras.backend.get_uid(prefix) <= most:
                pass


def _example(length: Any) -> int:
    """Return a length to try for one that is open: two samples, and many of anything else."""
    if not isinstance(length, Size):
        return int(length)
    return max(1, int(length.factor * prod(2 if name == BATCH else 32 for name in length.names)))


def _base(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name.split(":")[0]).strip("_.-") or "node"


def _shape(node: Node, value: Moving) -> np.ndarray:
    lengths = list(value.sizes)
    if node.kind == "Size":
        lengths = [np.prod(np.array(lengths, object))] if lengths else [1]
        found = np.array(lengths, object if not known(lengths) else np.int64)
        return found.reshape(())
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    lengths = lengths[start:end]
    if known(lengths):
        return np.array(lengths, np.int64)
    found = np.empty(len(lengths), object)
    found[:] = lengths
    return found
