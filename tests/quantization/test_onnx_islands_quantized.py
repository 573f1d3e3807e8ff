"""Quantized training of models with nodes that stayed as in an ONNX file."""

import keras
import numpy as np
import onnx
import pytest
from onnx_island_models import (
    MODELS,
    floats,
    fused,
    islands_of,
    packed,
    same_numbers,  # noqa: F401
    warped,
)

import dwindle as dw
from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.measuring.onnx_runtime import OnnxRunner

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow writes LiteRT files")


def outputs(model, x):
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(packed(x), training=False))]


def samples(model, count=64):
    return [floats(count, *tensor.shape[1:]) for tensor in model.inputs]


def same_as_file(twin, path, x):
    """Check that a file gives what the twin does, to within one step of the output."""
    for found, expected in zip(OnnxRunner(path).run(*x), outputs(twin, x), strict=True):
        assert found.shape == expected.shape
        step = np.diff(np.unique(found)).min() if found.dtype == np.float32 else 0
        assert np.mean(np.abs(found - expected) > 1.01 * step) <= 0.01


@pytest.mark.parametrize("name", ["detector", "warped", "fused", "listing"])
def test_the_rest_is_quantized(name, tmp_path):
    model = dw.load(MODELS[name]())
    before = model.to_json()
    x = samples(model)
    twin = dw.quantize(model, "int8", x)
    assert [layer.file for layer in islands_of(twin)] == [layer.file for layer in islands_of(model)]
    assert [tensor.name for tensor in twin.inputs] == [tensor.name for tensor in model.inputs]
    for layer in islands_of(model):
        note = f"stays as in the ONNX file that it came from, without a gradient: `{layer.name}` ({layer.operator})"
        assert twin.notes.count(note) == 1
    for found, expected in zip(outputs(twin, x), outputs(model, x), strict=True):
        assert found.dtype == expected.dtype
        if expected.dtype == np.float32:
            assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()
    written = dw.export(twin, tmp_path / "m.onnx", data=x)
    assert written.scheme == "int8"
    assert written.verification.passed
    same_as_file(twin, tmp_path / "m.onnx", x)
    assert model.to_json() == before


def test_a_node_with_a_name_that_the_rest_has_too(tmp_path):
    message = warped()
    next(found for found in message.graph.node if found.op_type == "GridSample").name = "transpose_1"
    model = dw.load(message)
    x = samples(model)
    twin = dw.quantize(model, "int8", x)
    assert [layer.name for layer in islands_of(twin)] == ["transpose_1_of_onnx"]
    dw.export(twin, tmp_path / "m.onnx", data=x)
    same_as_file(twin, tmp_path / "m.onnx", x)


@pytest.mark.parametrize("ranges", ["fixed", "moving", "learned"])
def test_it_is_trained_saved_and_written(ranges, tmp_path):
    model = dw.load(warped())
    x = samples(model)
    twin = dw.quantize(model, "int8", x, ranges=ranges)
    target = 0.5 * outputs(model, x)[0]
    twin.compile(keras.optimizers.Adam(1e-2), "mse")
    before = twin.evaluate(x, target, verbose=0)
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):  # none passes the sampler
        twin.fit(x, target, epochs=8, verbose=0)
    assert twin.evaluate(x, target, verbose=0) < 0.5 * before
    twin.save(tmp_path / "m.keras")
    again = dw.load(tmp_path / "m.keras")
    np.testing.assert_array_equal(outputs(again, x)[0], outputs(twin, x)[0])
    for number, trained in enumerate((twin, again)):
        dw.export(trained, tmp_path / f"{number}.onnx", data=x)
        (found,) = OnnxRunner(tmp_path / f"{number}.onnx").run(*x)
        assert np.mean((found - target) ** 2) < 0.5 * before
        if ranges == "fixed":  # with others, sums do not fall on whole steps as the file's do
            same_as_file(trained, tmp_path / f"{number}.onnx", x)
    kinds = [found.op_type for found in onnx.load(tmp_path / "0.onnx").graph.node]
    assert {"GridSample", "QuantizeLinear"} <= set(kinds)


def test_it_learns_from_a_teacher_and_is_finalized(tmp_path):
    model = dw.load(fused())
    x = samples(model)
    twin = dw.quantize(model, "int4", x)
    for variable in model.trainable_variables:  # a teacher that is far from its student
        variable.assign(-0.5 * variable)
    coach = dw.distill(twin, model)
    coach.compile(keras.optimizers.Adam(1e-2))
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        losses = coach.fit(x[0], epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    plain = dw.finalize(coach.student)
    assert [layer.operator for layer in islands_of(plain)] == ["com.microsoft::FusedMatMul"]
    expected = outputs(coach.student, x)[0]
    assert np.abs(outputs(plain, x)[0] - expected).max() <= 0.05 * np.abs(expected).max()
    dw.export(plain, tmp_path / "plain.onnx")
    np.testing.assert_allclose(OnnxRunner(tmp_path / "plain.onnx").run(*x)[0], outputs(plain, x)[0], atol=1e-5)


def test_zeros_stay(tmp_path):
    model = dw.prune(dw.load(warped()), 0.5)
    x = samples(model)
    twin = dw.quantize(model, "int8", x)
    twin.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        twin.fit(x, outputs(model, x)[0], verbose=0)
    kernel = np.abs(dw.finalize(twin).get_layer("last").kernel)
    assert kernel.size == 32
    assert (kernel == 0).sum() >= 16


def test_what_is_refused(tmp_path):
    model = dw.load(fused())
    x = samples(model)
    with pytest.raises(ConfigError, match="`max_drop` is judged on a LiteRT file, which can't hold `one`"):
        dw.quantize(model, "int8", x, max_drop="1%")
    twin = dw.quantize(model, "int8", x)
    with pytest.raises(UnsupportedModelError, match=r"`one` \(com.microsoft::FusedMatMul\) .*a .tflite can't hold"):
        dw.export(twin, tmp_path / "m.tflite", data=x)
    message = warped()
    grid = message.graph.input.pop(1)
    message.graph.initializer.append(onnx.numpy_helper.from_array(floats(1, 5, 5, 2), grid.name))
    message.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model = dw.load(message)
    with pytest.raises(UnsupportedModelError, match="takes one sample at a time, since `warp` of its ONNX file do"):
        dw.quantize(model, "int8", samples(model))
