"""Constants that several operators of a file read: tied in training where they are one weight, parted where not.

A shared layer, and a recurrent layer once it is unrolled, read one constant several times; each operator is a layer of
its own in the lifted model, and all of them have to train the same variable. Converters also merge constants that
happen to be equal, such as the zero biases of layers that have nothing to do with each other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.lifting.flatbuffer import parse, read_graph, serialize
from dwindle.lifting.layout import to_file, to_keras
from dwindle.lifting.links import Link
from dwindle.weights import Transform, raw_variable


def unshared(content: bytes) -> bytes:
    """Return the file with a constant of its own for each operator that reads one whose entries are all equal.

    Weights that were trained are not; what is then read several times is one weight. Different tensors never share a
    buffer afterwards.
    """
    graph, model = read_graph(content), parse(content)
    main = model.subgraphs[0]
    taken: set[int] = set()
    buffers: set[int] = set()
    changed = False
    for operation, raw in zip(graph.operations, main.operators, strict=True):
        for position, tensor in enumerate(operation.inputs):
            if tensor is None or tensor.value is None or tensor.dtype != np.float32 or tensor.value.size < 2:
                continue
            index, given = tensor.index, main.tensors[tensor.index]
            if index in taken and np.ptp(tensor.value) == 0:
                given = copy.copy(given)
                given.name = f"{tensor.name}_{operation.index}_{position}".encode()
                main.tensors.append(given)
                index = len(main.tensors) - 1
                raw.inputs = np.array([*raw.inputs[:position], index, *raw.inputs[position + 1 :]], np.int32)
            if index not in taken and given.buffer in buffers:
                buffer = schema.BufferT()
                buffer.data = np.ascontiguousarray(tensor.value, np.float32).view(np.uint8).reshape(-1)
                model.buffers.append(buffer)
                given.buffer = len(model.buffers) - 1
                changed = True
            taken.add(index)
            buffers.add(given.buffer)
    return serialize(model) if changed else content


class TiedWeight(Transform):
    """Use another layer's variable in place of the layer's own, which is not trained.

    Attributes:
        leader: The other variable; the lifted model sets it whenever it is made.
        places: Where each entry is found in the leader, flat; None where both have the same axes.
    """

    kind: ClassVar[str] = "tied"
    order: ClassVar[int] = 0

    def __init__(self) -> None:
        self.leader: Any = None
        self.places: np.ndarray | None = None

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the leader's raw weight."""
        del state, layer
        if self.leader is None:
            return weight
        ops = keras.ops
        value = ops.convert_to_tensor(self.leader)
        if self.places is not None:
            value = ops.take(ops.reshape(value, (-1,)), self.places)
        return ops.cast(value, weight.dtype)


def followers(links: Sequence[Link]) -> list[tuple[Link, Link]]:
    """Return ``(leader, follower)`` for each link to a constant that an earlier one has."""
    first: dict[str, Link] = {}
    found = []
    for link in links:
        leader = first.setdefault(link.tensor, link)
        if leader is not link and leader.layer != link.layer:
            found.append((leader, link))
    return found


def tie(model: keras.Model, links: Sequence[Link]) -> None:
    """Point the tied weights of a model at the variables that they follow."""
    for leader, follower in followers(links):
        layer, other = model.get_layer(follower.layer), model.get_layer(leader.layer)
        for transform, state in zip(*_stack(layer, follower.variable), strict=True):
            own, source = raw_variable(layer, follower.variable), raw_variable(other, leader.variable)
            if own is None or source is None:
                continue
            if transform.kind == "tied":
                transform.leader = source
                transform.places = _places(source.shape, leader.layout, own.shape, follower.layout)
                own.trainable = False
            elif transform.kind == "fake_quantize" and transform.own_bound:
                transform.leader = _bound_of(other, leader.variable)
                if transform.leader is not None:
                    state["bound"].trainable = False


def _stack(layer: Any, key: str) -> tuple[list[Any], list[Any]]:
    return layer.__dict__.get("_dwindle_transforms", {}).get(key, []), layer.__dict__.get("_dwindle_states", {}).get(
        key, []
    )


def _bound_of(layer: Any, key: str) -> Any:
    for transform, state in zip(*_stack(layer, key), strict=True):
        if transform.kind == "fake_quantize" and transform.own_bound:
            return state["bound"]
    return None


def _places(leader: Sequence[int], layout: str, own: Sequence[int], own_layout: str) -> np.ndarray | None:
    if layout == own_layout and tuple(leader) == tuple(own):
        return None
    numbers = np.arange(int(np.prod(leader)), dtype=np.int32).reshape(tuple(leader))
    inside = to_file(numbers, layout, _file_shape(leader, layout))
    return np.ascontiguousarray(to_keras(inside, own_layout)).reshape(tuple(own))


def _file_shape(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    sizes = tuple(shape)
    if layout == "dense":
        return sizes[::-1]
    if layout == "conv2d":
        return (sizes[3], *sizes[:3])
    if layout == "transpose_conv":
        return (sizes[2], *sizes[:2], sizes[3])
    return sizes if layout == "plain" else (1, *sizes[:2], int(np.prod(sizes[2:])))
