"""Loops of a TensorFlow graph are unrolled, so that LiteRT's converter takes recurrent layers.

It refuses a loop whose lists of tensors (`TensorListReserve` and the like) have elements of open shape, as recurrent
layers in a SavedModel have. Here the graph is traced anew with fixed shapes, node by node: what depends on constants
and shapes alone is computed, lists of tensors are Python lists, and so a loop whose number of steps is known is written
out. A longer loop stays one, its lists as tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_LOOPS = {"While", "StatelessWhile"}
_BRANCHES = {"If", "StatelessIf"}
_PASSED = {"Identity", "StopGradient", "PreventGradient", "Snapshot"}
_FILLED = {"ZerosLike": 0, "OnesLike": 1}
_WRITES = ("Assign", "ResourceScatter", "ResourceApply")
# The most operations that loops are written out into.
_MOST_OPERATIONS = 100_000
# The most entries of what is computed while the graph is traced: numbers of steps, indices, shapes.
_LARGEST_KNOWN = 4096


class NotUnrolled(Exception):
    """The graph has something that stands in the way; it says what."""


@dataclass(frozen=True, kw_only=True)
class _Elements:
    """A list of tensors: each of its elements, None where nothing was written; or all in one tensor."""

    each: tuple[Any, ...] = ()
    stacked: Any = None


def has_loops(serving: Any) -> bool:
    """Whether a concrete function has loops, or calls functions that have."""
    return any(node.op in _LOOPS for node in _nodes(serving))


def _nodes(serving: Any) -> list[Any]:
    """Return the nodes of a concrete function and of those that it calls."""
    definition = serving.graph.as_graph_def()
    return [*definition.node, *(node for function in definition.library.function for node in function.node_def)]


def traced(tf: Any, specs: Mapping[str, Any], compute: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a concrete function of inputs of these shapes, whose body is called with them by name."""
    function = tf.function(
        lambda *values: compute(dict(zip(specs, values, strict=True))),
        input_signature=list(specs.values()),
        autograph=False,
    )
    return function.get_concrete_function()


