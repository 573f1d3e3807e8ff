"""Functions that a file spells out in several nodes: which nodes they are, and one node in their place.

One node is computed as the runtime's own function does, so its rounding is that of one step: as integers a GELU is one
table instead of nine tensors, and softmax is recognized where a student learns from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.polynomial import Polynomial

from dwindle.lifting.onnx.graph import Graph, Node, read_by

# ``tanh`` of this polynomial stands for ``erf(x / sqrt(2))`` (Hendrycks and Gimpel 2016, arXiv 1606.08415).
_CUBIC = np.sqrt(2 / np.pi) * np.array([0.0, 1.0, 0.0, 0.044715])
#: Nodes that a result passes on its way back to the axes that it was summed over.
_SPREADING = ("Reshape", "Expand", "Unsqueeze", "Identity", "Max")
_DEEPEST = 12


class Spelling:
    """Who makes and who reads each tensor of a graph.

    Args:
        nodes: Its nodes.
        graph: The graph.
    """

    def __init__(self, nodes: Sequence[Node], graph: Graph) -> None:
        self.nodes = list(nodes)
        self._graph = graph
        self.makers = {name: node for node in nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in read_by(node):
                self.readers.setdefault(name, []).append(node)

    def constant(self, name: str) -> np.ndarray | None:
        """Return a constant, None where the tensor is none."""
        value = self._graph.constants.get(name)
        if value is None and (maker := self.maker(name, "Constant")) is not None:
            kinds = ("value", "value_float", "value_floats", "value_int", "value_ints")
            given = next((maker.attributes[kind] for kind in kinds if kind in maker.attributes), None)
            value = None if given is None else np.asarray(given)
            if value is not None and value.dtype.kind not in "biuf":  # text, or a sparse tensor
                value = None
        return value

    def scalar(self, name: str) -> float | None:
        """Return the number that a tensor is, None where it is none."""
        value = self.constant(name)
        return float(value.ravel()[0]) if value is not None and value.size == 1 else None

    def pair(self, node: Node) -> tuple[str, float] | None:
        """Return the moving operand of a sum or product with a number, and the number."""
        for a, b in (node.inputs[:2], node.inputs[1::-1]):
            if len(node.inputs) == 2 and (found := self.scalar(b)) is not None:
                return a, found
        return None

    def maker(self, name: str, *kinds: str) -> Node | None:
        """Return the node that makes a tensor, if it is of one of these kinds."""
        node = self.makers.get(name)
        return node if node is not None and node.kind in kinds else None

    def only_reader(self, name: str, kind: str) -> Node | None:
        """Return the node that alone reads a tensor, if it is of this kind."""
        those = self.readers.get(name, [])
        return those[0] if len(those) == 1 and those[0].kind == kind else None

    def reduced(self, name: str, kind: str) -> tuple[str, int, list[str]] | None:
        """Return what a tensor is a reduction of, over which one axis, and the shapes that spread it back to that axis.

        Whether they do is known when the node is built: each then has a 1 at that axis.
        """
        passed: list[Node] = []
        while len(passed) < _DEEPEST and (node := self.maker(name, *_SPREADING)) is not None:
            if node.kind != "Max":
                name = node.inputs[0]
            elif (other := self.pair(node)) is not None and other[1] == -np.inf:
                name = other[0]  # jax.nn.softmax takes the larger of the largest and minus infinity
            else:
                return None
            passed.append(node)
        node = self.maker(name, kind)
        axes = self.axes(node) if node is not None else None
        if node is None or axes is None or len(axes) != 1:
            return None
        kept = bool(node.attributes.get("keepdims", 1))
        for step in passed[::-1]:
            if step.kind in ("Unsqueeze", "Expand") and kept is not (step.kind == "Expand"):
                return None
            kept = kept or step.kind == "Reshape" or (step.kind == "Unsqueeze" and self.axes(step) == axes)
        shapes = [step.inputs[1] for step in passed if step.kind == "Reshape"]
        return (node.inputs[0], axes[0], shapes) if kept else None

    def axes(self, node: Node) -> tuple[int, ...] | None:
        """Return the axes that a reduction goes over, None where they are computed or left out."""
        given = self.constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
        found = node.attributes.get("axes") if given is None else given
        return None if found is None or np.size(found) == 0 else tuple(int(axis) for axis in np.ravel(found))

    def square_of(self, name: str) -> str | None:
        """Return what a tensor is the square of, None where it is no square."""
        node = self.maker(name, "Mul", "Pow")
        if node is None:
            return None
        if node.kind == "Mul":
            return node.inputs[0] if node.inputs[0] == node.inputs[1] else None
        return node.inputs[0] if self.scalar(node.inputs[1]) == 2.0 else None

    def polynomial(self, name: str, source: str, depth: int = 0) -> Polynomial | None:
        """Return a tensor as a polynomial in another one, None where it is none."""
        if name == source:
            return Polynomial([0.0, 1.0])
        if (number := self.scalar(name)) is not None:
            return Polynomial([number])
        node = self.maker(name, "Add", "Sub", "Mul", "Div", "Pow")
        if node is None or depth > _DEEPEST:
            return None
        first, second = (self.polynomial(given, source, depth + 1) for given in node.inputs[:2])
        if first is None or second is None:
            return None
        if node.kind in ("Div", "Pow"):
            number = float(second.coef[0])
            if second.degree() > 0 or number == 0 or (node.kind == "Pow" and number not in (1.0, 2.0, 3.0)):
                return None
            return first / number if node.kind == "Div" else first ** int(number)
        return first * second if node.kind == "Mul" else first + second if node.kind == "Add" else first - second

    def replaced(self, last: Node, node: Node) -> None:
        """Put a node in the place of the one that made its result."""
        self.nodes[self.nodes.index(last)] = node


def with_tanh_gelu(nodes: Sequence[Node], graph: Graph) -> list[Node]:
    """Replace ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))``, however it is factored, by Gelu."""
    spelling = Spelling(nodes, graph)
    for tanh in nodes:
        if tanh.kind != "Tanh" or (plus := spelling.only_reader(tanh.outputs[0], "Add")) is None:
            continue
        one = spelling.pair(plus)
        if one is None or one[1] != 1.0:
            continue
        for source in _behind(spelling, tanh.inputs[0]):
            found = spelling.polynomial(tanh.inputs[0], source)
            if found is None or found.degree() != 3 or not np.allclose(found.coef, _CUBIC, rtol=1e-3, atol=1e-6):
                continue
            last = ends_product(spelling, plus.outputs[0], source)
            if last is not None:
                spelling.replaced(last, gelu(last, source, approximate="tanh"))
            break
    return spelling.nodes


def gelu(last: Node, source: str, **attributes: str) -> Node:
    """Return the node for a GELU that ends in another one; operator set 20 was the first to have it."""
    return replace(last, kind="Gelu", inputs=(source,), attributes=attributes, version=20)


def _behind(spelling: Spelling, name: str) -> list[str]:
    """Return the tensors that a chain of arithmetic with numbers begins with, the nearest first."""
    found, wave = [], [name]
    for _ in range(_DEEPEST):
        nodes = [node for given in wave if (node := spelling.maker(given, "Add", "Mul", "Pow", "Div")) is not None]
        wave = [given for node in nodes for given in node.inputs if given not in found and given in spelling.readers]
        wave = list(dict.fromkeys(given for given in wave if spelling.scalar(given) is None))
        found += wave
    return found


def ends_product(spelling: Spelling, name: str, source: str) -> Node | None:
    """Return the node that ends ``source * 0.5 * name``, its factors in any order."""
    first = spelling.only_reader(name, "Mul")
    if first is None:
        return None
    other = first.inputs[1] if first.inputs[0] == name else first.inputs[0]
    if other == source:  # (1 + erf) * x, then * 0.5
        second = spelling.only_reader(first.outputs[0], "Mul")
        half = spelling.pair(second) if second is not None else None
        return second if half is not None and half[1] == 0.5 else None
    half = spelling.pair(first)
    if half is not None and half[0] == name and half[1] == 0.5:  # (1 + erf) * 0.5, then * x
        second = spelling.only_reader(first.outputs[0], "Mul")
        return second if second is not None and source in second.inputs else None
    maker = spelling.maker(other, "Mul")
    half = spelling.pair(maker) if maker is not None else None
    return first if half is not None and half == (source, 0.5) else None


def with_softmax(nodes: Sequence[Node], graph: Graph) -> list[Node]:
    """Replace ``exp(x - max(x)) / sum(exp(x - max(x)))`` by Softmax, where both go over the same one axis."""
    spelling = Spelling(nodes, graph)
    for quotient in nodes:
        if quotient.kind != "Div" or (power := spelling.maker(quotient.inputs[0], "Exp")) is None:
            continue
        total, less = spelling.reduced(quotient.inputs[1], "ReduceSum"), spelling.maker(power.inputs[0], "Sub")
        largest = spelling.reduced(less.inputs[1], "ReduceMax") if less is not None else None
        if total is None or less is None or largest is None or total[0] != power.outputs[0]:
            continue
        if largest[:2] == (less.inputs[0], total[1]):
            inputs = (*quotient.inputs, less.inputs[0], *total[2], *largest[2])
            spelling.replaced(quotient, replace(quotient, kind=SOFTMAX, inputs=inputs, attributes={"axis": total[1]}))
    return spelling.nodes


def with_variance(nodes: Sequence[Node], graph: Graph) -> list[Node]:
    """Replace ``mean(x^2) - mean(x)^2`` by a node that sums the squares of ``x - mean(x)``.

    The difference of two large numbers is mostly rounding error where ``x`` varies little, in floats as in integers.
    A mean may be a sum times a number; whether that number is one over the count is known when the node is built.
    """
    spelling = Spelling(nodes, graph)
    for less in nodes:
        if less.kind != "Sub" or (mean := spelling.square_of(less.inputs[1])) is None:
            continue
        first, second = _mean(spelling, less.inputs[0]), _mean(spelling, mean)
        if first is None or second is None or first[1:] != second[1:]:
            continue
        if spelling.square_of(first[0]) != second[0]:
            continue
        _, axes, keep, factor = second
        given = {"axes": list(axes), "keepdims": keep, **({} if factor is None else {"factor": factor})}
        spelling.replaced(less, replace(less, kind=VARIANCE, inputs=(*less.inputs, second[0]), attributes=given))
    return spelling.nodes


#: The kind of node that `with_softmax` puts in: the two that are divided, what the softmax is of, and shapes.
SOFTMAX = "dwindle::Softmax"
#: The kind of node that `with_variance` puts in: the two that are subtracted, and what the variance is of.
VARIANCE = "dwindle::Variance"
#: What the file says in their place, of their first two inputs.
WRITTEN = {SOFTMAX: "Div", VARIANCE: "Sub"}


def _mean(spelling: Spelling, name: str) -> tuple[str, tuple[int, ...], int, float | None] | None:
    """Return what a tensor is the mean of, over which axes, whether they are kept, and the factor of a sum."""
    factor = None
    node = spelling.maker(name, "ReduceMean")
    if node is None:
        scaled = spelling.maker(name, "Mul", "Div")
        number = spelling.pair(scaled) if scaled is not None else None
        if scaled is None or number is None or (scaled.kind == "Div" and scaled.inputs[0] != number[0]):
            return None
        factor = number[1] if scaled.kind == "Mul" else 1 / number[1] if number[1] else 0.0
        node = spelling.maker(number[0], "ReduceSum")
    axes = spelling.axes(node) if node is not None else None
    if node is None or axes is None:
        return None
    return node.inputs[0], axes, int(node.attributes.get("keepdims", 1)), factor
