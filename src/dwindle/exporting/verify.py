"""Verification: the file predicts what the model predicts, within a stated bound."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dwindle.errors import VerificationError
from dwindle.lifting.flatbuffer import Graph, read_graph


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far a file may be from its model.

    Attributes:
        tolerance: Largest accepted difference of one output, in units of ``unit``.
        unit: ``"largest output"``: a share of the model's largest absolute output (at least 1);
            ``"quantum"``: the step of the file's output.
        share: Fraction of all outputs that must be within the tolerance.
    """

    tolerance: float
    unit: str
    share: float

    def __str__(self) -> str:
        """Say it in words."""
        quanta = f"{self.tolerance:g} quantum" if self.tolerance == 1 else f"{self.tolerance:g} quanta of 16 bits"
        amount = quanta if self.unit == "quantum" else f"{self.tolerance:g} of the {self.unit}"
        return f"{self.share:.1%} of outputs within {amount}" if self.share < 1 else f"every output within {amount}"


# float16 rounds weights to 11 bits. In a dynamic file a value next to a rounding boundary may fall on its other side;
# so it may in a static one, because kernels multiply with fixed-point factors, and in a deep graph a few such values
# travel on. 16-bit kernels interpolate softmax, tanh and roots in tables, and multiply with factors of 15 bits.
BOUNDS = {
    "float32": Bound(tolerance=1e-4, unit="largest output", share=1.0),
    "saved-model": Bound(tolerance=1e-5, unit="largest output", share=1.0),
    "float16": Bound(tolerance=1e-2, unit="largest output", share=1.0),
    "dynamic": Bound(tolerance=1e-2, unit="largest output", share=0.99),
    "static": Bound(tolerance=1.0, unit="quantum", share=0.99),
    "static16": Bound(tolerance=32.0, unit="quantum", share=0.99),
}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the comparison of a file with its model found.

    Attributes:
        samples: Number of samples that both predicted.
        max_abs_error: Largest difference of any output.
        quanta: That difference in output quanta; None for float files.
        within: Fraction of outputs within the bound's tolerance.
        bound: The bound, in words.
        reference: What the file was compared with.
        same_class: Samples with the same largest output; None where outputs are no classes.
        ties: Samples whose class differs, or might, because the file's two largest outputs are equal.
        passed: Whether the bound holds.
    """

    samples: int
    max_abs_error: float
    quanta: float | None
    within: float
    bound: str
    reference: str
    same_class: int | None
    ties: int | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def compare(
    model_outputs: Sequence[np.ndarray],
    file_outputs: Sequence[np.ndarray],
    bound: Bound,
    *,
    reference: str,
    quanta: Sequence[float | None] = (),
) -> Verification:
    """Compare outputs of a model and of its file, arrays of shape ``(n, ...)``, one per output.

    Args:
        model_outputs: What the model predicts.
        file_outputs: What the file predicts, as float.
        bound: What is accepted.
        reference: What the model is, in words.
        quanta: Step of each output of the file, None where it is float.
    """
    worst, worst_quanta, inside, total = 0.0, None, 0, 0
    same_class = ties = None
    for number, (expected, found) in enumerate(zip(model_outputs, file_outputs, strict=True)):
        expected = np.asarray(expected, np.float32)
        found = np.asarray(found, np.float32).reshape(expected.shape)
        error = np.asarray(np.abs(expected - found))  # a number where there are no axes
        error[np.isnan(error)] = np.inf
        largest = float(error.max()) if error.size else 0.0
        worst = max(worst, largest)
        step = quanta[number] if number < len(quanta) else None
        if step:
            worst_quanta = max(worst_quanta or 0.0, largest / step)
        if bound.unit == "quantum" and step:
            limit = bound.tolerance * step * 1.001
        else:
            finite = np.abs(expected[np.isfinite(expected)])
            limit = bound.tolerance * max(1.0, float(finite.max()) if finite.size else 1.0)
        inside += int((error <= limit).sum())
        total += error.size
        if number == 0 and expected.ndim == 2 and expected.shape[1] > 1:
            top = np.sort(found, axis=1)
            tied = top[:, -1] == top[:, -2]
            agrees = expected.argmax(axis=1) == found.argmax(axis=1)
            same_class = int(agrees.sum())
            ties = int((~agrees & tied).sum())
    share = inside / total if total else 1.0
    return Verification(
        samples=len(np.atleast_1d(model_outputs[0])), max_abs_error=worst, quanta=worst_quanta, within=share,
        bound=str(bound), reference=reference, same_class=same_class, ties=ties, passed=share >= bound.share,
    )  # fmt: skip


def require(verification: Verification, float_content: bytes, content: bytes, inputs: Sequence[np.ndarray]) -> None:
    """Raise with the worst operator's name if a verification did not pass.

    Raises:
        VerificationError: Naming the bound, what was found, and the operator where file and model part.
    """
    if verification.passed:
        return
    worst = worst_operator(float_content, content, inputs)
    raise VerificationError(
        f"the file does not predict what the model predicts: {verification.within:.2%} of outputs on "
        f"{verification.samples} samples are within the bound ({verification.bound}; reference: "
        f"{verification.reference}), the largest difference is {verification.max_abs_error:.4g}; worst operator: "
        f"{worst}; nothing was written"
    )


def worst_operator(float_content: bytes, content: bytes, inputs: Sequence[np.ndarray]) -> str:
    """Name the operator whose output in a file differs most, relative to its size, from the float file's.

    Args:
        float_content: The float file.
        content: The file under test, with the same tensor names.
        inputs: One array per input; a few samples are used.
    """
    few = [array[:8] for array in inputs]
    before, after = activations_of(float_content, few), activations_of(content, few)
    scores: list[tuple[float, str]] = []
    for operation in read_graph(float_content).operations:
        name = operation.outputs[0].name
        expected, found = before.get(name), after.get(name)
        if expected is None or found is None or expected.shape != found.shape:
            continue
        size = float(np.sqrt(np.mean(expected**2))) or 1.0
        scores.append((float(np.sqrt(np.mean((expected - found) ** 2))) / size, f"{operation.name} `{name}`"))
    if not scores:
        return "not known (the files share no tensors)"
    # Errors travel downstream, so the operator to look at is where the error grows most.
    jumps = [(score - max([0.0, *(s for s, _ in scores[:i])]), score, name) for i, (score, name) in enumerate(scores)]
    _, score, name = max(jumps)
    return f"{name} (error {score:.1%} of its output's size)"


def activations_of(content: bytes, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Run a file sample by sample and return every float or dequantized activation by tensor name."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    graph = read_graph(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        interpreter = Interpreter(
            model_content=content, num_threads=1, experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )  # fmt: skip
    interpreter.allocate_tensors()
    found: dict[str, list[np.ndarray]] = {}
    for sample in range(len(inputs[0])):
        for tensor, array in zip(graph.inputs, inputs, strict=True):
            value = np.asarray(array[sample : sample + 1])
            if tensor.is_quantized and tensor.scale is not None and tensor.zero_point is not None:
                info = np.iinfo(tensor.dtype)  # type: ignore[type-var]
                value = np.clip(np.rint(value / tensor.scale) + tensor.zero_point, info.min, info.max)
            interpreter.set_tensor(tensor.index, np.ascontiguousarray(value, dtype=tensor.dtype))
        interpreter.invoke()
        for name, value in _readable(graph, interpreter):
            found.setdefault(name, []).append(value)
    return {name: np.concatenate([v.reshape(1, -1) for v in values]) for name, values in found.items()}


def _readable(graph: Graph, interpreter: Any) -> list[tuple[str, np.ndarray]]:
    found = []
    for operation in graph.operations:
        for tensor in operation.outputs:
            value = interpreter.get_tensor(tensor.index)
            if tensor.is_quantized and tensor.scale is not None and tensor.zero_point is not None:
                value = (value.astype(np.float32) - tensor.zero_point) * tensor.scale
            if value.dtype == np.float32 or value.dtype == np.float64:
                found.append((tensor.name, np.asarray(value, np.float32)))
    return found
