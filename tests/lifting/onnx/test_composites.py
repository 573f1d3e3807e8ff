"""Functions that a file writes out in several nodes become one."""

import keras
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.lifting.onnx.reading import lift_onnx
from dwindle.measuring.onnx_runtime import OnnxRunner

node = helper.make_node


def message_of(nodes, shape, given, constants):
    """Return a model from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", *shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", *given))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


NUMBERS = {
    "one": np.float32(1), "half": np.float32(0.5), "k": np.float32(0.044715), "c": np.float32((2 / np.pi) ** 0.5),
    "three": np.float32(3), "two": np.float32(2),
}  # fmt: skip
GELU = {
    "cubed by products": [
        node("Mul", ["k", "x"], ["a"]), node("Mul", ["x", "a"], ["b"]), node("Mul", ["x", "b"], ["d"]),
        node("Add", ["x", "d"], ["e"]), node("Mul", ["c", "e"], ["f"]), node("Tanh", ["f"], ["t"]),
        node("Add", ["one", "t"], ["u"]), node("Mul", ["half", "u"], ["v"]), node("Mul", ["x", "v"], ["y"]),
    ],
    "a power": [
        node("Pow", ["x", "three"], ["a"]), node("Mul", ["a", "k"], ["b"]), node("Add", ["b", "x"], ["e"]),
        node("Mul", ["e", "c"], ["f"]), node("Tanh", ["f"], ["t"]), node("Add", ["t", "one"], ["u"]),
        node("Mul", ["x", "half"], ["h"]), node("Mul", ["h", "u"], ["y"]),
    ],
    "factored": [
        node("Mul", ["x", "x"], ["a"]), node("Mul", ["a", "k"], ["b"]), node("Add", ["b", "one"], ["d"]),
        node("Mul", ["x", "c"], ["e"]), node("Mul", ["d", "e"], ["f"]), node("Tanh", ["f"], ["t"]),
        node("Add", ["t", "one"], ["u"]), node("Mul", ["u", "x"], ["h"]), node("Mul", ["h", "half"], ["y"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("spelling", GELU)
def test_gelu_by_tanh_is_one_operator(spelling):
    message = message_of(GELU[spelling], (6,), (6,), NUMBERS)
    model = lift_onnx(message)
    x = np.linspace(-6, 6, 60, dtype=np.float32).reshape(10, 6)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    assert [operation.name for operation in read_graph(float_file(model)).operations] == ["GELU"]


@pytest.mark.parametrize("change", ["k", "one"])
def test_what_is_no_gelu_stays_as_it_is(change):
    numbers = {**NUMBERS, change: np.float32(1.5)}
    message = message_of(GELU["cubed by products"], (6,), (6,), numbers)
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(2, 6)
    (expected,) = OnnxRunner(message.SerializeToString()).run(x)
    np.testing.assert_allclose(lift_onnx(message).predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)


def test_softmax_is_recognized_by_what_learns_from_it():
    constants = {
        "w": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), "axis": np.array([1]),
        "least": np.float32(-np.inf), "column": np.array([-1, 1]), "wide": np.array([1, 4]),
    }  # fmt: skip
    nodes = [
        node("MatMul", ["x", "w"], ["z"]), node("ReduceMax", ["z", "axis"], ["m"], keepdims=0),
        node("Max", ["least", "m"], ["n"]), node("Reshape", ["n", "column"], ["o"]), node("Expand", ["o", "wide"], ["p"]),
        node("Sub", ["z", "p"], ["q"]), node("Exp", ["q"], ["e"]), node("ReduceSum", ["e", "axis"], ["s"], keepdims=0),
        node("Reshape", ["s", "column"], ["r"]), node("Expand", ["r", "wide"], ["t"]), node("Div", ["e", "t"], ["y"]),
    ]  # fmt: skip
    teacher = lift_onnx(message_of(nodes, (6,), (4,), constants))
    x = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)
    z = x @ constants["w"]
    expected = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(teacher.predict(x, verbose=0), expected, atol=1e-6)
    student = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, activation="softmax")])
    student.layers[0].set_weights([constants["w"], np.zeros(4, np.float32)])
    coach = dw.distill(student, teacher)
    coach.compile(keras.optimizers.SGD(0.0))
    (loss,) = coach.fit(x, verbose=0).history["loss"]
    assert loss < 1e-6  # the same logits: a teacher's softmax is not taken for logits


def softmax_nodes(*spreading, keepdims=0):
    """Return the nodes of softmax over axis 1, with nodes from the sum ``s`` to the divisor ``t``."""
    return [
        node("ReduceMax", ["x", "axis"], ["m"]), node("Sub", ["x", "m"], ["q"]), node("Exp", ["q"], ["e"]),
        node("ReduceSum", ["e", "axis"], ["s"], keepdims=keepdims), *spreading, node("Div", ["e", "t"], ["y"]),
    ]  # fmt: skip


AXES = {"axis": np.array([1]), "first": np.array([0]), "row": np.array([1, -1]), "column": np.array([-1, 1])}
COMPUTED = [node("Shape", ["x"], ["shape"]), node("Slice", ["shape", "first", "axis"], ["count"]),
            node("Concat", ["count", "axis"], ["computed"], axis=0), node("Reshape", ["s", "computed"], ["t"])]  # fmt: skip


@pytest.mark.parametrize(("spreading", "keepdims"), [
    ([node("Unsqueeze", ["s", "axis"], ["t"])], 0), ([node("Reshape", ["s", "column"], ["t"])], 0), (COMPUTED, 0),
    ([node("Reshape", ["s", "column"], ["t"])], 1), ([node("Identity", ["s"], ["t"])], 1),
])  # fmt: skip
def test_softmax_with_its_sum_back_at_its_axis(spreading, keepdims):
    model = lift_onnx(message_of(softmax_nodes(*spreading, keepdims=keepdims), (5,), (5,), AXES))
    assert [layer.activation.__name__ for layer in model.layers if hasattr(layer, "activation")] == ["softmax"]


@pytest.mark.parametrize(("spreading", "keepdims"), [
    (node("Identity", ["s"], ["t"]), 0), (node("Unsqueeze", ["s", "first"], ["t"]), 0),
    (node("Reshape", ["s", "row"], ["t"]), 0), (node("Reshape", ["s", "row"], ["t"]), 1),
])  # fmt: skip
def test_a_quotient_by_the_sum_of_another_row_is_no_softmax(spreading, keepdims):
    message = message_of(softmax_nodes(spreading, keepdims=keepdims), (2,), (2,), AXES)
    x = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
    e = np.exp(x - x.max(1, keepdims=True))
    found = lift_onnx(message, inputs=(2, 2)).predict(x, verbose=0, batch_size=2)
    np.testing.assert_allclose(found, e / e.sum(1), rtol=1e-5)


def variance_nodes(mean):
    """Return the nodes of ``mean(x^2) - mean(x)^2`` over the last axis, a mean by one operator or by a sum."""
    nodes = [node("Mul", ["x", "x"], ["a"])]
    for given, made in (("a", "b"), ("x", "m")):
        if mean == "ReduceMean":
            nodes.append(node("ReduceMean", [given, "axis"], [made], keepdims=0))
        else:
            nodes += [
                node("ReduceSum", [given, "axis"], [made + "0"], keepdims=0),
                node("Mul", [made + "0", "c"], [made]),
            ]
    return [*nodes, node("Mul", ["m", "m"], ["s"]), node("Sub", ["b", "s"], ["y"])]


@pytest.mark.parametrize("mean", ["ReduceMean", "ReduceSum"])
def test_a_variance_is_not_a_difference_of_large_numbers(mean):
    message = message_of(variance_nodes(mean), (3, 64), (3,), {"axis": np.array([2]), "c": np.float32(1 / 64)})
    model = lift_onnx(message)
    x = (1000 + np.random.default_rng(0).normal(0, 0.1, (4, 3, 64))).astype(np.float32)
    expected = x.astype(np.float64).var(axis=-1)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-3)
    (written,) = OnnxRunner(message.SerializeToString()).run(x)
    assert np.abs(written - expected).max() > 0.1 * expected.max()  # what the difference makes of it


def test_a_sum_times_another_number_is_no_variance():
    message = message_of(variance_nodes("ReduceSum"), (3, 64), (3,), {"axis": np.array([2]), "c": np.float32(1 / 60)})
    x = np.random.default_rng(0).normal(1, 1, (4, 3, 64)).astype(np.float32)
    (expected,) = OnnxRunner(message.SerializeToString()).run(x)
    np.testing.assert_allclose(lift_onnx(message).predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nodes", [
    softmax_nodes(node("Identity", ["s"], ["t"]), keepdims=1), GELU["a power"], variance_nodes("ReduceMean")
], ids=["softmax", "gelu", "variance"])  # fmt: skip
def test_functions_of_constants_are_computed(nodes):
    # As the weights of a fusion are, which are learnt before softmax.
    names = {"x": "given", "y": "made"}
    inner = [node(n.op_type, [names.get(i, i) for i in n.input], [names.get(o, o) for o in n.output], **{a.name: helper.get_attribute_value(a) for a in n.attribute})
             for n in nodes]  # fmt: skip
    constants = {**NUMBERS, "axis": np.array([1]), "given": np.linspace(-1, 1, 3, dtype=np.float32)[None]}
    message = message_of([*inner, node("Mul", ["x", "made"], ["y"])], (3,), (3,), constants)
    x = np.ones((1, 3), np.float32)
    (expected,) = OnnxRunner(message.SerializeToString()).run(x)
    np.testing.assert_allclose(lift_onnx(message).predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