def unrolled(tf: Any, serving: Any, specs: Mapping[str, Any], longest: int) -> Any:
    """Return a signature as a concrete function whose loops are written out, compared with it on random inputs.

    Args:
        tf: The TensorFlow module.
        serving: A signature of a loaded SavedModel.
        specs: Its inputs by name, of fixed shapes.
        longest: Loops of more steps stay loops.

    Raises:
        NotUnrolled: If a loop ends as the data say, or has something in it that is not known.
    """
    from dwindle.exporting.convert import random_input

    if writing := sorted({node.op for node in _nodes(serving) if node.op.startswith(_WRITES)}):
        raise NotUnrolled(f"it has loops beside a state that it keeps ({', '.join(writing)})")

    def compute(given: dict[str, Any]) -> dict[str, Any]:
        names = sorted(given)  # as TensorFlow flattens a dict
        replay = _Replay(tf, serving.graph, longest)
        arguments = [*(given[name] for name in names), *serving.captured_inputs]
        found = replay.run(serving.inputs, serving.outputs, arguments)
        return dict(tf.nest.pack_sequence_as(serving.structured_outputs, [replay.tensor(value) for value in found]))

    made = traced(tf, specs, compute)
    sample = {
        name: tf.constant(random_input(tuple(spec.shape[1:]), spec.dtype.as_numpy_dtype, spec.shape[0]))
        for name, spec in specs.items()
    }
    expected, found = serving(**sample), made(*sample.values())
    for name, value in expected.items():
        if not np.allclose(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise NotUnrolled(f"output `{name}` is another where its loops are unrolled")
    return made


class _Replay:
    """Traces graphs node by node, only those that the wanted results need.

    A value is a tensor of the new graph, an array where it is known already, or `_Elements`.
    """

    def __init__(self, tf: Any, graph: Any, longest: int) -> None:
        self.tf = tf
        self.longest = longest
        self._done = 0
        self._library = graph.as_graph_def().library
        self._functions: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {}

    def run(self, inputs: Sequence[Any], results: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Return the values of a graph's results.

        Args:
            inputs: The graph's placeholders.
            results: The wanted tensors in it.
            arguments: Values of the placeholders.
        """
        made = {tensor.op.name: [value] for tensor, value in zip(inputs, arguments, strict=True)}
        waiting = [tensor.op for tensor in results]
        while waiting:
            operation = waiting[-1]
            before = [tensor.op for tensor in operation.inputs if tensor.op.name not in made]
            if operation.name in made:
                waiting.pop()
            elif before:
                waiting += before
            else:
                taken = [made[tensor.op.name][tensor.value_index] for tensor in operation.inputs]
                made[operation.name] = self._compute(operation, taken)
                waiting.pop()
        return [made[tensor.op.name][tensor.value_index] for tensor in results]

    def tensor(self, value: Any) -> Any:
        """Return a value as a tensor of the new graph."""
        if isinstance(value, _Elements):
            raise NotUnrolled("a list of tensors goes where a tensor is wanted")
        return self.tf.constant(value) if isinstance(value, np.ndarray) else value

    def _function(self, name: str) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the placeholders and the results of a function of the graph's library."""
        if name not in self._functions:
            definition = next(one for one in self._library.function if one.signature.name == name)
            self._functions[name] = _imported(self.tf, definition, self._library)
        return self._functions[name]

    def _call(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        return self.run(*self._function(name), arguments)

    def _compute(self, operation: Any, inputs: list[Any]) -> list[Any]:
        kind = operation.type
        self._done += 1
        if self._done > _MOST_OPERATIONS:
            raise NotUnrolled(f"its loops, written out, are more than {_MOST_OPERATIONS:,} operations")
        if kind in _PASSED:
            return inputs
        if kind in _CALLS:
            return self._call(operation.get_attr("f").name, inputs)
        if kind in _LOOPS:
            return self._loop(operation, inputs)
        if kind in _BRANCHES and isinstance(inputs[0], np.ndarray):
            return self._call(operation.get_attr("then_branch" if inputs[0] else "else_branch").name, inputs[1:])
        if kind in _LIST_OPERATIONS:
            return [_LIST_OPERATIONS[kind](self, operation, *inputs)]
        known = self._known(operation, inputs)
        if known is not None:
            return known
        if kind in _FILLED and not isinstance(inputs[0], _Elements) and inputs[0].shape.is_fully_defined():
            return [self.tf.fill(inputs[0].shape, self.tf.constant(_FILLED[kind], operation.outputs[0].dtype))]
        if kind in _BRANCHES or operation.type.startswith(("TensorList", "TensorArray")):
            raise NotUnrolled(f"`{operation.name}` ({kind}) is of a form that is not known")
        return self._copied(operation, [self.tensor(value) for value in inputs])

    def _copied(self, operation: Any, inputs: list[Any]) -> list[Any]:
        """Return the results of the same operation in the new graph."""
        attributes = {
            name: value for name, value in operation.node_def.attr.items()
            if not name.startswith("_") and not _names_functions(value)
        }  # fmt: skip
        if len(attributes) < sum(not name.startswith("_") for name in operation.node_def.attr):
            raise NotUnrolled(f"`{operation.name}` ({operation.type}) calls functions")
        dtypes = [tensor.dtype for tensor in operation.outputs]
        graph = self.tf.compat.v1.get_default_graph()
        made = graph.create_op(operation.type, inputs, dtypes, name=operation.name, attrs=attributes)
        return list(made.outputs)

    def _known(self, operation: Any, inputs: list[Any]) -> list[Any] | None:
        """Return what constants and shapes alone decide, as arrays; None where that is not so, or much."""
        if operation.type == "Const":
            value = self.tf.make_ndarray(operation.get_attr("value"))
            return [value] if value.dtype.kind in "iub" and value.size <= _LARGEST_KNOWN else None
        if operation.type in ("Shape", "Size", "Rank") and not isinstance(inputs[0], _Elements):
            shape = inputs[0].shape if isinstance(inputs[0], np.ndarray) else inputs[0].shape.as_list()
            if None in shape:
                return None
            value = {"Shape": shape, "Size": np.prod(shape), "Rank": len(shape)}[operation.type]
            return [np.asarray(value, operation.outputs[0].dtype.as_numpy_dtype)]
        if not inputs or not all(isinstance(value, np.ndarray) for value in inputs) or operation.op_def.is_stateful:
            return None
        if any(tensor.shape.num_elements() is not None and tensor.shape.num_elements() > _LARGEST_KNOWN
               for tensor in operation.outputs):  # fmt: skip
            return None
        function = getattr(self.tf.raw_ops, operation.type)
        taken = list(inspect.signature(function).parameters)
        attributes = {one.name: operation.get_attr(one.name) for one in operation.op_def.attr if one.name in taken}
        with self.tf.init_scope():
            results = self.tf.nest.flatten(function(**_grouped(operation, inputs, taken), **attributes))
        return [np.asarray(result.numpy()) for result in results]

    def _loop(self, operation: Any, state: list[Any]) -> list[Any]:
        body, condition = operation.get_attr("body").name, operation.get_attr("cond").name
        steps = self._steps(body, condition, state)
        if steps is None:
            raise NotUnrolled(f"`{operation.name}` is a loop that ends as the data say")
        if steps > self.longest:
            return self._kept_loop(body, condition, state)
        for _ in range(steps):
            state = self._call(body, state)
        return state

    def _steps(self, body: str, condition: str, state: list[Any]) -> int | None:
        """Return how many steps a loop has, one more than the longest at most; None where data decide."""
        inputs, results = self._function(body)
        taken, ends = self._function(condition)
        deciding = _placeholders(ends, taken)
        while more := _placeholders([results[number] for number in deciding], inputs) - deciding:
            deciding |= more
        now = [value if number in deciding else None for number, value in enumerate(state)]
        for steps in range(self.longest + 1):
            (goes_on,) = self.run(taken, ends, now)
            if not isinstance(goes_on, np.ndarray):
                return None
            if not goes_on:
                return steps
            after = self.run(inputs, [results[number] for number in sorted(deciding)], now)
            for number, value in zip(sorted(deciding), after, strict=True):
                now[number] = value
        return self.longest + 1

    def _kept_loop(self, body: str, condition: str, state: list[Any]) -> list[Any]:
        """Return what a loop gives that stays one, after its first step, which tells what its lists hold."""
        inputs, results = self._function(body)
        moving = [number for number, tensor in enumerate(results) if _origin(tensor) is not inputs[number]]
        state = self._call(body, state)
        lists = {number for number in moving if isinstance(state[number], _Elements)}

        def whole(values: Sequence[Any]) -> list[Any]:
            found = list(state)
            for number, value in zip(moving, values, strict=True):
                found[number] = _Elements(stacked=value) if number in lists else value
            return found

        def parts(values: list[Any]) -> list[Any]:
            return [
                self.stacked(values[number]) if number in lists else self.tensor(values[number]) for number in moving
            ]

        for number in set(range(len(state))) - set(moving):
            if isinstance(state[number], _Elements):  # stacked once, not in every step
                state[number] = _Elements(stacked=self.stacked(state[number]))
        done = self.tf.while_loop(
            lambda *values: self.tensor(self._call(condition, whole(values))[0]),
            lambda *values: parts(self._call(body, whole(values))),
            parts(state),
        )
        return whole(done)

    def stacked(self, elements: _Elements) -> Any:
        """Return the elements of a list as one tensor, zeros where nothing was written."""
        if elements.stacked is not None:
            return elements.stacked
        written = [number for number, one in enumerate(elements.each) if one is not None]
        if not written:
            raise NotUnrolled("a list of tensors is read before anything is written to it")
        first, count = self.tensor(elements.each[written[0]]), len(elements.each)
        if len(written) == 1:  # as a long loop begins; LiteRT pads without a constant of that size
            around = [[written[0], count - written[0] - 1], *([0, 0] for _ in first.shape)]
            return self.tf.pad(first[self.tf.newaxis], around)
        return self.tf.stack([self.tf.zeros_like(first) if one is None else one for one in elements.each])


def _imported(tf: Any, definition: Any, library: Any) -> tuple[list[Any], list[Any]]:
    """Return the placeholders and the results of a function, as tensors of a graph of its own.

    A function names what its nodes read `node:result:place`, a graph `node:place`, counted over all results.
    """
    message = tf.compat.v1.GraphDef(library=library)
    for argument in definition.signature.input_arg:
        node = message.node.add(name=argument.name, op="Placeholder")
        node.attr["dtype"].type = argument.type
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(tf.compat.v1.GraphDef(library=library), name="")
        places = {argument.name: f"{argument.name}:0" for argument in definition.signature.input_arg}
        for node in definition.node_def:
            start = 0
            for result in graph.op_def_for_type(node.op).output_arg:
                count = 1
                if result.number_attr or result.type_list_attr:
                    given = node.attr[result.number_attr or result.type_list_attr]
                    count = given.i if result.number_attr else len(given.list.type)
                for place in range(count):
                    places[f"{node.name}:{result.name}:{place}"] = f"{node.name}:{start + place}"
                start += count
        for node in definition.node_def:
            added = message.node.add()
            added.CopyFrom(node)
            added.attr.pop("_class", None)  # it may name a node outside the function, to be placed beside
            added.input[:] = [places.get(name, name) for name in node.input]  # what runs before is named by its node
        tf.graph_util.import_graph_def(message, name="")
        inputs = [graph.get_tensor_by_name(f"{argument.name}:0") for argument in definition.signature.input_arg]
        results = [places[definition.ret[result.name]] for result in definition.signature.output_arg]
        return inputs, [graph.get_tensor_by_name(name) for name in results]


def _names_functions(attribute: Any) -> bool:
    return attribute.HasField("func") or bool(attribute.list.func)


def _grouped(operation: Any, inputs: list[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an operation's inputs by the names that a function has for its first arguments; some take several."""
    left, found = list(inputs), {}
    for name, argument in zip(names, operation.op_def.input_arg, strict=False):
        if argument.number_attr or argument.type_list_attr:
            count = operation.get_attr(argument.number_attr or argument.type_list_attr)
            count = count if isinstance(count, int) else len(count)
            found[name], left = left[:count], left[count:]
        else:
            found[name] = left.pop(0)
    return found


def _origin(tensor: Any) -> Any:
    while tensor.op.type in _PASSED:
        tensor = tensor.op.inputs[0]
    return tensor


def _placeholders(results: Sequence[Any], inputs: Sequence[Any]) -> set[int]:
    """Return the numbers of the placeholders that results depend on."""
    numbers = {tensor.op.name: number for number, tensor in enumerate(inputs)}
    seen: set[str] = set()
    waiting = [tensor.op for tensor in results]
    while waiting:
        operation = waiting.pop()
        if operation.name not in seen:
            seen.add(operation.name)
            waiting += [tensor.op for tensor in operation.inputs]
    return {numbers[name] for name in seen & set(numbers)}


def _number(value: Any) -> int:
    if not isinstance(value, np.ndarray):
        raise NotUnrolled("a list of tensors has a length that data decide")
    return int(value)


def _reserve(replay: _Replay, operation: Any, shape: Any, count: Any) -> _Elements:
    del replay, operation, shape
    return _Elements(each=(None,) * _number(count))


def _empty(replay: _Replay, operation: Any, shape: Any, most: Any) -> _Elements:
    del replay, operation, shape, most
    return _Elements()


def _from_tensor(replay: _Replay, operation: Any, tensor: Any, shape: Any) -> _Elements:
    del operation, shape
    count = tensor.shape[0]
    if count is not None and count <= replay.longest:
        return _Elements(each=tuple(replay.tf.unstack(replay.tensor(tensor), num=count)))
    return _Elements(stacked=replay.tensor(tensor))


def _get_item(replay: _Replay, operation: Any, elements: _Elements, index: Any, shape: Any) -> Any:
    del operation, shape
    if isinstance(index, np.ndarray) and elements.stacked is None:
        if elements.each[int(index)] is None:
            raise NotUnrolled("a list of tensors is read before anything is written to it")
        return elements.each[int(index)]
    return replay.tf.gather(replay.stacked(elements), index)


def _set_item(replay: _Replay, operation: Any, elements: _Elements, index: Any, item: Any) -> _Elements:
    if isinstance(index, np.ndarray) and elements.stacked is None:
        each = list(elements.each)
        if int(index) >= len(each) and operation.get_attr("resize_if_index_out_of_bounds"):
            each += [None] * (int(index) + 1 - len(each))
        each[int(index)] = item
        return _Elements(each=tuple(each))
    tf, before = replay.tf, replay.stacked(elements)
    here = tf.reshape(tf.equal(tf.range(before.shape[0]), index), [-1] + [1] * (before.shape.rank - 1))
    return _Elements(stacked=tf.where(here, replay.tensor(item)[tf.newaxis], before))


def _push_back(replay: _Replay, operation: Any, elements: _Elements, item: Any) -> _Elements:
    del operation
    if elements.stacked is not None:
        raise NotUnrolled("a list of tensors grows in a long loop")
    del replay
    return _Elements(each=(*elements.each, item))


def _stack(replay: _Replay, operation: Any, elements: _Elements, shape: Any) -> Any:
    del operation, shape
    return replay.stacked(elements)


def _length(replay: _Replay, operation: Any, elements: _Elements) -> np.ndarray:
    del replay, operation
    return np.asarray(len(elements.each) if elements.stacked is None else elements.stacked.shape[0], np.int32)


_LIST_OPERATIONS: dict[str, Callable[..., Any]] = {
    "TensorListReserve": _reserve,
    "EmptyTensorList": _empty,
    "TensorListFromTensor": _from_tensor,
    "TensorListGetItem": _get_item,
    "TensorListSetItem": _set_item,
    "TensorListPushBack": _push_back,
    "TensorListStack": _stack,
    "TensorListLength": _length,
}
