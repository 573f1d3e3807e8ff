"""Models with nodes that stayed as in an ONNX file, written as ONNX: against the file that they came from."""

import keras
import numpy as np
import onnx
import pytest
from onnx_island_models import (
    MODELS,
    assert_same,
    branching,
    detector,
    floats,
    fused,
    islands_of,
    looping,
    network,
    node,
    random_inputs,
    same_numbers,  # noqa: F401
    warped,
)

import dwindle as dw
from dwindle.cli import main
from dwindle.errors import UnsupportedModelError, VerificationError
from dwindle.exporting import float_file
from dwindle.exporting.onnx import onnx_file
from dwindle.exporting.onnx.islands import Joining, taken_apart
from dwindle.measuring.onnx_runtime import OnnxRunner

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow writes LiteRT files")
WRITTEN = ["detector", "warped", "fused", "listing"]


@pytest.mark.parametrize("name", WRITTEN)
def test_it_comes_back(name, tmp_path):
    message = MODELS[name]()
    model = dw.load(message)
    before = model.to_json()
    written = dw.export(model, tmp_path / "m.onnx")
    assert written.verification.passed
    for layer in islands_of(model):
        assert f"written as in the ONNX file that it came from: `{layer.name}` ({layer.operator})" in written.notes
    inputs, expected = random_inputs(message, 3)
    assert_same(OnnxRunner(tmp_path / "m.onnx").run(*inputs), expected)
    again = dw.load(tmp_path / "m.onnx")
    assert len(islands_of(again)) == len(islands_of(model))
    assert_same(again(inputs if len(inputs) > 1 else inputs[0]), expected)
    assert model.to_json() == before


def test_its_nodes_are_those_of_the_file(tmp_path):
    message = fused()
    dw.export(dw.load(message), tmp_path / "m.onnx")
    made = onnx.load(tmp_path / "m.onnx")
    kept = [[n for n in each.graph.node if n.domain == "com.microsoft"] for each in (message, made)]
    assert [(n.op_type, list(n.attribute)) for n in kept[0]] == [(n.op_type, list(n.attribute)) for n in kept[1]]
    assert {opset.domain: opset.version for opset in made.opset_import} == {"": 20, "com.microsoft": 1}


def test_channels_second(tmp_path):
    message = warped()
    model = dw.load(message, layout="channels_last")
    dw.export(model, tmp_path / "m.onnx", layout="NCHW")
    (x, grid), expected = random_inputs(message, 3)
    # The grid has four axes too, and its last ones are no channels: both orders are turned alike.
    found = OnnxRunner(tmp_path / "m.onnx").run(x, grid)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["detector", "warped", "fused"])
def test_the_rest_in_8_bits(name, tmp_path):
    message = MODELS[name]()
    model = dw.load(message)
    x = [floats(64, *tensor.shape[1:]) for tensor in model.inputs]
    written = dw.export(model, tmp_path / "m.onnx", "int8", x)
    assert written.verification.passed
    assert written.scheme == "int8"
    kinds = [found.op_type for found in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "QuantizeLinear" in kinds
    found, expected = (OnnxRunner(each).run(*x) for each in (tmp_path / "m.onnx", message.SerializeToString()))
    for a, b in zip(found, expected, strict=True):
        if b.dtype == np.float32:
            assert np.abs(a - b).max() <= 0.05 * np.abs(b).max()


def test_after_pruning(tmp_path):
    slim = dw.prune(dw.load(detector()), 0.5, structure="channel")
    masked = dw.prune(slim, 0.5)
    dw.export(masked, tmp_path / "m.onnx")
    x = floats(3, 3, 32, 32)
    assert_same(OnnxRunner(tmp_path / "m.onnx").run(x), [keras.ops.convert_to_numpy(y) for y in masked(x)])


def test_a_model_that_takes_one_sample(tmp_path):
    message = warped()
    grid = message.graph.input.pop(1)
    message.graph.initializer.append(onnx.numpy_helper.from_array(floats(1, 5, 5, 2), grid.name))
    message.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model = dw.load(message)
    assert model.input_shape == (1, 3, 8, 8)
    x = floats(20, 3, 8, 8)
    assert "takes one sample at a time, as the model does" in dw.export(model, tmp_path / "m.onnx", data=x).notes
    dw.export(model, tmp_path / "m8.onnx", "int8", x)
    whole = OnnxRunner(message.SerializeToString()).predict([x])
    assert_same(OnnxRunner(tmp_path / "m.onnx").predict([x]), whole)
    (rounded,) = OnnxRunner(tmp_path / "m8.onnx").predict([x])
    assert np.abs(rounded - whole[0]).max() <= 0.05 * np.abs(whole[0]).max()


def test_random_numbers_are_not_compared(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["a"], name="first"), node("RandomNormalLike", ["a"], ["n"], name="noise"),
             node("Add", ["a", "n"], ["b"]), node("MatMul", ["b", "v"], ["y"], name="last")]  # fmt: skip
    model = dw.load(network(nodes, {"w": floats(4, 6), "v": floats(6, 3)}, {"x": ("N", 4)}, {"y": ("N", 3)}))
    written = dw.export(model, tmp_path / "m.onnx")
    assert "not compared: RandomNormalLike in `noise` draws random numbers" in written.notes
    assert "RandomNormalLike" in [found.op_type for found in onnx.load(tmp_path / "m.onnx").graph.node]


@pytest.mark.parametrize(("make", "text"), [
    (looping, r"layers read what `loop` \(Loop\) gives, of shape \(None, None\); an .onnx is written by way of LiteRT"),
    (branching, r"`choice` \(If\) reads what `.*` gives, of shape \(\); an .onnx is written by way of LiteRT"),
    (lambda: network([node("NonZero", ["x"], ["y"], name="where")], {}, {"x": ("N", 3)}, {"y": (7, (2, "M"))}),
     "has no layers but `where`"),
])  # fmt: skip
def test_what_is_not_written(make, text, tmp_path):
    with pytest.raises(UnsupportedModelError, match=text):
        dw.export(dw.load(make()), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_whole_is_found():
    model = dw.load(warped())
    parts = taken_apart(model)
    x = parts.samples([floats(4, 3, 8, 8), floats(4, 5, 5, 2)])
    joining = Joining(parts, onnx_file(float_file(parts.body), x).content, "NHWC")
    whole = joining.run()
    joining.compare(whole, x)
    sampler = next(found for found in whole.graph.node if found.op_type == "GridSample")
    sampler.attribute.append(onnx.helper.make_attribute("align_corners", 1))
    with pytest.raises(VerificationError, match=r"does not compute what `warp` \(GridSample\) does alone"):
        joining.compare(whole, x)


def test_on_the_command_line(tmp_path, capsys):
    onnx.save(detector(), tmp_path / "a.onnx")
    assert main(["convert", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]) == 0
    assert "written as in the ONNX file that it came from: `nms` (NonMaxSuppression)" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "a.onnx"), str(tmp_path / "b.tflite")]) == 2
    assert (
        "`nms` (NonMaxSuppression) has no entry in the table of ONNX operators, so that it stays"
        in capsys.readouterr().err
    )
