"""Whole ONNX models: layouts, names, sharing, training, pruning, export; damaged and hostile files."""

import keras
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper, save_model

import dwindle as dw
from dwindle.cli import main
from dwindle.errors import ConfigError, UnsupportedModelError, VerificationError
from dwindle.lifting.onnx.reading import lift_onnx
from dwindle.measuring.onnx_runtime import OnnxRunner

RNG = np.random.default_rng(1)


def floats(*shape):
    return (0.3 * RNG.normal(size=shape)).astype(np.float32)


def convolutional():
    """A network as PyTorch exports them: channels first, a residual sum, squeeze and excite, a flatten, a classifier."""
    constants = {
        "w0": floats(8, 3, 3, 3), "b0": floats(8), "w1": floats(8, 1, 3, 3), "g": floats(8) + 1, "bn": floats(8),
        "m": floats(8), "v": np.abs(floats(8)) + 0.5, "s0": floats(4, 8, 1, 1), "s1": floats(8, 4, 1, 1),
        "w2": floats(10, 8 * 4 * 4), "b2": floats(10), "flat": np.array([0, -1]), "axes": np.array([2, 3]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], name="/stem/Conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"], name="/stem/Relu"),
        helper.make_node("Conv", ["b", "w1"], ["c"], name="/block/Conv", pads=[1, 1, 1, 1], group=8),
        helper.make_node("BatchNormalization", ["c", "g", "bn", "m", "v"], ["d"], name="/block/BatchNorm"),
        helper.make_node("ReduceMean", ["d", "axes"], ["e"], name="/se/Mean", keepdims=1),
        helper.make_node("Conv", ["e", "s0"], ["f"], name="/se/Conv"),
        helper.make_node("Relu", ["f"], ["h"], name="/se/Relu"),
        helper.make_node("Conv", ["h", "s1"], ["i"], name="/se/Conv_1"),
        helper.make_node("Sigmoid", ["i"], ["j"], name="/se/Sigmoid"),
        helper.make_node("Mul", ["d", "j"], ["k"], name="/se/Mul"),
        helper.make_node("Add", ["b", "k"], ["l"], name="/block/Add"),
        helper.make_node("MaxPool", ["l"], ["n"], name="/pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["n", "flat"], ["o"], name="/flatten"),
        helper.make_node("Gemm", ["o", "w2", "b2"], ["y"], name="/head/Gemm", transB=1),
    ]
    return graph_of(nodes, constants, {"x": ("N", 3, 16, 16)}, {"y": ("N", 10)})


def transformer():
    """A block of attention as it is exported: positions, three projections, heads, GELU written out."""
    constants = {
        "table": floats(50, 8), "pos": floats(6, 8), "q": floats(8, 8), "qb": floats(8), "k": floats(8, 8), "v": floats(8, 8),
        "heads": np.array([0, 0, 2, 4]), "back": np.array([0, 0, 8]), "root": np.float32(0.5), "g": floats(8), "b": floats(8),
        "u": floats(8, 16), "d": floats(16, 8), "s2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
        "zero": np.array(0),
    }  # fmt: skip
    node = helper.make_node
    nodes = [node("Gather", ["ids", "table"][::-1], ["t"]), node("Add", ["t", "pos"], ["x"], name="positions")]
    for name in "qkv":
        nodes.append(node("MatMul", ["x", name], [f"{name}0"], name=f"project_{name}"))
    nodes += [node("Add", ["qb", "q0"], ["q1"]), node("Reshape", ["q1", "heads"], ["q2"]),
              node("Transpose", ["q2"], ["q3"], perm=[0, 2, 1, 3]), node("Reshape", ["k0", "heads"], ["k2"]),
              node("Transpose", ["k2"], ["k4"], perm=[0, 2, 3, 1]),
              node("Mul", ["k4", "one"], ["k3"]), node("Reshape", ["v0", "heads"], ["v2"]),
              node("Transpose", ["v2"], ["v3"], perm=[0, 2, 1, 3]), node("MatMul", ["q3", "k3"], ["s0"]),
              node("Mul", ["s0", "root"], ["s1"]), node("Softmax", ["s1"], ["p"], axis=-1),
              node("MatMul", ["p", "v3"], ["o0"]), node("Transpose", ["o0"], ["o1"], perm=[0, 2, 1, 3]),
              node("Reshape", ["o1", "back"], ["o2"]), node("Add", ["o2", "x"], ["r"]),
              node("LayerNormalization", ["r", "g", "b"], ["n"]), node("MatMul", ["n", "u"], ["m0"]),
              node("Div", ["m0", "s2"], ["m1"]), node("Erf", ["m1"], ["m2"]), node("Add", ["m2", "one"], ["m3"]),
              node("Mul", ["m0", "m3"], ["m4"]), node("Mul", ["m4", "half"], ["m5"], name="gelu"),
              node("MatMul", ["m5", "d"], ["z"]), node("Gather", ["z", "zero"], ["y"], axis=1)]  # fmt: skip
    return graph_of(nodes, constants, {"ids": ("N", 6)}, {"y": ("N", 8)}, kind=TensorProto.INT64)


