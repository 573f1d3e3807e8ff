"""States of streaming files: variables that a file keeps between runs become inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import DTYPES, check_structure, integers, operator_name, parse, read_graph, serialize
from dwindle.lifting.signatures import drop_unread, entry, with_signature

_VARIABLES = {"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"}


@dataclass(frozen=True, kw_only=True)
class State:
    """A variable that became an input and an output.

    Attributes:
        given: Name of the input.
        made: Name of the output, which is given back in the next run; None where the file never changes it.
        start: What it holds before the first run, as the floats that integers stand for; None where nothing says.
    """

    given: str
    made: str | None
    start: np.ndarray | None

    def __str__(self) -> str:
        begins = "with what the file does not say"
        if self.start is not None:
            low, high = float(self.start.min()), float(self.start.max())
            begins = f"with {low:g}" if low == high else f"with values from {low:g} to {high:g}"
        after = "is not changed" if self.made is None else f"is given back from output `{self.made}`"
        return f"a state that the file keeps between runs is an input here: `{self.given}` begins {begins}, and {after}"


def with_states_outside(content: bytes) -> tuple[bytes, list[State]]:
    """Return a file that takes its variables as inputs and gives them as outputs, and what they are.

    Inputs and outputs that were there before come first. A variable that is read after it was written has the new value
    there. A file without variables comes back as it is.

    Raises:
        UnsupportedModelError: If it is no LiteRT file, or a broken one.
    """
    if not any(operation.name in _VARIABLES for operation in read_graph(content).operations):
        return content, []
    check_structure(content)
    try:
        return _with_states_outside(parse(content))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(f"the LiteRT file is damaged ({type(error).__name__}: {error})") from None


def _with_states_outside(model: Any) -> tuple[bytes, list[State]]:
    main = model.subgraphs[0]
    starts = _starts(model)
    handles: dict[int, str] = {}
    first: dict[str, int] = {}  # the tensor that a variable is read into before it is written
    now: dict[str, int] = {}
    written: set[str] = set()
    stands_for: dict[int, int] = {}
    kept = []
    for operation in main.operators:
        name = operator_name(model, operation)
        operation.inputs = np.array([stands_for.get(int(i), int(i)) for i in integers(operation.inputs)], np.int32)
        if name == "VAR_HANDLE":
            handles[int(operation.outputs[0])] = _variable(operation)
        elif name == "READ_VARIABLE" and int(operation.inputs[0]) in handles:
            variable, result = handles[int(operation.inputs[0])], int(operation.outputs[0])
            if variable in now:
                stands_for[result] = now[variable]
            else:
                first[variable] = now[variable] = result
        elif name == "ASSIGN_VARIABLE" and int(operation.inputs[0]) in handles:
            variable = handles[int(operation.inputs[0])]
            now[variable] = int(operation.inputs[1])
            written.add(variable)
        elif name != "CALL_ONCE":
            kept.append(operation)
    main.operators = kept
    main.outputs = np.array([stands_for.get(int(i), int(i)) for i in integers(main.outputs)], np.int32)
    taken = with_signature(model)
    model.signatureDefs = [taken]
    for found in taken.outputs:
        found.tensorIndex = stands_for.get(found.tensorIndex, found.tensorIndex)
    states = []
    for variable, tensor in first.items():
        given = _free(variable, [found.name.decode("utf8") for found in taken.inputs])
        _add(main, taken, "inputs", given, tensor)
        made = _made(main, taken, f"{given}_next", now[variable]) if variable in written else None
        # A layer of the lifted model is named after it.
        main.tensors[tensor].name = given.encode("utf8")
        states.append(State(given=given, made=made, start=_as_floats(starts.get(variable), main.tensors[tensor])))
    if len(model.subgraphs) == 2 and not any(_calls(operation) for operation in kept):
        model.subgraphs = [main]
    drop_unread(model)
    return serialize(model), states


def _variable(operation: Any) -> str:
    options = operation.builtinOptions
    parts = [part.decode("utf8", "replace") for part in (options.container, options.sharedName) if part]
    return "/".join(parts)


def _starts(model: Any) -> dict[str, np.ndarray]:
    """Return what the subgraph that is called once writes into variables, as it is stored."""
    found: dict[str, np.ndarray] = {}
    for operation in model.subgraphs[0].operators:
        if operator_name(model, operation) != "CALL_ONCE":
            continue
        called = operation.builtinOptions.initSubgraphIndex
        if called < 0:
            raise IndexError(f"subgraph {called}")
        graph = model.subgraphs[called]
        handles: dict[int, str] = {}
        widened: dict[int, int] = {}
        for inner in graph.operators or []:
            name = operator_name(model, inner)
            if name == "VAR_HANDLE":
                handles[int(inner.outputs[0])] = _variable(inner)
            elif name == "DEQUANTIZE":
                widened[int(inner.outputs[0])] = int(inner.inputs[0])
            elif name == "ASSIGN_VARIABLE" and int(inner.inputs[0]) in handles:
                tensor = graph.tensors[widened.get(int(inner.inputs[1]), int(inner.inputs[1]))]
                data = model.buffers[tensor.buffer].data
                dtype = DTYPES.get(tensor.type)
                if data is not None and dtype is not None:
                    value = np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype)
                    found[handles[int(inner.inputs[0])]] = value.reshape(integers(tensor.shape))
    return found


def _as_floats(value: np.ndarray | None, tensor: Any) -> np.ndarray | None:
    """Return the floats that a stored value stands for on the grid of the tensor that it is read into."""
    scale = None if tensor.quantization is None else tensor.quantization.scale
    if value is None or value.size == 0 or scale is None or not len(scale):
        return None if value is None or value.size == 0 else value.astype(np.float32)
    points = tensor.quantization.zeroPoint
    point = 0 if points is None or not len(points) else int(points[0])
    return (value.astype(np.float32) - point) * np.float32(scale[0])


def _add(main: Any, signature: Any, kind: str, name: str, tensor: int) -> None:
    setattr(main, kind, np.array([*integers(getattr(main, kind)), tensor], np.int32))
    getattr(signature, kind).append(entry(name, tensor))


def _made(main: Any, signature: Any, wanted: str, tensor: int) -> str:
    """Return the name of the output that a tensor is; it becomes one where it is none yet."""
    names: dict[int, str] = {found.tensorIndex: found.name.decode("utf8") for found in signature.outputs}
    if tensor in names and tensor in integers(main.outputs):
        return names[tensor]
    name = _free(wanted, list(names.values()))
    _add(main, signature, "outputs", name, tensor)
    return name


def _free(wanted: str, taken: list[str]) -> str:
    """Return a name that a Keras layer can have and that is not taken."""
    name = "".join(letter if letter.isalnum() else "_" for letter in wanted).strip("_") or "state"
    number = 0
    while (f"{name}_{number}" if number else name) in taken:
        number += 1
    return f"{name}_{number}" if number else name


def _calls(operation: Any) -> bool:
    """Whether an operator has other subgraphs."""
    options = operation.builtinOptions
    return any("ubgraph" in name for name in vars(options)) if options is not None else False
