"""Computing what depends on constants only, and on lengths of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.onnx.composites import WRITTEN
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.sizes import Size, has_sizes, product

#: Entries that a result may have.
LARGEST_RESULT = 2**28
_SHORT = 1024
# What runs as long as the file says, or differs from time to time.
_NEVER = {"Loop", "Scan", "SequenceMap", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
          "Multinomial", "Bernoulli"}  # fmt: skip


def fold(node: Node, inputs: Sequence[np.ndarray | None]) -> list[Any] | None:
    """Return what a node computes from constants; None where open lengths make that impossible.

    Raises:
        UnsupportedModelError: If it can't be computed, or would fill the memory.
    """
    if node.kind in WRITTEN:
        node, inputs = replace(node, kind=WRITTEN[node.kind], inputs=node.inputs[:2]), inputs[:2]
    if any(has_sizes(value) for value in inputs):
        return _symbolic(node, inputs)
    if node.kind in _NEVER:
        raise UnsupportedModelError(f"{node.kind} `{node.name}` is not computed while a file is read")
    from onnx import ValueInfoProto, helper
    from onnx.reference import ReferenceEvaluator

    names = [f"i{k}" if value is not None else "" for k, value in enumerate(inputs)]
    outputs = [f"o{k}" if name else "" for k, name in enumerate(node.outputs)]
    message = type(node.proto)()
    if node.stands_for_several:
        message.CopyFrom(helper.make_node(node.kind, names, outputs, **node.attributes))
    else:
        message.CopyFrom(node.proto)
        del message.input[:], message.output[:]
        message.input.extend(names)
        message.output.extend(outputs)
    given = [(name, value) for name, value in zip(names, inputs, strict=True) if value is not None]
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given
    ]
    graph = helper.make_graph([message], "fold", described, [ValueInfoProto(name=name) for name in outputs if name])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.version)])
    _check_size(node, model, given)
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(None, dict(given))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{node.kind} `{node.name}` can't be computed: {text}") from None
    results = iter(found)
    return [np.asarray(next(results)) if name else None for name in outputs]


def _check_size(node: Node, model: Any, given: Sequence[tuple[str, np.ndarray]]) -> None:
    """Refuse results that a few bytes of a file could make as large as the memory, by ONNX's own shape inference."""
    from onnx import numpy_helper, shape_inference

    wanted = type(model)()
    wanted.CopyFrom(model)
    for name, value in given:
        if value.size <= _SHORT and value.dtype != object:  # what may be a shape, or scales
            wanted.graph.initializer.append(numpy_helper.from_array(value, name))
    try:
        inferred = shape_inference.infer_shapes(wanted, data_prop=True)
    except Exception:
        return  # the evaluation says what is wrong
    for result in inferred.graph.output:
        entries = prod(n.dim_value for n in result.type.tensor_type.shape.dim)
        if entries > LARGEST_RESULT:
            raise UnsupportedModelError(
                f"{node.kind} `{node.name}` would make a constant of {entries} entries; the largest is {LARGEST_RESULT}"
            )


def _slices(node: Node, inputs: Sequence[Any]) -> list[Any]:
    value = inputs[0]
    if len(inputs) > 1:
        starts, ends = np.ravel(inputs[1]), np.ravel(inputs[2])
        axes = np.ravel(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
        steps = np.ravel(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    else:
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        axes, steps = node.attributes.get("axes", range(len(starts))), [1] * len(starts)
    index: list[Any] = [slice(None)] * value.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return [value[tuple(index)]]


def _axes(node: Node, inputs: Sequence[Any]) -> Any:
    return inputs[1] if len(inputs) > 1 and inputs[1] is not None else node.attributes.get("axes")


def _squeeze(node: Node, inputs: Sequence[Any]) -> list[Any]:
    axes = _axes(node, inputs)
    return [np.squeeze(inputs[0], None if axes is None else tuple(int(a) for a in np.ravel(axes)))]


def _unsqueeze(node: Node, inputs: Sequence[Any]) -> list[Any]:
    return [np.expand_dims(inputs[0], tuple(int(a) for a in np.ravel(_axes(node, inputs))))]


def _gather(node: Node, inputs: Sequence[Any]) -> list[Any]:
    return [np.asarray(np.take(inputs[0], inputs[1].astype(np.int64), axis=node.attributes.get("axis", 0)), object)]


def _cast(node: Node, inputs: Sequence[Any]) -> list[Any]:
    del node
    return [inputs[0]]


def _where(node: Node, inputs: Sequence[Any]) -> list[Any]:
    del node
    return [np.where(inputs[0].astype(bool), inputs[1], inputs[2])]


def _equal(node: Node, inputs: Sequence[Any]) -> list[Any]:
    del node
    # An open length is never a number that a graph compares it with, such as the -1 of a shape to fill in.
    pairs = np.broadcast(*(np.asarray(value, object) for value in inputs))
    return [np.array([a == b for a, b in pairs], bool).reshape(pairs.shape)]


def _divide(node: Node, inputs: Sequence[Any]) -> list[Any]:
    del node
    a, b = (np.asarray(value, object) for value in inputs)
    pairs = np.broadcast(a, b)
    found = np.empty(pairs.shape, object)
    flat = [x // y if not isinstance(x, float) else x / y for x, y in pairs]
    found[...] = np.array(flat, object).reshape(pairs.shape) if pairs.shape else flat[0]
    return [found]


def _reshape(node: Node, inputs: Sequence[Any]) -> list[Any]:
    del node
    return [inputs[0].reshape(tuple(int(n) for n in np.ravel(inputs[1])))]


def _round_down(node: Node, inputs: Sequence[Any]) -> list[Any]:
    del node
    return [np.array([n if isinstance(n, Size) else int(np.floor(n)) for n in inputs[0].ravel()], object).reshape(
        inputs[0].shape
    )]  # fmt: skip


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Node, Sequence[Any]], list[Any]]:
    def compute(node: Node, inputs: Sequence[Any]) -> list[Any]:
        del node
        return [np.asarray(function(*(np.asarray(value, object) for value in inputs)), object)]

    return compute


def _reduce_product(node: Node, inputs: Sequence[Any]) -> list[Any]:
    found = np.empty((1,) if node.attributes.get("keepdims", 1) else (), object)
    found[...] = product(inputs[0].ravel())
    return [found]


_SYMBOLIC: dict[str, Callable[[Node, Sequence[Any]], list[Any]]] = {
    "Slice": _slices, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Gather": _gather, "Cast": _cast, "Identity": _cast,
    "Concat": lambda node, inputs: [np.concatenate([np.asarray(v, object) for v in inputs], node.attributes["axis"])],
    "Where": _where, "Equal": _equal, "Div": _divide, "Reshape": _reshape, "Floor": _round_down, "Ceil": _round_down,
    "Mul": _arithmetic(lambda a, b: a * b), "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b), "ReduceProd": _reduce_product,
}  # fmt: skip


def _symbolic(node: Node, inputs: Sequence[Any]) -> list[Any] | None:
    if node.kind not in _SYMBOLIC:
        return None
    try:
        return _SYMBOLIC[node.kind](node, inputs)
    except (ValueError, TypeError, IndexError):
        return None
