"""Groups of nodes that stand for one operator, and nodes that nobody needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dwindle.lifting.onnx.graph import Graph, Node, read_by


def simplified(graph: Graph) -> list[Node]:
    """Return the nodes that the outputs depend on, with GELU as one node where it is written out."""
    nodes = _needed(graph.nodes, graph.outputs)
    return _needed(_with_gelu(nodes, graph), graph.outputs)


def _needed(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if any(name in wanted for name in node.outputs):
            wanted |= read_by(node)
            found.append(node)
    return found[::-1]


def _with_gelu(nodes: Sequence[Node], graph: Graph) -> list[Node]:
    """Replace ``x * 0.5 * (1 + erf(x / sqrt(2)))``, its factors in any order, by Gelu."""
    makers = {name: node for node in nodes for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in read_by(node):
            readers.setdefault(name, []).append(node)

    def scalar(name: str) -> float | None:
        value = graph.constants.get(name)
        if value is None and name in makers and makers[name].kind == "Constant":
            value = makers[name].attributes.get("value")
            if not isinstance(value, np.ndarray):
                value = np.asarray(makers[name].attributes.get("value_float", np.nan))
        return float(value.ravel()[0]) if value is not None and value.size == 1 else None

    def pair(node: Node) -> tuple[str, float] | None:
        """Return the moving operand of a sum or product with a number, and the number."""
        for a, b in (node.inputs[:2], node.inputs[1::-1]):
            if len(node.inputs) == 2 and (found := scalar(b)) is not None:
                return a, found
        return None

    found = list(nodes)
    for erf in nodes:
        if erf.kind != "Erf" or erf.inputs[0] not in makers:
            continue
        inner = makers[erf.inputs[0]]
        scaled = pair(inner)
        root = float(np.sqrt(2.0))
        if scaled is None or not (
            (inner.kind == "Div" and inner.inputs[0] == scaled[0] and np.isclose(scaled[1], root, rtol=1e-5))
            or (inner.kind == "Mul" and np.isclose(scaled[1], 1 / root, rtol=1e-5))
        ):
            continue
        source = scaled[0]
        plus = _only(readers, erf.outputs[0], "Add")
        if plus is None or (one := pair(plus)) is None or one[1] != 1.0:
            continue
        last = _last_product(readers, makers, plus.outputs[0], source, pair)
        if last is None:
            continue
        gelu = replace(last, kind="Gelu", inputs=(source,), attributes={}, outputs=last.outputs)
        found[found.index(last)] = gelu
    return found


def _only(readers: dict[str, list[Node]], name: str, kind: str) -> Node | None:
    those = readers.get(name, [])
    return those[0] if len(those) == 1 and those[0].kind == kind else None


def _last_product(
    readers: dict[str, list[Node]],
    makers: dict[str, Node],
    name: str,
    source: str,
    pair: Callable[[Node], tuple[str, float] | None],
) -> Node | None:
    """Return the node that ends ``source * 0.5 * name``."""
    first = _only(readers, name, "Mul")
    if first is None:
        return None
    other = first.inputs[1] if first.inputs[0] == name else first.inputs[0]
    if other == source:  # (1 + erf) * x, then * 0.5
        second = _only(readers, first.outputs[0], "Mul")
        half = pair(second) if second is not None else None
        return second if half is not None and half[1] == 0.5 else None
    half = pair(first)
    if half is not None and half[0] == name and half[1] == 0.5:  # (1 + erf) * 0.5, then * x
        second = _only(readers, first.outputs[0], "Mul")
        return second if second is not None and source in second.inputs else None
    maker = makers.get(other)
    half = pair(maker) if maker is not None and maker.kind == "Mul" else None
    return first if half is not None and half == (source, 0.5) else None
