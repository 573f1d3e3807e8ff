"""Whole models as ONNX: round trips, integers, layouts, names, what is refused, the command."""

from __future__ import annotations

import json
import re
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from lifting.test_operators import convert
from onnx import numpy_helper
from zoo import ZOO, outputs, samples, settle

import dwindle as dw
from dwindle.cli import main
from dwindle.errors import ConfigError, MissingDependencyError, UnsupportedModelError, VerificationError
from dwindle.exporting.convert import float_file
from dwindle.exporting.onnx import onnx_file
from dwindle.exporting.onnx.operators import OPERATORS
from dwindle.lifting.flatbuffer import parse, read_graph, serialize
from dwindle.measuring import LiteRTRunner
from dwindle.measuring.onnx_runtime import OnnxRunner

L = keras.layers
QUICK = {"conv_bn_relu", "several_inputs_and_outputs", "merges"}
IMAGES = {
    "conv_bn_relu", "residual", "concat", "depthwise", "grouped", "squeeze_excite", "unet", "prelu", "inverted_residual",
    "dense_connections", "inception", "keyword_spotting", "cropped", "asymmetric_kernels", "shared_convolution", "transposed",
    "channel_shuffle", "rescaled", "conv3d", "conv1d", "group_normalized",
}  # fmt: skip


