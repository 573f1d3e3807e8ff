"""ONNX models some nodes of which have no entry, and what their tests share."""

import keras
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dwindle.lifting.onnx.islands import OnnxIsland
from dwindle.measuring.onnx_runtime import OnnxRunner

RNG = np.random.default_rng(2)
_START = RNG.bit_generator.state
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
JAX = keras.backend.backend() == "jax"
node, value_info = helper.make_node, helper.make_tensor_value_info


@pytest.fixture(autouse=True)
def same_numbers():
    """Let each test draw the same numbers, whichever ran before; test files import it."""
    RNG.bit_generator.state = _START


def floats(*shape):
    return (0.3 * RNG.normal(size=shape)).astype(np.float32)


def network(nodes, constants, inputs, outputs, version=18):
    """Return a model; inputs and outputs are shapes, or pairs of a type and a shape."""
    ends = [
        [value_info(name, *(given if isinstance(given[-1:][0], tuple) else (FLOAT, given))) for name, given in each.items()]
        for each in (inputs, outputs)
    ]  # fmt: skip
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "net", *ends, stored), opset_imports=opsets, ir_version=9)


def graph(name, nodes, inputs, outputs):
    """Return a branch or a body."""
    kinds = {"i": INT64, "go": BOOL, "on": BOOL}
    ends = [
        [value_info(n, kinds.get(n, FLOAT), [] if n in kinds else None) for n in each] for each in (inputs, outputs)
    ]
    return helper.make_graph(nodes, name, *ends)


def detector():
    """A convolutional detector that ends in NonMaxSuppression."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"], name="stem", pads=[1, 1, 1, 1], strides=[4, 4]), node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w1"], ["c"], name="neck"), node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "w2"], ["e"], name="boxes"), node("Conv", ["d", "w3"], ["f"], name="scores"),
        node("Reshape", ["e", "four"], ["g"]), node("Transpose", ["g"], ["h"], perm=[0, 2, 1]),
        node("Reshape", ["f", "two"], ["i"]), node("Sigmoid", ["i"], ["s"]),
        node("NonMaxSuppression", ["h", "s", "most", "overlap", "least"], ["y"], name="nms"),
    ]  # fmt: skip
    constants = {
        "w0": floats(8, 3, 3, 3), "w1": floats(12, 8, 1, 1), "w2": floats(4, 12, 1, 1), "w3": floats(2, 12, 1, 1),
        "four": np.array([0, 4, -1]), "two": np.array([0, 2, -1]), "most": np.array(5), "overlap": np.float32(0.5),
        "least": np.float32(0.45),
    }  # fmt: skip
    return network(nodes, constants, {"x": ("N", 3, 32, 32)}, {"y": (INT64, ("M", 3)), "s": ("N", 2, 64)})


def warped():
    """A bilinear sampler between two convolutions."""
    nodes = [node("Conv", ["x", "w"], ["a"], name="before"), node("GridSample", ["a", "grid"], ["b"], name="warp"),
             node("Relu", ["b"], ["r"]), node("Conv", ["r", "v"], ["c"], name="after"),
             node("Relu", ["c"], ["d"]), node("Conv", ["d", "u"], ["y"], name="last")]  # fmt: skip
    constants = {"w": floats(6, 3, 1, 1), "v": floats(8, 6, 1, 1), "u": floats(4, 8, 1, 1)}
    return network(nodes, constants, {"x": ("N", 3, 8, 8), "grid": ("N", 5, 5, 2)}, {"y": ("N", 4, 5, 5)})


def branching():
    """A network that takes one of two branches by the data; both read a tensor and a weight from outside."""
    branches = {
        f"{name}_branch": graph(name, [node(kind, ["b", weight], ["o"])], [], ["o"])
        for name, kind, weight in (("then", "MatMul", "w"), ("else", "Add", "v"))
    }
    nodes = [node("MatMul", ["x", "w"], ["b"], name="first"), node("ReduceSum", ["x"], ["s"], keepdims=0),
             node("Greater", ["s", "zero"], ["c"]), node("If", ["c"], ["r"], name="choice", **branches),
             node("MatMul", ["r", "w"], ["y"], name="second")]  # fmt: skip
    constants = {"w": floats(4, 4), "v": floats(4), "zero": np.float32(0)}
    return network(nodes, constants, {"x": ("N", 4)}, {"y": ("N", 4)})


def looping():
    """A loop that runs once for each sample, with a tensor and a weight from outside, and results of each round."""
    body = graph(
        "body", [node("Identity", ["go"], ["on"]), node("Mul", ["state", "w"], ["scaled"]),
                 node("Add", ["scaled", "b"], ["next"]), node("Identity", ["next"], ["each"])],
        ["i", "go", "state"], ["on", "next", "each"],
    )  # fmt: skip
    nodes = [node("MatMul", ["x", "m"], ["b"], name="first"), node("Shape", ["x"], ["shape"]),
             node("Gather", ["shape", "zero"], ["count"], axis=0),
             node("Loop", ["count", "", "b"], ["end", "rounds"], name="loop", body=body),
             node("ReduceSum", ["rounds", "axes"], ["sum"], keepdims=0), node("Add", ["end", "sum"], ["z"]),
             node("MatMul", ["z", "m"], ["y"], name="second")]  # fmt: skip
    constants = {"m": floats(4, 4), "w": floats(4), "zero": np.array(0), "axes": np.array([0])}
    return network(nodes, constants, {"x": ("N", 4)}, {"y": ("N", 4)})


def fused():
    """Two products of ONNX Runtime's own operators in a row, the second with a constant that a node makes."""
    nodes = [node("MatMul", ["x", "w"], ["a"], name="first"),
             node("FusedMatMul", ["a", "v"], ["b"], name="one", domain="com.microsoft", alpha=0.5),
             node("Constant", [], ["u"], value=numpy_helper.from_array(floats(5, 3))),
             node("FusedMatMul", ["b", "u"], ["c"], name="two", domain="com.microsoft", alpha=2.0),
             node("Relu", ["c"], ["d"]), node("MatMul", ["d", "t"], ["y"], name="last")]  # fmt: skip
    return network(nodes, {"w": floats(4, 6), "v": floats(6, 5), "t": floats(3, 2)}, {"x": ("N", 4)}, {"y": ("N", 2)})


