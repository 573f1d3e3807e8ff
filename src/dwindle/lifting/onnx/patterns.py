"""Groups of nodes that stand for one operator, and nodes that nobody needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dwindle.lifting.onnx.composites import Spelling, ends_product, gelu, with_softmax, with_tanh_gelu, with_variance
from dwindle.lifting.onnx.graph import Graph, Node, read_by


def simplified(graph: Graph) -> list[Node]:
    """Return the nodes that the outputs depend on, with one node for each function that is written out."""
    nodes = _needed(graph.nodes, graph.outputs)
    for found in (_with_gelu, with_tanh_gelu, with_softmax, with_variance):
        nodes = _needed(found(nodes, graph), graph.outputs)
    return nodes


def _needed(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if any(name in wanted for name in node.outputs):
            wanted |= read_by(node)
            found.append(node)
    return found[::-1]


def _with_gelu(nodes: Sequence[Node], graph: Graph) -> list[Node]:
    """Replace ``x * 0.5 * (1 + erf(x / sqrt(2)))``, its factors in any order, by Gelu."""
    spelling = Spelling(nodes, graph)
    for erf in nodes:
        if erf.kind != "Erf" or erf.inputs[0] not in spelling.makers:
            continue
        inner = spelling.makers[erf.inputs[0]]
        scaled = spelling.pair(inner)
        root = float(np.sqrt(2.0))
        if scaled is None or not (
            (inner.kind == "Div" and inner.inputs[0] == scaled[0] and np.isclose(scaled[1], root, rtol=1e-5))
            or (inner.kind == "Mul" and np.isclose(scaled[1], 1 / root, rtol=1e-5))
        ):
            continue
        source = scaled[0]
        plus = spelling.only_reader(erf.outputs[0], "Add")
        if plus is None or (one := spelling.pair(plus)) is None or one[1] != 1.0:
            continue
        last = ends_product(spelling, plus.outputs[0], source)
        if last is not None:
            spelling.replaced(last, gelu(last, source))
    return spelling.nodes