def graph_of(nodes, constants, inputs, outputs, kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(message, *inputs):
    return OnnxRunner(message.SerializeToString()).run(*inputs)[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "net.onnx"
    save_model(convolutional(), file)
    return file


def test_a_network_with_channels_first(path):
    x = RNG.random((3, 3, 16, 16)).astype(np.float32)
    expected = OnnxRunner(path).run(x)[0]
    model = dw.load(path)
    assert model.input_shape == (None, 3, 16, 16)
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    assert model.notes[0].startswith("agrees with ONNX Runtime")
    # The input comes in channels first: one transpose, and none inside.
    assert model.notes[1] == "1 transpose left, of 0 in the file"
    last = dw.load(path, layout="channels_last")
    assert last.input_shape == (None, 16, 16, 3)
    np.testing.assert_allclose(last(x.transpose(0, 2, 3, 1)), expected, atol=1e-5)
    assert len(last.notes) == 1
    kinds = [type(layer).__name__ for layer in last.layers]
    assert kinds.count("Conv2D") == 3
    assert kinds.count("DepthwiseConv2D") == kinds.count("BatchNormalization") == kinds.count("Dense") == 1
    assert "stem_Conv" in [layer.name for layer in last.layers]


def test_it_trains_prunes_and_exports(path, tmp_path):
    model = dw.load(path, layout="channels_last")
    x = RNG.random((64, 16, 16, 3)).astype(np.float32)
    y = RNG.integers(0, 10, 64)
    slim = dw.prune(model, 0.5, structure="channel")
    assert slim.count_params() < 0.7 * model.count_params()
    slim.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = slim.evaluate(x, y, verbose=0)
    slim.fit(x, y, epochs=5, verbose=0)
    assert slim.evaluate(x, y, verbose=0) < before
    for scheme in ("float32", "int8"):
        assert dw.export(slim, tmp_path / "net.tflite", scheme, x).verification.passed
    slim.save(tmp_path / "net.keras")
    again = dw.load(tmp_path / "net.keras")
    np.testing.assert_allclose(again(x), slim(x), atol=1e-6)


def test_attention(tmp_path):
    message = transformer()
    ids = RNG.integers(0, 50, (4, 6))
    model = dw.load(message)
    np.testing.assert_allclose(model(ids), run(message, ids), atol=1e-5)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds.count("Dense") == 5
    assert kinds.count("Embedding") == kinds.count("LayerNormalization") == 1
    assert model.get_layer("gelu").activation is keras.activations.gelu
    # What is added behind a product becomes its bias, and the heads need their three transposes and no others.
    assert model.get_layer("project_q").use_bias
    assert "transposes left, of 4 in the file" in model.notes[1]
    assert dw.export(model, tmp_path / "m.tflite").verification.passed
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(dw.load(tmp_path / "m.keras")(ids), model(ids))


def test_samples_and_positions_on_one_axis():
    node = helper.make_node
    nodes = [node("Transpose", ["x"], ["a"], perm=[1, 0, 2]), node("Reshape", ["a", "flat"], ["b"]),
             node("MatMul", ["b", "w"], ["c"]), node("Tanh", ["c"], ["d"]), node("Reshape", ["d", "back"], ["e"]),
             node("Transpose", ["e"], ["y"], perm=[1, 0, 2])]  # fmt: skip
    constants = {"flat": np.array([-1, 8]), "w": floats(8, 4), "back": np.array([6, -1, 4])}
    message = graph_of(nodes, constants, {"x": ("N", 6, 8)}, {"y": ("N", 6, 4)})
    x = floats(3, 6, 8)
    model = dw.load(message)
    assert model.output_shape == (None, 6, 4)
    np.testing.assert_allclose(model(x), run(message, x), atol=1e-5)


def test_three_axes_are_turned_where_they_have_channels():
    sound = graph_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": floats(4, 2, 3)}, {"x": ("N", 2, 9)},
                     {"y": ("N", 4, 7)})  # fmt: skip
    steps = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": floats(9, 4)}, {"x": ("N", 2, 9)},
                     {"y": ("N", 2, 4)})  # fmt: skip
    assert dw.load(sound, layout="channels_last").input_shape == (None, 9, 2)
    assert dw.load(steps, layout="channels_last").input_shape == (None, 2, 9)


