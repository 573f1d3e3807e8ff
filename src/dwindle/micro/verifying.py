"""The same file in TensorFlow Lite Micro and in LiteRT, value by value."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dwindle.errors import VerificationError
from dwindle.lifting.flatbuffer import Graph, layer_name, read_graph
from dwindle.measuring.litert import LiteRTRunner, quiet_stderr
from dwindle.micro.running import run_micro, zeros

# Kernels of the two runtimes round a product of fixed-point factors once or twice, and look softmax, tanh and roots up
# in tables that are not all the same, so a value may fall on the other side of a rounding boundary; what follows, a
# softmax for instance, may make several steps of one. The same bounds as in dwindle.exporting.verify.
_QUANTA = {8: 1, 16: 32}
_FLOAT = 1e-4
_SHARE = 0.99


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far TensorFlow Lite Micro's outputs are from another runtime's.

    Attributes:
        runtime: The other runtime.
        samples: Samples (or steps of sequences) that both ran.
        values: Output values that were compared.
        identical: Share of them that are the same.
        within: Share of them within the bound's difference.
        largest: Largest difference: steps of the integer outputs; of float outputs, a share of the largest output.
        passed: Whether the bound holds: 99% of integers, and every float, within its difference.
    """

    runtime: str
    samples: int
    values: int
    identical: float
    within: float
    largest: float
    passed: bool

    def __str__(self) -> str:
        """Say it in words."""
        if self.identical == 1:
            return f"{self.runtime}: all {self.values:,} outputs of {self.samples:,} runs are identical"
        return (
            f"{self.runtime}: {self.identical:.2%} of {self.values:,} outputs of {self.samples:,} runs are identical, "
            f"{self.within:.2%} within one step, the largest difference is {self.largest:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def agreement(runtime: str, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Agreement:
    """Compare raw outputs, one array for each output.

    The bound: 99% of 8-bit outputs within 1, 99% of 16-bit ones within 32, every float one within 1e-4 of the largest.
    """
    same, inside, values, largest, floats = 0, 0, 0, 0.0, True
    for left, right in zip(expected, found, strict=True):
        left, right = np.asarray(left), np.asarray(right).reshape(np.shape(left))
        if left.dtype.kind == "f":
            apart = np.abs(left - right) / max(1.0, float(np.abs(left).max(initial=0)))
            limit = _FLOAT
            floats = floats and bool((apart <= limit).all())
        else:
            apart = np.abs(left.astype(np.int64) - right.astype(np.int64))
            limit = _QUANTA.get(left.dtype.itemsize * 8, 0)
        same += int((left == right).sum())
        inside += int((apart <= limit).sum())
        values += left.size
        largest = max(largest, float(apart.max(initial=0)))
    within = inside / values if values else 1.0
    return Agreement(
        runtime=runtime, samples=len(found[0]), values=values, identical=same / values if values else 1.0,
        within=within, largest=largest, passed=floats and within >= _SHARE,
    )  # fmt: skip


def run_litert(
    content: bytes, inputs: Sequence[np.ndarray], *, states: Mapping[int, int] | None = None, reference: bool = False
) -> tuple[np.ndarray, ...]:
    """Run a file in LiteRT, as `dwindle.micro.running.run_micro` does: raw values in and out, states carried.

    Args:
        content: The file.
        inputs: As there.
        states: As there.
        reference: With LiteRT's reference kernels, which TensorFlow Lite Micro's were made from, and without XNNPACK.
    """
    graph = read_graph(content)
    call = _reference(content, graph) if reference else LiteRTRunner(content).run_raw
    states = dict(states or {})
    rows = [_one(call, graph, [array[i] for array in inputs], states) for i in range(len(inputs[0]))]
    return tuple(np.stack([row[number] for row in rows]) for number in range(len(graph.outputs)))


def _one(
    call: Callable[..., Sequence[np.ndarray]], graph: Graph, sample: list[np.ndarray], states: dict[int, int]
) -> list[np.ndarray]:
    shapes = [tensor.shape for tensor in graph.inputs]
    free = [number for number in range(len(shapes)) if number not in states]
    given = {number: zeros(graph, number) for number in states}
    steps: list[list[np.ndarray]] = []
    for values in _frames(sample, stepped=bool(states)):
        given.update({n: np.reshape(value, shapes[n]) for n, value in zip(free, values, strict=True)})
        made = call(*(given[number] for number in range(len(shapes))))
        given.update({number: np.reshape(made[output], shapes[number]) for number, output in states.items()})
        steps.append([value.reshape(value.shape[1:] if value.shape[:1] == (1,) else value.shape) for value in made])
    return [np.stack(column) for column in zip(*steps, strict=True)] if states else steps[0]


def _frames(sample: list[np.ndarray], *, stepped: bool) -> Iterator[list[np.ndarray]]:
    if not stepped:
        yield sample
        return
    for step in range(len(sample[0])):
        yield [array[step] for array in sample]


def _reference(content: bytes, graph: Graph) -> Callable[..., list[np.ndarray]]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with quiet_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = Interpreter(
            model_content=content, num_threads=1, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
        )
        interpreter.allocate_tensors()

    def call(*given: np.ndarray) -> list[np.ndarray]:
        for tensor, value in zip(graph.inputs, given, strict=True):
            interpreter.set_tensor(tensor.index, np.ascontiguousarray(value, dtype=tensor.dtype))
        interpreter.invoke()
        return [interpreter.get_tensor(tensor.index) for tensor in graph.outputs]

    return call


def require(found: Agreement, content: bytes, inputs: Sequence[np.ndarray]) -> None:
    """Raise where TensorFlow Lite Micro and LiteRT's reference kernels do not agree.

    Raises:
        VerificationError: Naming the first layer whose outputs do not agree.
    """
    if found.passed:
        return
    where = _parting(content, inputs)
    raise VerificationError(
        "the file gives other outputs in TensorFlow Lite Micro than in LiteRT's reference kernels: "
        f"{found.within:.1%} are within one step, and the largest difference is {found.largest:.3g}{where}; "
        "nothing was written"
    )


def _parting(content: bytes, inputs: Sequence[np.ndarray]) -> str:
    """Return the first layer whose outputs miss the bound, in words; nothing where none does on its own."""
    from dwindle.lifting.flatbuffer import parse, serialize

    sample = [array[:1] for array in inputs]
    for operation in read_graph(content).operations:
        tensor = operation.outputs[0]
        model = parse(content)
        model.subgraphs[0].outputs = np.array([tensor.index], np.int32)
        model.signatureDefs = None
        cut = serialize(model)
        part = agreement("", run_litert(cut, sample, reference=True), run_micro(cut, sample).outputs)
        if not part.passed:
            return f", beginning with operator `{operation.name}` of layer `{layer_name(operation)}`"
    return ""