def some(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", some(ZOO, QUICK))
def test_a_float_model_comes_back_the_same(name, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 16)
    expected = outputs(model, inputs)
    artefact = dw.export(model, tmp_path / "model.onnx", data=inputs)
    assert artefact.verification.passed
    assert artefact.verification.samples == 32
    assert artefact.notes == ()  # takes any number of samples
    runner = OnnxRunner(artefact.path)
    assert runner.takes_batches
    back = dw.load(artefact.path)
    lifted = LiteRTRunner(float_file(back))
    for found in (runner.predict(inputs), lifted.predict(inputs)):
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", some(IMAGES, {"conv_bn_relu"}))
def test_integers_agree_with_litert(name, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 64)
    dw.export(model, tmp_path / "model.tflite", scheme="int8", data=inputs)
    artefact = dw.export(model, tmp_path / "model.onnx", scheme="int8", data=inputs)
    assert artefact.verification.within >= 0.99
    content = (tmp_path / "model.tflite").read_bytes()
    graph = read_graph(content)
    scale = next(op.inputs[0].scale for op in graph.operations if op.outputs[0] is graph.outputs[0])
    found, expected = OnnxRunner(artefact.path).predict(inputs)[0], LiteRTRunner(content).predict(inputs)[0]
    assert (np.abs(found - expected) <= 1.01 * scale).mean() >= 0.99
    weights = [numpy_helper.to_array(t) for t in onnx.load(artefact.path).graph.initializer]
    floats = any(array.dtype == np.float32 and array.size > 64 for array in weights)
    assert floats == (name == "conv3d")  # whose kernel LiteRT has in float32


@pytest.mark.parametrize(
    "scheme",
    some(["float16", "int8-dynamic", "int8-weights", "int16x8", "int4", "int4-dynamic"], {"int4-dynamic"}),
)
def test_every_scheme_is_written(scheme, trained, digits, tmp_path):
    (x, _), (x_test, y_test) = digits
    artefact = dw.export(trained, tmp_path / "model.onnx", scheme=scheme, data=x[:200])
    assert artefact.scheme == scheme
    assert artefact.verification.passed
    assert (
        artefact.size_bytes
        < (0.6 if scheme == "float16" else 0.45) * dw.export(trained, tmp_path / "f.onnx").size_bytes
    )
    expected = trained.predict(x_test, verbose=0)
    found = OnnxRunner(artefact.path).predict([x_test])[0]
    assert (found.argmax(1) == expected.argmax(1)).mean() > (0.9 if "int4" in scheme else 0.98)
    assert abs(dw.measure(artefact.path, (x_test, y_test)).accuracy - (found.argmax(1) == y_test).mean()) < 1e-6


def test_a_convolution_by_hand(tmp_path):
    inputs = keras.Input((4, 4, 1))
    model = keras.Model(inputs, L.Conv2D(1, 3, strides=2, padding="same", kernel_initializer="ones")(inputs))
    file = dw.export(model, tmp_path / "model.onnx").path
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    # One row and column of zeros is added behind, none before.
    np.testing.assert_array_equal(OnnxRunner(file).run(image)[0].reshape(2, 2), [[45, 39], [66, 50]])
    (node,) = (node for node in onnx.load(file).graph.node if node.op_type == "Conv")
    assert {a.name: list(a.ints) for a in node.attribute}["pads"] == [0, 0, 1, 1]


def test_a_product_by_hand(tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, L.Dense(2, activation="relu", name="product")(inputs))
    model.layers[1].set_weights([np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([0.5, -9.0])])
    file = dw.export(model, tmp_path / "model.onnx").path
    np.testing.assert_array_equal(OnnxRunner(file).run(np.array([[1, 1], [2, -1]], np.float32))[0], [[4.5, 0], [0, 0]])
    assert [node.name for node in onnx.load(file).graph.node] == ["product", "product_relu"]


def test_integers_of_the_file_are_the_litert_files(trained, digits, tmp_path):
    dw.export(trained, tmp_path / "model.tflite", scheme="int8", data=digits[0][0][:200])
    dw.export(trained, tmp_path / "model.onnx", scheme="int8", data=digits[0][0][:200])
    operation = next(
        op for op in read_graph((tmp_path / "model.tflite").read_bytes()).operations if op.name == "CONV_2D"
    )
    graph = onnx.load(tmp_path / "model.onnx").graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    conv = next(node for node in graph.node if node.op_type == "Conv")
    kernel, bias = (makers[name] for name in conv.input[1:])
    assert kernel.op_type == bias.op_type == "DequantizeLinear"
    np.testing.assert_array_equal(arrays[kernel.input[0]], operation.inputs[1].value.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arrays[kernel.input[1]], operation.inputs[1].scale)
    assert {a.name: a.i for a in kernel.attribute}["axis"] == 0
    np.testing.assert_array_equal(arrays[bias.input[0]], operation.inputs[2].value)
    np.testing.assert_array_equal(arrays[bias.input[1]], operation.inputs[2].scale)
    assert arrays[bias.input[0]].dtype == np.int32


def test_onnx_runtime_computes_on_integers(trained, digits, tmp_path):
    dw.export(trained, tmp_path / "model.onnx", scheme="int8", data=digits[0][0][:200])
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "run.onnx")
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), settings)
    found = kinds(tmp_path / "run.onnx")
    assert found.count("QLinearConv") == 1
    assert found.count("QGemm") == 2
    assert not {"Conv", "Gemm", "MatMul"} & set(found)


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [("conv_bn_relu", "NHWC", 1), ("conv_bn_relu", "NCHW", 0), ("transposed", "NHWC", 2), ("transposed", "NCHW", 0)],
)
def test_transposes_are_left_at_the_ends_only(name, layout, count, tmp_path):
    model = settle(ZOO[name]())
    dw.export(model, tmp_path / "model.onnx", layout=layout)
    assert kinds(tmp_path / "model.onnx").count("Transpose") == count
    (x,) = samples(model, 3)
    (expected,) = outputs(model, [x])
    first = layout == "NCHW"
    (found,) = OnnxRunner(tmp_path / "model.onnx").run(np.moveaxis(x, -1, 1) if first else x)
    found = np.moveaxis(found, 1, -1) if first and found.ndim == 4 else found
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_names_shapes_and_origin_are_told(tmp_path):
    model = settle(ZOO["several_inputs_and_outputs"]())
    artefact = dw.export(model, tmp_path / "model.onnx")
    message = onnx.load(artefact.path)
    assert [value.name for value in message.graph.input] == ["image", "vector"]
    assert [value.name for value in message.graph.output] == ["a", "b"]
    lengths = [d.dim_param or d.dim_value for d in message.graph.input[0].type.tensor_type.shape.dim]
    assert lengths == ["batch", 8, 8, 1]
    assert (message.producer_name, message.producer_version) == ("dwindle", dw.__version__)
    told = {entry.key: entry.value for entry in message.metadata_props}
    assert told["scheme"] == "float32"
    assert told["layout"] == "NHWC"
    assert re.fullmatch("[0-9a-f]{64}", told["source_sha256"])


def test_samples_that_a_graph_mixes_stay_single(tmp_path):
    content = convert(lambda x: tf.tanh(tf.cumsum(x, axis=0)[0])[None], (1, 5))
    (tmp_path / "model.tflite").write_bytes(content)
    artefact = dw.export(tmp_path / "model.tflite", tmp_path / "model.onnx")
    assert artefact.notes == ("takes one sample at a time: the graph fixes the first axis",)
    assert not OnnxRunner(artefact.path).takes_batches