@pytest.mark.parametrize("split", [np.array(3), np.array([3, 3, 2])])
def test_sequences_of_parts(split):
    node = helper.make_node
    nodes = [node("SplitToSequence", ["x", "split"], ["s"], axis=1), node("SequenceAt", ["s", "last"], ["a"]),
             node("SequenceAt", ["s", "first"], ["b"]), node("Concat", ["a", "b"], ["y"], axis=1)]  # fmt: skip
    constants = {"split": split, "last": np.array(-1), "first": np.array(0)}
    message = graph_of(nodes, constants, {"x": ("N", 8)}, {"y": ("N", 5)})
    x = floats(3, 8)
    np.testing.assert_array_equal(dw.load(message)(x), run(message, x))


def test_one_kernel_with_two_sums_behind_it():
    node = helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["c"]), node("MatMul", ["c", "w"], ["d"]),
             node("Add", ["d", "e"], ["f"]), node("MatMul", ["f", "w"], ["g"]), node("Add", ["g", "e"], ["y"])]  # fmt: skip
    message = graph_of(nodes, {"w": floats(6, 6), "b": floats(6), "e": floats(6)}, {"x": ("N", 6)}, {"y": ("N", 6)})
    model = dw.load(message)
    x = floats(3, 6)
    np.testing.assert_allclose(model(x), run(message, x), atol=1e-5)
    assert sum(isinstance(layer, keras.layers.Dense) for layer in model.layers) == 2  # the last two are one


def test_a_graph_for_one_sample_only():
    # The sum goes into the product's bias in the first attempt, which fails at the reshape; the second starts afresh.
    node = helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["a"], name="product"), node("Add", ["a", "b"], ["c"]),
             node("Gather", ["c", "first"], ["d"], axis=0), node("Relu", ["d"], ["y"])]  # fmt: skip
    message = graph_of(nodes, {"w": floats(6, 4), "b": floats(4), "first": np.array(0)}, {"x": (1, 6)}, {"y": (4,)})
    model = dw.load(message)
    x = floats(1, 6)
    np.testing.assert_allclose(model(x), run(message, x), atol=1e-6)
    assert model.input_shape == (1, 6)
    assert model.get_layer("product").use_bias
    assert "takes one sample at a time" in model.notes[-1]


def test_names_that_look_like_counted_ones():
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[0, 0, 1, 1], strides=[2, 2]),
             helper.make_node("Conv", ["a", "w"], ["y"], name="conv_1", pads=[0, 0, 1, 1], strides=[2, 2])]  # fmt: skip
    message = graph_of(nodes, {"w": floats(3, 3, 3, 3)}, {"x": ("N", 3, 9, 9)}, {"y": ("N", 3, 2, 2)})
    names = [layer.name for layer in dw.load(message).layers]
    assert len(set(names)) == len(names)


