"""A LiteRT file becomes an ONNX model, which is checked to be a valid one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwindle.errors import ConversionError, UnsupportedModelError
from dwindle.exporting.onnx.values import Value
from dwindle.exporting.onnx.writer import OPSETS, Writer
from dwindle.lifting.flatbuffer import Graph, parse, read_graph

# What a protobuf message can hold, with room for what is not weights.
_LARGEST = 2**31 - 2**20


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """An ONNX model in the making.

    Attributes:
        model: The `onnx.ModelProto`.
        content: Its bytes.
        graph: The LiteRT graph that it was made from.
        values: The activation that each of that graph's tensors is, by number.
        input_axes: ONNX axis ``k`` of an input holds the file's axis ``input_axes[...][k]``.
        output_axes: The same for outputs.
        notes: What the user should know.
    """

    model: Any
    content: bytes
    graph: Graph
    values: dict[int, Value]
    input_axes: tuple[tuple[int, ...], ...]
    output_axes: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]


def assemble(content: bytes, *, open_batch: bool, layout: str, scheme: str, away: bool = False) -> Assembled:
    """Return the ONNX model of a LiteRT file.

    Args:
        content: The ``.tflite``.
        open_batch: Whether the first axis takes any number of samples.
        layout: ``"NHWC"`` or ``"NCHW"``.
        scheme: Written into the file.
        away: Whether averages of integers round halves as LiteRT does; see `Writer`.

    Raises:
        UnsupportedModelError: If an operator, or the way it is used, has no entry.
        ConversionError: If the file would be larger than ONNX files can be.
    """
    import onnx
    from onnx import helper

    import dwindle

    graph = read_graph(content)
    _check_lengths(content, graph)
    stored = sum(tensor.value.nbytes for tensor in graph.tensors if tensor.value is not None)
    if stored > _LARGEST:
        raise ConversionError(f"the weights have {stored:,} bytes, more than one ONNX file can hold; export a .tflite")
    writer = Writer(graph, open_batch=open_batch, layout=layout, away=away)
    inputs, outputs = writer.run()
    made = helper.make_graph(writer.nodes, "dwindle", inputs, outputs, writer.initializers)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", writer.opset)], ir_version=OPSETS[writer.opset],
        producer_name="dwindle", producer_version=dwindle.__version__,
    )  # fmt: skip
    told = {"scheme": scheme, "layout": layout, "source_sha256": hashlib.sha256(content).hexdigest()}
    helper.set_model_props(model, told)
    try:
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(model)
    except Exception as error:  # both report in many ways
        raise ConversionError(f"the ONNX graph is not valid: {' '.join(str(error).split())[:300]}") from error
    notes = list(writer.notes)
    if not open_batch and all(tensor.shape[:1] == (1,) for tensor in graph.inputs):
        notes.append("takes one sample at a time: the graph fixes the first axis")
    if away:
        notes.append("averages of integers round halves as LiteRT does, which ONNX Runtime computes in floats")
    return Assembled(
        model=model, content=model.SerializeToString(deterministic=True), graph=graph,
        values={index: value for index, value in writer.values.items() if isinstance(value, Value)},
        input_axes=tuple(writer.order_outside(tensor) for tensor in graph.inputs),
        output_axes=tuple(writer.order_outside(tensor) for tensor in graph.outputs), notes=tuple(notes),
    )  # fmt: skip


def _check_lengths(content: bytes, graph: Graph) -> None:
    """Refuse open lengths other than the number of samples: the operators' own numbers are for one length."""
    tensors = parse(content).subgraphs[0].tensors
    for tensor, name in zip(graph.inputs, graph.input_names, strict=True):
        signature = tensors[tensor.index].shapeSignature
        lengths = [] if signature is None else [int(n) for n in signature]
        if any(n < 0 for n in lengths[1:]):
            raise UnsupportedModelError(
                f"input `{name}` has the open lengths {lengths} (-1); convert the model with fixed ones, and only the "
                "number of samples open"
            )


def scheme_of(graph: Graph) -> str:
    """Return the name of the scheme that a file's tensors look like."""
    activations = {t.bits for op in graph.operations for t in op.outputs if t.is_quantized and t.value is None}
    weights = [t for op in graph.operations for t in op.inputs if t is not None and t.value is not None]
    bits = {t.bits for t in weights if t.is_quantized}
    if activations:
        return "int16x8" if max(activations) == 16 else f"int{min(bits or {8})}"
    if bits:
        computed = any(t.is_quantized for op in graph.operations if op.name != "DEQUANTIZE" for t in op.inputs if t)
        return f"int{min(bits)}-{'dynamic' if computed else 'weights'}"
    return "float16" if any(t.dtype == np.float16 for t in weights) else "float32"
