"""An ONNX file in ONNX Runtime against the LiteRT file that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwindle.errors import DwindleError
from dwindle.exporting.onnx.assembling import Assembled
from dwindle.exporting.verify import BOUNDS, Bound, Verification, activations_of, compare
from dwindle.lifting.flatbuffer import Graph, Tensor


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What an ONNX file is compared with.

    Attributes:
        content: A LiteRT file.
        bound: What is accepted.
        reference: What it is, in words.
        quanta: Step of each output, None for floats.
    """

    content: bytes
    bound: Bound
    reference: str
    quanta: tuple[float | None, ...]


def judge(content: bytes, graph: Graph) -> tuple[Judge, ...]:
    """Return what an ONNX file has to agree with.

    A float file, also one with packed weights: the file, within 1e-4 of the largest output. One whose activations are
    integers: 99% of outputs within one quantum (32 of 16 bits), since either runtime rounds products of integers its
    own way. One with integer weights and float activations, which LiteRT rounds while it runs and ONNX Runtime does
    not: within 1e-4 of the file whose weights are the floats that the integers stand for, and 99% of outputs within
    1e-2 of the file itself.
    """
    from dwindle.exporting import output_quanta

    quanta = tuple(output_quanta(content))
    activations = {t.bits for op in graph.operations for t in op.outputs if t.is_quantized}
    if activations:
        kind = "dynamic" if None in quanta else "static16" if max(activations) == 16 else "static"
        return (Judge(content=content, bound=BOUNDS[kind], reference="LiteRT", quanta=quanta),)
    rounded = any(
        _is_packed(t) for op in graph.operations if op.name not in ("DEQUANTIZE", "GATHER") for t in op.inputs
    )
    if not rounded:
        return (Judge(content=content, bound=BOUNDS["float32"], reference="LiteRT", quanta=quanta),)
    from dwindle.lifting.float_files import as_float

    floats, _ = as_float(content)
    told = "LiteRT, with the weights as floats"
    return (
        Judge(content=floats, bound=BOUNDS["float32"], reference=told, quanta=quanta),
        Judge(content=content, bound=BOUNDS["dynamic"], reference="LiteRT", quanta=quanta),
    )


def _is_packed(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.value is not None and tensor.is_quantized


def compared(made: Assembled, judges: Sequence[Judge], inputs: Sequence[np.ndarray]) -> Verification:
    """Run an ONNX file and what it is compared with on the same samples.

    Args:
        made: The ONNX file.
        judges: What it has to agree with.
        inputs: One array for each input, shape ``(n, ...)``, as the LiteRT file takes them.

    Returns:
        The first comparison that fails, else that with the first judge.

    Raises:
        UnsupportedModelError: If ONNX Runtime can't run the file.
    """
    from dwindle.measuring.litert import LiteRTRunner
    from dwindle.measuring.onnx_runtime import OnnxRunner

    runner = OnnxRunner(made.content)
    results = runner.predict(turned(made, inputs))
    found = [_back(value, axes) for value, axes in zip(results, made.output_axes, strict=True)]
    verifications = []
    for one in judges:
        expected = LiteRTRunner(one.content).predict(inputs)
        shapes = [(a.shape, b.shape) for a, b in zip(found, expected, strict=True) if a.shape != b.shape]
        if shapes:
            raise DwindleError(f"an output has the shape {shapes[0][0]}; LiteRT gives {shapes[0][1]}")
        verifications.append(compare(expected, found, one.bound, reference=one.reference, quanta=one.quanta))
    return next((one for one in verifications if not one.passed), verifications[0])


def turned(made: Assembled, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return a LiteRT file's inputs in the ONNX file's order of axes."""
    return [np.asarray(array).transpose(axes) for array, axes in zip(inputs, made.input_axes, strict=True)]


def _back(value: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return value.transpose([axes.index(axis) for axis in range(value.ndim)])


def first_difference(made: Assembled, judges: Sequence[Judge], inputs: Sequence[np.ndarray]) -> str:
    """Return the first operator of the LiteRT file whose result differs in ONNX Runtime by more than the bound.

    Args:
        made: The ONNX file.
        judges: What it has to agree with; the first one's activations are looked at.
        inputs: One array for each input; a few samples are used.
    """
    few = [np.asarray(array[:8]) for array in inputs]
    try:
        expected = activations_of(judges[0].content, few)
        found = _activations(made, few)
    except (DwindleError, ValueError, RuntimeError):
        return "an operator that is not known"
    for operation in made.graph.operations:
        for tensor in operation.outputs:
            wanted, value = expected.get(tensor.name), found.get(tensor.index)
            if wanted is None or value is None or wanted.shape != value.shape:
                continue
            step = float(tensor.scale.reshape(-1)[0]) if tensor.is_quantized and tensor.scale is not None else None
            bound = judges[0].bound if step else BOUNDS["float32"]
            if not compare([wanted], [value], bound, reference="", quanta=[step]).passed:
                return f"{operation.name} `{tensor.name}` (ONNX `{made.values[tensor.index].name}`)"
    return "no single operator; small differences add up"


def _activations(made: Assembled, inputs: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """Return every float activation of the ONNX file by the number of the LiteRT file's tensor, one row a sample."""
    from onnx import ModelProto, ValueInfoProto

    from dwindle.measuring.onnx_runtime import OnnxRunner

    watched: Any = ModelProto()
    watched.CopyFrom(made.model)
    there = {value.name for value in (*watched.graph.output, *watched.graph.input)}
    for name in dict.fromkeys(value.name for value in made.values.values()):
        if name not in there:
            watched.graph.output.append(ValueInfoProto(name=name))
    runner = OnnxRunner(watched.SerializeToString())
    rows: dict[int, list[np.ndarray]] = {}
    for sample in range(len(inputs[0])):
        results = runner.run(*turned(made, [array[sample : sample + 1] for array in inputs]))
        by_name = dict(zip((spec.name for spec in runner.outputs), results, strict=True))
        for index, value in made.values.items():
            if value.name not in by_name or by_name[value.name].dtype.kind != "f":
                continue
            plain = _back(by_name[value.name], value.axes)
            if value.rows is not None:
                plain = plain[:, np.argsort(value.rows)]
            rows.setdefault(index, []).append(plain.reshape(1, -1))
    return {index: np.concatenate(parts) for index, parts in rows.items()}