def test_lengths_that_stay_open(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), helper.make_node("Shape", ["a"], ["s"]),
             helper.make_node("Relu", ["a"], ["y"])]  # fmt: skip
    message = graph_of(nodes, {"w": floats(4, 3, 3, 3)}, {"x": ("N", 3, "H", "W")}, {"y": ("N", 4, "H", "W")})
    assert dw.load(message).input_shape == (None, 3, None, None)
    assert dw.load(message, inputs=(None, 3, 8, 9)).output_shape == (None, 4, 8, 9)
    assert dw.load(message, inputs={"x": (2, 3, 8, 9)}).input_shape == (2, 3, 8, 9)
    with pytest.raises(ConfigError, match="the model has no input `z`; it has `x`"):
        dw.load(message, inputs={"z": (1, 3, 8, 9)})
    with pytest.raises(ConfigError, match="does not fit it"):
        dw.load(message, inputs={"x": (1, 4, 8, 9)})


def test_a_wrong_entry_is_named(path, monkeypatch):
    from dwindle.lifting.onnx.operators import OPERATORS

    def wrong(context, node, inputs):
        return context.value(keras.ops.tanh(inputs[0].tensor), inputs[0].axes)

    monkeypatch.setitem(OPERATORS, "Sigmoid", wrong)
    with pytest.raises(VerificationError, match=r"they part at Sigmoid `/se/Sigmoid`"):
        dw.load(path)


def damaged(change):
    message = convolutional()
    change(message)
    return message


def cycle(message):
    message.graph.node[1].input[0] = "l"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (cycle, "the graph has a cycle"),
        (lambda m: m.graph.node[1].input.__setitem__(0, "nowhere"), "`nowhere` is read but never made"),
        (lambda m: m.graph.node[1].output.__setitem__(0, "a"), "`a` is made twice"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234"), "has 4 bytes where its shape"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**40), "which is none"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 77), "type number 77"),
        (lambda m: m.graph.ClearField("input"), "is read but never made"),
    ],
)
def test_damaged_graphs(change, text):
    with pytest.raises(UnsupportedModelError, match=text):
        lift_onnx(damaged(change))


def test_files_that_are_none(tmp_path, path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "noise.onnx").write_bytes(RNG.bytes(500))
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:700])
    for name in ("empty", "noise", "cut"):
        with pytest.raises(UnsupportedModelError, match=r"damaged|is no ONNX file"):
            dw.load(tmp_path / f"{name}.onnx")


