"""Nodes without an entry stay as they are: against ONNX Runtime on the whole file, and what each verb does with them."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import keras
import numpy as np
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from onnx_island_models import (
    FLOAT,
    INT64,
    JAX,
    KEPT,
    MODELS,
    RNG,
    assert_same,
    detector,
    floats,
    fused,
    graph,
    islands_of,
    looping,
    network,
    node,
    packed,
    random_inputs,
    same_numbers,  # noqa: F401
    warped,
)  # fmt: skip

import dwindle as dw
from dwindle.errors import UnsupportedModelError, VerificationError
from dwindle.lifting.onnx.cutting import checked, cut_out
from dwindle.lifting.onnx.islands import OnnxIsland
from dwindle.lifting.onnx.operators import OPERATORS
from dwindle.measuring.onnx_runtime import OnnxRunner


@pytest.mark.parametrize("name", MODELS)
def test_it_gives_what_onnx_runtime_gives(name, tmp_path):
    message = MODELS[name]()
    model = dw.load(message)
    assert model.notes[0].startswith("agrees with ONNX Runtime: ")
    assert sorted(layer.operator for layer in islands_of(model)) == sorted(KEPT[name])
    for layer in islands_of(model):
        said = f"stays as in the file, in ONNX Runtime and without a gradient: `{layer.name}` ({layer.operator})"
        assert any(note.startswith(said) and "no entry in the table of ONNX operators" in note for note in model.notes)
    model.save(tmp_path / "m.keras")
    again = dw.load(tmp_path / "m.keras")
    for sign in (1, -1):  # a branch by the data goes both ways
        inputs, _ = random_inputs(message, 4)
        inputs = [sign * np.abs(x) for x in inputs]
        expected = OnnxRunner(message.SerializeToString()).run(*inputs)
        assert_same(model(packed(inputs)), expected)
        assert_same(model.predict_on_batch(packed(inputs)), expected)  # compiled, where the backend can
        assert_same(again(packed(inputs)), expected)


@pytest.mark.skipif(not JAX, reason="only JAX needs to know how long results are")
def test_compiled_by_jax():
    import jax

    message = fused()
    (x,), expected = random_inputs(message, 3)
    model = dw.load(message)
    assert_same(jax.jit(lambda x: model(x))(x), expected)
    model = dw.load(detector())
    with pytest.raises(UnsupportedModelError, match="as long as its data says, which JAX can't compile"):
        jax.jit(lambda x: model(x))(floats(2, 3, 32, 32))


def test_another_process_reads_it(tmp_path):
    model = dw.load(fused())
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", floats(3, 4))
    code = (
        "import sys, numpy as np, dwindle as dw; folder = sys.argv[1]; "
        "np.save(folder + '/y.npy', np.asarray(dw.load(folder + '/m.keras')(np.load(folder + '/x.npy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = keras.ops.convert_to_numpy(model(np.load(tmp_path / "x.npy")))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), found, atol=1e-6)


def test_what_would_not_be_read_again_is_said(monkeypatch):
    # Two matrices, each of them small enough; the config holds both as text.
    nodes = [node("FusedMatMul", ["x", "v"], ["a"], name="one", domain="com.microsoft"), node("Relu", ["a"], ["b"]),
             node("FusedMatMul", ["b", "v"], ["y"], name="two", domain="com.microsoft")]  # fmt: skip
    message = network(nodes, {"v": floats(50, 50)}, {"x": ("N", 50)}, {"y": ("N", 50)})
    said = "a .keras could not be read: with what stays as in the file, its config would have "
    assert not any(note.startswith(said) for note in dw.load(message).notes)
    monkeypatch.setattr("dwindle.lifting.onnx.reading.LARGEST_CONFIG_BYTES", 20_000)
    model = dw.load(message)
    assert max(len(layer.file) for layer in islands_of(model)) < 20_000
    assert any(note.startswith(said) for note in model.notes)


def test_the_loop_gets_the_number_of_samples():
    message = looping()
    model = dw.load(message)
    (loop,) = islands_of(model)
    assert [found.op_type for found in checked(loop.content).graph.node].count("Loop") == 1
    for samples in (1, 2, 5):
        inputs, expected = random_inputs(message, samples)
        assert_same(model(inputs[0]), expected)


def test_lengths_that_follow_the_inputs():
    (warp,) = islands_of(dw.load(warped()))
    assert warp.given == [["batch", 6, 8, 8], ["batch", 5, 5, 2]]
    assert warp.shapes == [["batch", 6, 5, 5]]
    assert warp.compute_output_shape([(7, 6, 8, 8), (7, 5, 5, 2)]) == (7, 6, 5, 5)
    (nms,) = islands_of(dw.load(detector()))
    assert nms.shapes == [[None, 3]]
    assert nms.dtypes == ["int64"]


def test_no_box_is_left():
    message = detector()
    (head,) = (value for value in message.graph.initializer if value.name == "w3")
    head.CopyFrom(numpy_helper.from_array(np.zeros((2, 12, 1, 1), np.float32), "w3"))  # all scores are 0.5
    (least,) = (value for value in message.graph.initializer if value.name == "least")
    least.CopyFrom(numpy_helper.from_array(np.float32(0.6), "least"))
    boxes, scores = dw.load(message)(floats(2, 3, 32, 32))
    assert float(keras.ops.max(scores)) == 0.5
    assert boxes.shape == (0, 3)


def test_the_rest_trains(tmp_path):
    message = fused()
    model = dw.load(message)
    (island,) = islands_of(model)
    x, y = floats(16, 4), floats(16, 2)
    before = {v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_variables}
    frozen = island.file
    model.compile("sgd", "mse")
    silent = keras.backend.backend() != "tensorflow"
    with nullcontext() if silent else pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        model.fit(x, y, batch_size=16, epochs=1, verbose=0)
    moved = {v.path.split("/")[0] for v in model.trainable_variables
             if not np.array_equal(before[v.path], keras.ops.convert_to_numpy(v))}  # fmt: skip
    # No gradient passes the island, so that what lies behind it is trained, and what lies before it is not.
    assert moved == {"last"}
    assert island.file == frozen
    assert island.trainable_variables == []
    expected = keras.ops.convert_to_numpy(model(x))
    model.save(tmp_path / "trained.keras")
    np.testing.assert_array_equal(dw.load(tmp_path / "trained.keras")(x), expected)


def test_channels_next_to_it_stay():
    model = dw.load(warped(), layout="channels_last")
    slim = dw.prune(model, 0.5, structure="channel")
    shapes = {name: slim.get_layer(name).kernel.shape for name in ("before", "after", "last")}
    # The sampler was made for 6 channels; those behind the next convolution are nobody's but its own.
    assert shapes["before"] == (1, 1, 3, 6)
    assert shapes["after"][2] == 6
    assert shapes["after"][3] < 8
    assert shapes["last"][2] == shapes["after"][3]
    x, grid = floats(2, 8, 8, 3), floats(2, 5, 2, 5)
    assert slim([x, grid]).shape == (2, 5, 5, 4)
    slim = dw.prune(dw.load(detector()), 0.5, structure="channel")
    assert tuple(slim.get_layer("neck").kernel.shape) == (1, 1, 4, 6)
    assert slim.get_layer("boxes").kernel.shape[3] == 4
    assert slim.get_layer("scores").kernel.shape[3] == 2


def test_a_narrower_twin_keeps_its_channels():
    model = dw.load(warped(), layout="channels_last")
    twin = dw.shrink(model, 0.5)
    assert twin.get_layer("before").filters == 6
    assert twin.get_layer("after").filters == 4
    assert twin([floats(2, 8, 8, 3), floats(2, 5, 2, 5)]).shape == (2, 5, 5, 4)
    (warp,) = islands_of(model)
    with pytest.raises(UnsupportedModelError, match=(
        r"`warp` \(GridSample\) takes tensors of shape \('batch', 6, 8, 8\), as in its file; this one has \(2, 3, 8, 8\)"
    )):  # fmt: skip
        warp([floats(2, 3, 8, 8), floats(2, 5, 5, 2)])


def test_channels_of_one_that_keeps_them_stay():
    # Tried with fewer channels, an island that works on each entry alone would seem to take any number of them.
    nodes = [node("Conv", ["x", "w"], ["a"], name="before"),
             node("BiasGelu", ["a", "c"], ["b"], name="bend", domain="com.microsoft"),
             node("Conv", ["b", "v"], ["d"], name="behind"), node("Conv", ["d", "u"], ["y"], name="last")]  # fmt: skip
    constants = {"w": floats(6, 3, 1, 1), "c": floats(8), "v": floats(8, 6, 1, 1), "u": floats(4, 8, 1, 1)}
    message = network(nodes, constants, {"x": ("N", 3, 8, 8)}, {"y": ("N", 4, 8, 8)})
    model = dw.load(message)
    assert [layer.operator for layer in islands_of(model)] == ["com.microsoft::BiasGelu"]
    slim = dw.prune(model, 0.5, structure="channel")
    assert tuple(slim.get_layer("before").kernel.shape) == (1, 1, 3, 6)
    assert tuple(slim.get_layer("behind").kernel.shape) == (1, 1, 6, 4)
    assert any("`bend` (OnnxIsland) is not known to channel pruning" in note for note in slim.notes)


@pytest.mark.parametrize("verb", [
    lambda model, folder: dw.export(model, folder / "m.tflite"),
    lambda model, _: dw.lift(model),
], ids=["export", "lift"])  # fmt: skip
def test_a_litert_file_can_not_hold_it(verb, tmp_path):
    model = dw.load(fused())
    with pytest.raises(UnsupportedModelError, match=(
        r"`one` \(com.microsoft::FusedMatMul\) has no entry in the table of ONNX operators, so that it stays as in its ONNX "
        r"file, which a .tflite can't hold; convert what lies before it: keras.Model\(model.inputs, model.get_layer\('one'\).input\)"
    )):  # fmt: skip
        verb(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_before_it_is_exported(tmp_path):
    model = dw.load(detector(), layout="channels_last")
    before = keras.Model(model.inputs, model.get_layer("nms").input)
    x = RNG.random((64, 32, 32, 3)).astype(np.float32)
    assert dw.export(before, tmp_path / "m.tflite", "int8", x).verification.passed


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow writes SavedModels")
def test_a_saved_model_can_not_hold_it(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"`one`"):
        dw.export(dw.load(fused()), tmp_path / "folder")


def test_a_use_without_an_entry():
    # The table has TopK, but not with a number that the model computes.
    nodes = [node("MatMul", ["x", "w"], ["a"], name="first"), node("Cast", ["n"], ["k"], to=INT64, name="cast"),
             node("TopK", ["a", "k"], ["y", "places"], name="best")]  # fmt: skip
    message = network(
        nodes, {"w": floats(4, 6)}, {"x": ("N", 4), "n": (1,)}, {"y": ("N", "K"), "places": (INT64, ("N", "K"))}
    )
    model = dw.load(message, inputs={"n": (1,)})
    assert [layer.operator for layer in islands_of(model)] == ["TopK"]
    assert any("`best` (TopK), since it has no entry for this use: TopK `best`" in note for note in model.notes)
    x = floats(3, 4)
    for k in (2, 5):
        given = [x, np.array([k], np.float32)]
        assert_same(model(given), OnnxRunner(message.SerializeToString()).run(*given))


def test_what_an_entry_notes_before_it_fails_is_not_said(monkeypatch):
    def failing(context, node, inputs):
        context.note("is rounded")
        raise UnsupportedModelError("too open")

    monkeypatch.setitem(OPERATORS, "Relu", failing)
    model = dw.load(network([node("Relu", ["x"], ["y"], name="bent")], {}, {"x": ("N", 4)}, {"y": ("N", 4)}))
    assert [layer.name for layer in islands_of(model)] == ["bent"]
    assert "is rounded" not in model.notes


def test_lengths_that_are_too_open_for_an_entry(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="first"), node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        node("Reshape", ["b", "rows"], ["c"], name="rows"), node("Relu", ["c"], ["y"]),
    ]  # fmt: skip
    constants = {"w": floats(6, 3, 1, 1), "rows": np.array([0, 0, -1])}
    message = network(nodes, constants, {"x": ("N", 3, "H", "W")}, {"y": ("N", "H", "M")})
    model = dw.load(message)
    assert [layer.name for layer in islands_of(model)] == ["rows"]
    x = floats(2, 3, 5, 7)
    assert_same(model(x), OnnxRunner(message.SerializeToString()).run(x))
    with pytest.raises(
        UnsupportedModelError, match=r"`rows` \(Reshape\) has no entry for this use: .*fix them with inputs="
    ):
        dw.export(model, tmp_path / "m.tflite")
    assert islands_of(dw.load(message, inputs=(None, 3, 5, 7))) == []


def test_a_branch_for_one_sample_only():
    # Lifted for any number of samples, the model would fail on two: a 1 lies in the shape inside the branches.
    branches = {f"{name}_branch": graph(name, [node("Reshape", ["a", "flat"], ["b"]), node(kind, ["b"], ["o"])], [], ["o"])
                for name, kind in (("then", "Relu"), ("else", "Neg"))}  # fmt: skip
    nodes = [node("Conv", ["x", "w"], ["a"], name="first"), node("ReduceSum", ["x"], ["s"], keepdims=0),
             node("Greater", ["s", "zero"], ["c"]), node("If", ["c"], ["y"], name="choice", **branches)]  # fmt: skip
    constants = {"w": floats(2, 3, 1, 1), "zero": np.float32(0), "flat": np.array([1, 32])}
    message = network(nodes, constants, {"x": (1, 3, 4, 4)}, {"y": (1, 32)})
    model = dw.load(message)
    assert model.input_shape == (1, 3, 4, 4)
    assert model.notes[0].startswith("agrees with ONNX Runtime: ")
    assert model.notes[-1].startswith("takes one sample at a time: If `choice`")
    for x in (floats(1, 3, 4, 4), -floats(1, 3, 4, 4)):
        assert_same(model(x), OnnxRunner(message.SerializeToString()).run(x))


def test_rounding_that_turns_into_another_result():
    # A difference of two that are the same but for rounding; how its entries are ordered is another question.
    nodes = [node("Softmax", ["x"], ["a"], name="one"), node("Exp", ["x"], ["b"]),
             node("ReduceSum", ["b", "last"], ["c"]), node("Div", ["b", "c"], ["p"]), node("Sub", ["a", "p"], ["d"]),
             node("Unique", ["d"], ["same", "y"], name="ordered"), node("Mul", ["y", "three"], ["z"]),
             node("NonZero", ["x"], ["w"])]  # fmt: skip
    outputs = {"y": (INT64, ("M",)), "z": (INT64, ("M",)), "w": (INT64, (2, "K"))}
    message = network(nodes, {"last": np.array([1]), "three": np.array(3)}, {"x": ("N", 256)}, outputs)
    note = dw.load(message).notes[0]
    assert note.startswith("agrees with ONNX Runtime before and behind what stays as in the file: ")
    # So it is where one tensor is all that is compared before and behind.
    message = network(nodes[:6], {"last": np.array([1])}, {"x": ("N", 256)}, {"y": (INT64, ("M",))})
    assert dw.load(message).notes[0] == note


def test_without_onnx_runtime(request):
    message = warped()
    inputs, expected = random_inputs(message, 2)
    request.getfixturevalue("without_onnxruntime")
    model = dw.load(message)
    assert "which is not installed" in model.notes[0]
    assert_same(model(inputs), expected)  # by onnx.reference
    with pytest.raises(UnsupportedModelError, match=r"FusedMatMul `one` .* can't stay as it is either: .*onnxruntime"):
        dw.load(fused())


def test_an_operator_that_no_one_has():
    message = network([node("Foo", ["x"], ["y"], name="mine", domain="my.own")], {}, {"x": ("N", 3)}, {"y": ("N", 3)})
    message.opset_import.append(helper.make_opsetid("my.own", 1))
    with pytest.raises(UnsupportedModelError, match=r"my.own::Foo `mine` has no entry in the table of ONNX operators, and "
                                                    r"can't stay as it is either: ONNX Runtime can't run the file"):  # fmt: skip
        dw.load(message)


def test_a_sequence_that_others_read():
    nodes = [node("SequenceConstruct", ["x", "x"], ["list"], name="list"), node("SequenceAt", ["list", "k"], ["y"])]
    message = network(nodes, {"k": np.array(0)}, {"x": ("N", 3)}, {"y": ("N", 3)})
    with pytest.raises(UnsupportedModelError, match=r"SequenceConstruct `list` .* is a sequence"):
        dw.load(message)


def test_what_draws_random_numbers_is_not_compared():
    message = network([node("RandomNormalLike", ["x"], ["y"], name="noise")], {}, {"x": ("N", 3)}, {"y": ("N", 3)})
    model = dw.load(message)
    assert model.notes[0] == "not compared: RandomNormalLike in `noise` draws random numbers"
    assert model(floats(5, 3)).shape == (5, 3)


def endless(samples, given):
    """Return a loop without an end."""
    body = graph("body", [node("Identity", ["go"], ["on"]), node("Add", ["state", "x"], ["next"])], ["i", "go", "state"],
                 ["on", "next"])  # fmt: skip
    nodes = [node("Loop", ["", "forever", "x"], ["y"], name="loop", body=body)]
    return network(nodes, {"forever": np.array(True)}, {"x": (samples, 3)}, {"y": given})


def test_a_loop_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr("dwindle.lifting.onnx.verifying.LONGEST_S", 0.2)
    assert dw.load(endless("N", ("N", 3))).notes[0] == "not compared: ONNX Runtime was stopped after 0.2 s"


def test_what_comes_after_a_run_that_was_stopped():
    runner = OnnxRunner(endless("N", ("N", 3)).SerializeToString(), limit_s=0.1)
    with pytest.raises(UnsupportedModelError, match=r"was stopped after 0\.1 s"):
        runner.run(floats(2, 3))
    with pytest.raises(UnsupportedModelError, match="can't run the file on these inputs"):
        runner.run(floats(2, 4))
    assert not runner.stopped


@pytest.mark.usefixtures("without_onnxruntime")
def test_a_loop_without_an_end_does_not_run_where_nothing_stops_it():
    model = dw.load(endless(1, (1, 3)))
    assert "can't stay as it is either: Loop runs as long as the file says" in model.notes[-1]
    assert model.input_shape == (1, 3)
    message = endless("N", ("N", 3))
    message.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsupportedModelError, match=r"tells how many axes .*: Loop runs as long as the file says"):
        dw.load(message)


def hostile(change):
    """Return the layer of a file's loop, its own file changed."""
    (layer,) = islands_of(dw.load(looping()))
    message = checked(layer.content)
    body = next(found for found in message.graph.node if found.op_type == "Loop").attribute[0].g
    change(body)
    return layer, message.SerializeToString()


