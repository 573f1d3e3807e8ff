"""Computing what depends on constants only, and on lengths of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.sizes import Size, has_sizes, product

_LARGEST_RESULT = 2**28


def fold(node: Node, inputs: Sequence[np.ndarray | None]) -> list[Any] | None:
    """Return what a node computes from constants; None where open lengths make that impossible.

    Raises:
        UnsupportedModelError: If it can't be computed, or would fill the memory.
    """
    if any(has_sizes(value) for value in inputs):
        return _symbolic(node, inputs)
    _check_size(node, inputs)
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    names = [f"i{k}" if value is not None else "" for k, value in enumerate(inputs)]
    outputs = [f"o{k}" if name else "" for k, name in enumerate(node.outputs)]
    message = type(node.proto)()
    message.CopyFrom(node.proto)
    del message.input[:], message.output[:]
    message.input.extend(names)
    message.output.extend(outputs)
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in zip(names, inputs, strict=True)
        if value is not None
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs if name]
    graph = helper.make_graph([message], "fold", described, ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.version)])
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(
                None, {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
            )
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{node.kind} `{node.name}` can't be computed: {text}") from None
    results = iter(found)
    return [np.asarray(next(results)) if name else None for name in outputs]


def _check_size(node: Node, inputs: Sequence[np.ndarray | None]) -> None:
    """Refuse results that a few bytes of a file could make as large as the memory."""
    values = [value for value in inputs if value is not None]
    wanted = 0
    try:
        if node.kind in ("ConstantOfShape", "Expand", "RandomNormal", "RandomUniform"):
            wanted = prod(int(n) for n in np.ravel(values[-1])) if values else 0
            wanted = max(wanted, prod(int(n) for n in node.attributes.get("shape", ())) if not values else wanted)
        elif node.kind == "Tile":
            wanted = values[0].size * prod(int(n) for n in np.ravel(values[1]))
        elif node.kind == "Range":
            wanted = int(abs((values[1] - values[0]) / values[2]))
        elif node.kind == "Pad" and len(values) > 1:
            pads = np.ravel(values[1])
            wanted = prod(int(n + pads[k] + pads[k + len(pads) // 2]) for k, n in enumerate(values[0].shape))
        elif node.kind in ("Resize", "Upsample", "OneHot", "EyeLike"):
            wanted = prod(int(max(1, n)) for n in np.ravel(values[-1])) if node.kind != "EyeLike" else values[0].size
            wanted = values[0].size * wanted if values[-1].dtype == np.float32 else wanted
    except (IndexError, ZeroDivisionError, ValueError, OverflowError, TypeError):
        return  # the evaluation says what is wrong
    if wanted > _LARGEST_RESULT:
        raise UnsupportedModelError(
            f"{node.kind} `{node.name}` would make a constant of {wanted} entries; the largest is {_LARGEST_RESULT}"
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