def test_external_data_stays_in_its_folder(tmp_path):
    message = convolutional()
    whole = ModelProto()
    whole.CopyFrom(message)
    save_model(message, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    x = RNG.random((2, 3, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(dw.load(tmp_path / "net.onnx")(x), run(whole, x), atol=1e-5)
    (tmp_path / "in").mkdir()
    outside = convolutional()
    for tensor in outside.graph.initializer:
        external_data_helper.set_external_data(tensor, "../net.data")
        tensor.ClearField("raw_data")
    (tmp_path / "in" / "net.onnx").write_bytes(outside.SerializeToString())
    with pytest.raises(UnsupportedModelError, match="outside the model's folder; it is not read"):
        dw.load(tmp_path / "in" / "net.onnx")
    (tmp_path / "net.data").unlink()
    with pytest.raises(UnsupportedModelError, match="does not exist; put it next to the model"):
        dw.load(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("kind", "constants"),
    [
        ("ConstantOfShape", [np.array([2**20, 2**20])]),
        ("Add", [np.zeros((2**16, 1), np.float32), np.zeros((1, 2**16), np.float32)]),
        ("MatMul", [np.zeros((2**16, 1), np.float32), np.zeros((1, 2**16), np.float32)]),
        ("Tile", [np.zeros(8, np.float32), np.array([2**40])]),
        ("Range", [np.array(0), np.array(2**40), np.array(1)]),
    ],
)
def test_constants_that_would_fill_the_memory(kind, constants):
    names = [f"c{k}" for k in range(len(constants))]
    nodes = [helper.make_node(kind, names, ["big"]), helper.make_node("Add", ["x", "big"], ["y"])]
    message = graph_of(nodes, dict(zip(names, constants, strict=True)), {"x": ("N", 1)}, {"y": ("N", 1)})
    with pytest.raises(UnsupportedModelError, match=r"would make a constant of \d+ entries; the largest is 268435456"):
        lift_onnx(message)


def test_what_runs_as_long_as_the_file_says_is_not_run():
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )  # fmt: skip
    nodes = [helper.make_node("Loop", ["n", "go0"], [], name="forever", body=body)]
    nodes[0].output.append("never")
    nodes.append(helper.make_node("Add", ["x", "never"], ["y"]))
    message = graph_of(nodes, {"n": np.array(2**62), "go0": np.array(True)}, {"x": ("N", 1)}, {"y": ("N", 1)})
    with pytest.raises(UnsupportedModelError, match="Loop `forever` is not computed while a file is read"):
        lift_onnx(message)


@pytest.mark.usefixtures("without_onnxruntime")
def test_without_onnx_runtime(path):
    assert "which is not installed (pip install 'dwindle[onnx]')" in dw.load(path).notes[0]


def test_measured_compared_and_inspected(path, tmp_path, capsys):
    x = RNG.random((40, 16, 16, 3)).astype(np.float32)
    y = OnnxRunner(path).run(x.transpose(0, 3, 1, 2))[0].argmax(1)
    found = dw.measure(path, (x, y))
    assert found.accuracy == 1.0
    assert found.size_bytes == path.stat().st_size
    assert found.ram_source == "onnxruntime-resident"
    assert 0 < found.latency.p50_ms < 1000
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert main(["convert", str(path), str(tmp_path / "m.tflite"), "--layout", "channels_last"]) == 0
    assert "agrees with ONNX Runtime" in capsys.readouterr().out
    assert main(["compare", str(path), str(tmp_path / "m.tflite"), "--data", str(tmp_path / "d.npz"), "--json"]) == 0
    assert '"same_class": 1.0' in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "/stem/Conv" in out
    assert "BatchNormalization" in out


def test_shapes_on_the_command_line(tmp_path, capsys):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    message = graph_of(nodes, {"w": floats(4, 3, 3, 3)}, {"x": ("N", 3, "H", "W")}, {"y": ("N", 4, "H", "W")})
    save_model(message, tmp_path / "a.onnx")
    out = str(tmp_path / "m.tflite")
    assert main(["convert", str(tmp_path / "a.onnx"), out, "--input", "x=?,3,8,9"]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "a.onnx"), out, "--force", "--input", "x=1,3,eight,9"]) == 2
    assert "`--input` is 'x=1,3,eight,9'; it must be NAME=LENGTH,LENGTH,..." in capsys.readouterr().err


def test_a_message_stays_as_it_was_and_a_file_is_kept_without_its_constants(tmp_path):
    from dwindle.lifting.onnx.graph import read_graph

    message = convolutional()
    before = message.SerializeToString(deterministic=True)
    model = lift_onnx(message)
    assert message.SerializeToString(deterministic=True) == before
    save_model(message, tmp_path / "net.onnx")
    graph = read_graph(tmp_path / "net.onnx")
    assert all(not tensor.raw_data for tensor in graph.message.graph.initializer)
    assert [node.proto.name for node in graph.nodes] == [node.name for node in message.graph.node]
    np.testing.assert_array_equal(graph.constants["w2"], read_graph(message).constants["w2"])
    x = floats(3, 3, 16, 16)
    again = dw.load(tmp_path / "net.onnx")
    np.testing.assert_array_equal(model.predict(x, verbose=0), again.predict(x, verbose=0))