def elsewhere(body):
    body.initializer.append(numpy_helper.from_array(floats(4), "more"))
    external_data_helper.set_external_data(body.initializer[0], "/etc/hostname")
    body.initializer[0].ClearField("raw_data")


def huge(body):
    body.node.append(node("ConstantOfShape", ["big"], ["much"]))
    body.node.insert(0, node("Constant", [], ["big"], value=numpy_helper.from_array(np.array([2**20, 2**20]))))


def cut_short(body):
    body.initializer.append(TensorProto(name="more", data_type=FLOAT, dims=[4], raw_data=b"1234"))


@pytest.mark.parametrize(("change", "text"), [
    (elsewhere, "lies in another file"), (huge, "entries; the largest result of an island"), (cut_short, "has 4 bytes"),
])  # fmt: skip
def test_bodies_are_checked_before_they_run(change, text, tmp_path):
    layer, content = hostile(change)
    with pytest.raises(UnsupportedModelError, match=text):
        checked(content)
    import base64

    layer.file = base64.b64encode(content).decode()
    again = OnnxIsland.from_config(layer.get_config())
    with pytest.raises(UnsupportedModelError, match=text):
        again([floats(2, 4), floats(2, 4)])
    with pytest.raises(UnsupportedModelError, match="no ONNX file"):
        checked(b"noise" * 20)


def alone():
    """A product of ONNX Runtime's own, and nothing else."""
    nodes = [node("FusedMatMul", ["x", "v"], ["y"], name="two", domain="com.microsoft", alpha=2.0)]
    return network(nodes, {"v": floats(4, 5)}, {"x": ("N", 4)}, {"y": ("N", 5)})


@pytest.mark.parametrize("make", [fused, alone])
def test_nodes_that_were_cut_out_wrongly_are_found(make, monkeypatch):
    def other(*arguments):
        cut = cut_out(*arguments)
        message = checked(cut.content)
        next(found for found in message.graph.node if found.name == "two").attribute[0].f = 1.0
        return replace(cut, content=message.SerializeToString())

    monkeypatch.setattr("dwindle.lifting.onnx.building.cut_out", other)
    with pytest.raises(VerificationError, match=r"they part at .*FusedMatMul `two`"):
        dw.load(make())