def test_a_wrong_entry_is_found_and_named(tmp_path, monkeypatch):
    model = settle(ZOO["grouped"]())

    (tmp_path / "model.onnx").write_text("precious")
    monkeypatch.setitem(OPERATORS, "LOGISTIC", lambda w, o, i: OPERATORS["NEG"](w, _renamed(o, "NEG"), i))
    with pytest.raises(VerificationError, match=r"they part at LOGISTIC `.*` \(ONNX `.*`\); nothing was written"):
        dw.export(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "precious"


def _renamed(operation, name):
    from dataclasses import replace

    return replace(operation, name=name)


def test_an_operator_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.ops.top_k(L.Dense(8, name="scores")(inputs), 3)[0])
    with pytest.raises(UnsupportedModelError, match=r"TOPK_V2 `.*` \(layer `.*`\) has no entry .* export a \.tflite"):
        dw.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io_type": "int8", "scheme": "int8"}, "`io_type` is 'int8', but an .onnx has float inputs"),
        ({"sparse": True}, "`sparse` is True, but an .onnx holds dense weights"),
        ({"layout": "CHW"}, "`layout` is 'CHW'; it must be one of `NHWC`, `NCHW`"),
    ],
)
def test_options_that_onnx_does_not_have(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        dw.export(ZOO["mlp"](), tmp_path / "model.onnx", **options)
    with pytest.raises(ConfigError, match=r"only an \.onnx has a choice of it"):
        dw.export(ZOO["mlp"](), tmp_path / "model.tflite", layout="NCHW")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_not_installed_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"`{package}` package.*pip install 'dwindle\[onnx\]'"):
        dw.export(ZOO["mlp"](), tmp_path / "model.onnx")


def test_a_litert_file_is_written_as_it_is(trained, digits, tmp_path):
    (x, _), (x_test, _) = digits
    dw.export(trained, tmp_path / "model.tflite", scheme="int8", data=x[:200], io_type="int8")
    artefact = dw.export(tmp_path / "model.tflite", tmp_path / "model.onnx", data=x[:50])
    assert artefact.scheme == "int8"
    assert artefact.verification.samples == 66
    runner = OnnxRunner(artefact.path)
    assert {runner.inputs[0].dtype, runner.outputs[0].dtype} == {np.float32}  # integers have no scale outside the graph
    expected = LiteRTRunner(tmp_path / "model.tflite").predict([x_test])[0]
    assert (np.abs(runner.predict([x_test])[0] - expected) <= 1 / 255).mean() >= 0.99
    with pytest.raises(ConfigError, match=r"pass dw\.load\(path\) to choose"):
        dw.export(tmp_path / "model.tflite", tmp_path / "other.onnx", scheme="float32")
    with pytest.raises(ConfigError, match=r"must be that of a \.tflite, else pass dw\.load\(path\)"):
        dw.export("model.keras", tmp_path / "other.onnx")


@pytest.mark.slow
def test_a_model_trained_quantized_is_written(trained, digits, tmp_path):
    (x, y), (x_test, _) = digits
    aware = dw.quantize(trained, "int8", x[:200])
    aware.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    aware.fit(x[:320], y[:320], verbose=0)
    artefact = dw.export(aware, tmp_path / "model.onnx", data=x[:100])
    assert artefact.scheme == "int8"
    found = OnnxRunner(artefact.path).predict([x_test])[0]
    assert (found.argmax(1) == aware.predict(x_test, verbose=0).argmax(1)).mean() > 0.99


def test_averages_of_integers_round_as_litert_does():
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, L.AveragePooling2D(2)(L.Conv2D(4, 3, padding="same")(inputs)))
    x = samples(model, 64)
    from dwindle.exporting.onnx.assembling import assemble
    from dwindle.exporting.onnx.verifying import compared, judge
    from dwindle.quantization import calibrate, resolve_scheme, write_quantized

    content = float_file(model)
    scheme = resolve_scheme("int8")
    content = write_quantized(content, scheme, calibrate(content, tuple(x), method="min-max", bits=8))
    judges = judge(content, read_graph(content))
    away = compared(assemble(content, open_batch=True, layout="NHWC", scheme="int8", away=True), judges, x)
    even = compared(assemble(content, open_batch=True, layout="NHWC", scheme="int8"), judges, x)
    assert away.max_abs_error == 0
    assert 0 < even.quanta < 1.01