def listing():
    """Nodes without an entry in a row, with a sequence between them that only they see, and two results."""
    nodes = [node("MatMul", ["x", "w"], ["a"], name="first"), node("NonZero", ["a"], ["where"], name="where"),
             node("SequenceConstruct", ["where", "where"], ["list"], name="list"),
             node("SequenceLength", ["list"], ["count"], name="count"),
             node("Unique", ["where"], ["y"], name="distinct")]  # fmt: skip
    outputs = {"y": (INT64, ("M",)), "count": (INT64, ()), "a": ("N", 3)}
    return network(nodes, {"w": floats(4, 3)}, {"x": ("N", 4)}, outputs)


MODELS = {"detector": detector, "warped": warped, "branching": branching, "looping": looping, "fused": fused,
          "listing": listing}  # fmt: skip
KEPT = {"detector": ["NonMaxSuppression"], "warped": ["GridSample"], "branching": ["If"], "looping": ["Loop"],
        "fused": ["com.microsoft::FusedMatMul"], "listing": ["NonZero, SequenceConstruct, SequenceLength, Unique"]}  # fmt: skip


def islands_of(model):
    return [layer for layer in model.layers if isinstance(layer, OnnxIsland)]


def random_inputs(message, samples):
    runner = OnnxRunner(message.SerializeToString())
    inputs = [floats(*(samples if n < 0 else n for n in spec.shape)) for spec in runner.inputs]
    return inputs, runner.run(*inputs)


def packed(arrays):
    return arrays[0] if len(arrays) == 1 else arrays


def assert_same(found, expected):
    for a, b in zip(keras.tree.flatten(found), expected, strict=True):
        a = keras.ops.convert_to_numpy(a)
        assert a.shape == b.shape
        assert a.dtype == b.dtype or (JAX and (a.dtype, b.dtype) == ("int32", "int64"))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
