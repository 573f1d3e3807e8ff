"""Operators that TensorFlow Lite Micro has, and how its resolver is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.flatbuffer import layer_name, operator_name, parse, read_graph

_BUILTIN = """
    Abs Add AddN ArgMax ArgMin AssignVariable AveragePool2D BatchMatMul BatchToSpaceNd BroadcastArgs BroadcastTo
    CallOnce Cast Ceil Concatenation Conv2D Cos CumSum DepthToSpace DepthwiseConv2D Dequantize Div DynamicUpdateSlice
    Elu EmbeddingLookup Equal Exp ExpandDims Fill Floor FloorDiv FloorMod FullyConnected Gather GatherNd Greater
    GreaterEqual HardSwish If L2Normalization L2Pool2D LeakyRelu Less LessEqual Log LogSoftmax LogicalAnd LogicalNot
    LogicalOr Logistic MaxPool2D Maximum Mean Minimum MirrorPad Mul Neg NotEqual Pack Pad PadV2 Prelu Quantize
    ReadVariable ReduceAll ReduceMax ReduceMin Relu Relu6 Reshape ResizeBilinear ResizeNearestNeighbor ReverseV2 Round
    Rsqrt SelectV2 Shape Sin Slice Softmax SpaceToBatchNd SpaceToDepth Split SplitV Sqrt Square SquaredDifference
    Squeeze StridedSlice Sub Sum Svdf Tanh Transpose TransposeConv UnidirectionalSequenceLSTM Unpack VarHandle While
    ZerosLike
"""

# Operators whose name in the schema is not that of the resolver's method with underscores between its words.
_SPELLED = {
    "AveragePool2D": "AVERAGE_POOL_2D", "Conv2D": "CONV_2D", "CumSum": "CUMSUM", "BatchMatMul": "BATCH_MATMUL",
    "DepthwiseConv2D": "DEPTHWISE_CONV_2D", "L2Normalization": "L2_NORMALIZATION", "L2Pool2D": "L2_POOL_2D",
    "MaxPool2D": "MAX_POOL_2D", "PadV2": "PADV2", "UnidirectionalSequenceLSTM": "UNIDIRECTIONAL_SEQUENCE_LSTM",
}  # fmt: skip

_SIGNAL = """
    Delay Energy FftAutoScale FilterBank FilterBankLog FilterBankSpectralSubtraction FilterBankSquareRoot Framer Irfft
    OverlapAdd PCAN Rfft Stacker Window
"""


def _schema_name(method: str) -> str:
    if method in _SPELLED:
        return _SPELLED[method]
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(method)).upper()


# Operator's name in the schema, or CUSTOM:name, to the method of MicroMutableOpResolver that registers it.
RESOLVER: dict[str, str] = {
    **{_schema_name(word): f"Add{word}" for word in _BUILTIN.split()},
    **{f"CUSTOM:Signal{word}": f"Add{word}" for word in _SIGNAL.split()},
    "CUSTOM:CIRCULAR_BUFFER": "AddCircularBuffer",
    "CUSTOM:TFLM_DECODE": "AddDecode",
    "CUSTOM:TFLite_Detection_PostProcess": "AddDetectionPostprocess",
    "CUSTOM:ethos-u": "AddEthosU",
}


def _used(model: Any) -> Iterator[tuple[int, int, str]]:
    """Yield number of subgraph, number of operator, and the operator's name."""
    for number, graph in enumerate(model.subgraphs):
        for index, operation in enumerate(graph.operators or []):
            yield number, index, operator_name(model, operation)


def operators_of(content: bytes) -> tuple[str, ...]:
    """Return the operators of a file, each once, sorted."""
    return tuple(sorted({name for _, _, name in _used(parse(content))}))


def resolver_calls(content: bytes) -> tuple[str, ...]:
    """Return the methods of ``MicroMutableOpResolver`` that a file needs, sorted; one for each of its operators.

    Raises:
        UnsupportedModelError: If there is an operator that TensorFlow Lite Micro lacks.
    """
    check_operators(content)
    return tuple(sorted({RESOLVER[name] for name in operators_of(content)}))


def check_operators(content: bytes, name: str = "the file") -> None:
    """Check that TensorFlow Lite Micro has every operator of a file.

    Args:
        content: The file.
        name: What to call it in the message.

    Raises:
        UnsupportedModelError: Naming each operator that it lacks with its layers.
    """
    model = parse(content)
    main = read_graph(content).operations
    lacking: dict[str, list[str]] = {}
    for graph, index, operator in _used(model):
        if operator not in RESOLVER:
            layer = layer_name(main[index]) if graph == 0 else f"subgraph {graph}"
            layers = lacking.setdefault(operator.removeprefix("CUSTOM:"), [])
            if layer not in layers:
                layers.append(layer)
    if lacking:
        found = "; ".join(f"`{operator}` ({_some(layers)})" for operator, layers in lacking.items())
        raise UnsupportedModelError(
            f"{name} can't run on a microcontroller: TensorFlow Lite Micro has no operator {found}; replace the layer "
            "with one that converts to operators listed in docs/micro.md"
        )


def _some(layers: list[str]) -> str:
    listed = ", ".join(f"`{layer}`" for layer in layers[:3])
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"layer{'s' if len(layers) > 1 else ''} {listed}{more}"