def test_the_command_writes_measures_compares_and_inspects(trained, digits, tmp_path, capsys):
    (x, y), (x_test, y_test) = digits
    trained.save(tmp_path / "cnn.keras")
    np.savez(tmp_path / "digits.npz", x_train=x[:300], y_train=y[:300], x_test=x_test, y_test=y_test)

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument).replace("{}", str(tmp_path)) for argument in arguments])
        return status, *capsys.readouterr()

    status, told, _ = run(
        "convert", "{}/cnn.keras", "{}/cnn.onnx", "--scheme", "int8", "--data", "{}/digits.npz", "--json"
    )
    assert status == 0
    assert json.loads(told)["scheme"] == "int8"
    status, _, error = run("convert", "{}/cnn.keras", "{}/cnn.onnx")
    assert (status, "exists; write over it with --force" in error) == (2, True)
    assert run("convert", "{}/cnn.keras", "{}/cnn.tflite", "--scheme", "int8", "--data", "{}/digits.npz")[0] == 0
    status, told, _ = run("convert", "{}/cnn.tflite", "{}/same.onnx")
    assert (status, "int8" in told) == (0, True)
    assert "QuantizeLinear" in kinds(tmp_path / "same.onnx")
    assert run("convert", "{}/cnn.tflite", "{}/float.onnx", "--scheme", "float32", "--output-layout", "NCHW")[0] == 0
    assert "QuantizeLinear" not in kinds(tmp_path / "float.onnx")
    assert OnnxRunner(tmp_path / "float.onnx").inputs[0].shape == (-1, 1, 28, 28)
    assert run("convert", "{}/float.onnx", "{}/again.onnx", "--layout", "channels_last", "--force")[0] == 0
    status, _, error = run("convert", "{}/cnn.keras", "{}/cnn2.tflite", "--output-layout", "NCHW")
    assert (status, "--output-layout is for .onnx files" in error) == (2, True)
    status, told, _ = run("measure", "{}/cnn.onnx", "--data", "{}/digits.npz", "--json")
    assert json.loads(told)["accuracy"] > 0.85
    status, told, _ = run("compare", "{}/cnn.tflite", "{}/cnn.onnx", "--data", "{}/digits.npz", "--json")
    assert status == 0
    assert min(one["same_class"] for one in json.loads(told) if one["same_class"] is not None) > 0.99
    status, told, _ = run("inspect", "{}/cnn.onnx", "--json")
    assert {row["op"] for row in json.loads(told)["rows"]} >= {"Conv", "Gemm", "QuantizeLinear"}
    assert json.loads(told)["parameters"] >= sum(w.size for w in trained.get_weights())


def test_a_file_that_computes_its_shapes_is_written(tmp_path):
    # As TensorFlow's own converter writes a model with an open number of samples.
    model = settle(ZOO["transposed"]())
    x = L.Flatten()(model.outputs[0])
    model = keras.Model(model.inputs, L.Dense(3)(x))
    content = convert(lambda x: model(x, training=False), (None, 6, 6, 3))
    assert "SHAPE" in {operation.name for operation in read_graph(content).operations}
    (tmp_path / "model.tflite").write_bytes(content)
    artefact = dw.export(tmp_path / "model.tflite", tmp_path / "model.onnx")
    assert artefact.notes == ()
    assert "Shape" not in kinds(artefact.path)
    (x,) = samples(model, 7)
    np.testing.assert_allclose(OnnxRunner(artefact.path).run(x)[0], model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


def test_open_lengths_are_refused(tmp_path):
    model = parse(float_file(settle(ZOO["transposed"]())))
    (index,) = model.subgraphs[0].inputs
    model.subgraphs[0].tensors[index].shapeSignature = np.array([-1, -1, -1, 3], np.int32)
    with pytest.raises(UnsupportedModelError, match=r"has the open lengths \[-1, -1, -1, 3\]"):
        onnx_file(serialize(model), [])


def test_random_inputs_are_enough():
    content = float_file(settle(ZOO["conv_bn_relu"]()))
    file = onnx_file(content, [])
    assert file.verification.samples == 16
    assert file.scheme == "float32"
