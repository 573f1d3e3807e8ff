"""ONNX files: what a LiteRT file holds, written for ONNX Runtime and compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dwindle.errors import DwindleError, VerificationError
from dwindle.exporting.convert import random_input
from dwindle.exporting.onnx.assembling import Assembled, assemble, scheme_of
from dwindle.exporting.onnx.verifying import compared, first_difference, judge
from dwindle.exporting.verify import Verification
from dwindle.lifting.flatbuffer import Graph, read_graph
from dwindle.lifting.onnx.graph import require_onnx
from dwindle.measuring.onnx_runtime import require_onnxruntime

__all__ = ["OnnxFile", "onnx_file", "require_packages"]

#: Random samples that every file is compared on.
RANDOM_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A verified ONNX file in memory.

    Attributes:
        content: Its bytes.
        scheme: How its numbers are stored.
        verification: How it was compared with the LiteRT file, and what was found.
        notes: What the user should know.
    """

    content: bytes
    scheme: str
    verification: Verification
    notes: tuple[str, ...]


def require_packages() -> None:
    """Check that the packages are there which write and run ONNX files.

    Raises:
        MissingDependencyError: If one is not.
    """
    require_onnx()
    require_onnxruntime()


def onnx_file(
    content: bytes, inputs: Sequence[np.ndarray], *, layout: str = "NHWC", scheme: str | None = None
) -> OnnxFile:
    """Write a LiteRT file as ONNX, run both, and compare them.

    Any number of samples is accepted at once where the graph allows it; else as many as by the LiteRT file.

    Args:
        content: The ``.tflite``.
        inputs: Samples to compare on next to random ones: one array for each input, shape ``(n, ...)``, as the LiteRT
            file takes them; empty for random ones only.
        layout: ``"NHWC"`` keeps the order of the axes; ``"NCHW"`` makes channels the second axis of inputs and outputs
            with four axes or more.
        scheme: Its name, which is written into the file; None: what the file itself tells.

    Returns:
        The file. Its inputs and outputs are float32 where the LiteRT file has integers with a scale.

    Raises:
        UnsupportedModelError: If an operator, or the way it is used, can't be written.
        ConversionError: If the file would be larger than ONNX files can be.
        VerificationError: If ONNX Runtime does not predict what LiteRT predicts; naming the first operator to differ.
        MissingDependencyError: If `onnx` or `onnxruntime` is not installed.
    """
    require_packages()
    graph = read_graph(content)
    scheme = scheme or scheme_of(graph)
    random = [
        random_input(t.shape[1:], np.float32 if t.is_quantized else t.dtype, RANDOM_SAMPLES) for t in graph.inputs
    ]
    inputs = [np.concatenate([a, b.astype(a.dtype)]) for a, b in zip(inputs, random, strict=True)] if inputs else random
    judges = judge(content, graph)
    tried: list[tuple[Assembled, Verification]] = []
    for open_batch, away in _ways(graph):
        made = assemble(content, open_batch=open_batch, layout=layout, scheme=scheme, away=away)
        try:
            tried.append((made, compared(made, judges, inputs)))
        except DwindleError:  # ONNX Runtime can't run it with several samples
            if (open_batch, away) == _ways(graph)[-1] and not tried:
                raise
            continue
        if tried[-1][1].passed:
            break
    made, verification = tried[-1]
    if not verification.passed:
        raise VerificationError(
            f"ONNX Runtime does not predict what LiteRT predicts: {verification.within:.2%} of outputs on "
            f"{verification.samples} samples are within the bound ({verification.bound}; reference: "
            f"{verification.reference}), the largest difference is {verification.max_abs_error:.4g}; they part at "
            f"{first_difference(made, judges, inputs)}; nothing was written"
        )
    return OnnxFile(content=made.content, scheme=scheme, verification=verification, notes=made.notes)


def _ways(graph: Graph) -> list[tuple[bool, bool]]:
    """Return what is tried until the file agrees: with the first axis open, with averages that round as LiteRT's."""
    opened = all(tensor.shape[:1] == (1,) for tensor in graph.inputs)
    averaged = any(op.name == "AVERAGE_POOL_2D" and op.outputs[0].is_quantized for op in graph.operations)
    return [
        (open_batch, away) for open_batch in ([True, False] if opened else [False])
        for away in ([False, True] if averaged else [False])
    ]  # fmt: skip
