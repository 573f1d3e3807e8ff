"""Every file is run and compared; a file that differs is refused and its worst operator named."""

from __future__ import annotations

import hashlib

import keras
import numpy as np
import pytest
from zoo import ZOO, outputs, samples, settle

import dwindle as dw
from dwindle.exporting import check, unchecked_file
from dwindle.exporting.convert import float_file
from dwindle.exporting.verify import BOUNDS, Bound, compare, require, worst_operator
from dwindle.lifting.flatbuffer import parse, read_graph, replace_constants
from dwindle.measuring import LiteRTRunner

SCHEMES = ["float32", "float16", "int8", "int8-dynamic"]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_model_exports_in_every_scheme(name, scheme, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 128)
    artefact = dw.export(model, tmp_path / "model.tflite", scheme=scheme, data=inputs)
    content = artefact.path.read_bytes()
    assert artefact.verification.passed
    assert artefact.size_bytes == len(content)
    assert artefact.sha256 == hashlib.sha256(content).hexdigest()
    assert not any(op.name.startswith(("CUSTOM", "OPERATOR")) for op in read_graph(content).operations)
    found = LiteRTRunner(content).predict(inputs)
    for result, expected in zip(found, outputs(model, inputs), strict=True):
        tolerance = {"float32": 1e-4, "float16": 1e-2, "int8": 0.15, "int8-dynamic": 0.15}[scheme]
        assert np.abs(result - expected).max() <= tolerance * max(1, np.abs(expected).max())


@pytest.mark.parametrize("scheme", ["float32", "int8"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "several_inputs_and_outputs", "inputs_by_name", "recurrent"])
def test_a_compact_file_is_smaller_and_gives_the_same(name, scheme, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 64)
    whole, small = (
        dw.export(model, tmp_path / f"{compact}.tflite", scheme=scheme, data=inputs, compact=compact)
        for compact in (False, True)
    )
    assert small.size_bytes < whole.size_bytes - 500
    for one, other in zip(*(LiteRTRunner(file.path).predict(inputs) for file in (whole, small)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "left out of the file" in small.notes[-1]
    for file, compact in ((whole, False), (small, True)):
        assert unchecked_file(model, scheme, inputs, compact=compact) == file.path.read_bytes()
    loaded = dw.load(small.path)
    for expected, found in zip(outputs(model, inputs), outputs(loaded, inputs), strict=True):
        assert np.abs(found - expected).max() <= (1e-4 if scheme == "float32" else 0.15) * max(
            1, np.abs(expected).max()
        )
    with pytest.raises(dw.ConfigError, match=r"`compact` is True, and only a \.tflite can be written so"):
        dw.export(model, tmp_path / "model.onnx", compact=True)


@pytest.mark.parametrize("scheme", ["float32", "int8"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "several_inputs_and_outputs"])
def test_a_compact_file_is_exported_quantized_and_saved_as_any_other(name, scheme, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 64)
    small = dw.export(model, tmp_path / "small.tflite", scheme=scheme, data=inputs, compact=True)
    loaded = dw.load(small.path)
    again = dw.export(loaded, tmp_path / "again.tflite", data=inputs)
    names = [tensor.name for tensor in parse(again.path.read_bytes()).subgraphs[0].tensors]
    assert all(names)
    assert len(set(names)) == len(names)
    assert again.verification.passed
    if scheme == "float32":
        for one, other in zip(*(LiteRTRunner(file.path).predict(inputs) for file in (small, again)), strict=True):
            np.testing.assert_array_equal(one, other)
    aware = dw.quantize(loaded, scheme="int8", data=inputs)
    aware.save(tmp_path / "aware.keras")
    before, after = (
        dw.export(found, tmp_path / "int8.tflite", data=inputs) for found in (aware, dw.load(tmp_path / "aware.keras"))
    )
    assert before.verification.passed
    assert before.sha256 == after.sha256


@pytest.mark.parametrize("name", ["conv_bn_relu", "several_inputs_and_outputs", "attention", "recurrent"])
def test_files_take_batches_and_compute_the_same(name):
    model = settle(ZOO[name]())
    content = float_file(model)
    runner = LiteRTRunner(content)
    inputs = samples(model, 5)
    alone = [LiteRTRunner(content).run(*(array[i : i + 1] for array in inputs)) for i in range(5)]
    for number, value in enumerate(runner.predict(inputs)):
        np.testing.assert_allclose(value, np.concatenate([part[number] for part in alone]), rtol=1e-4, atol=1e-5)


def test_names_and_order_of_inputs_and_outputs_are_the_models():
    runner = LiteRTRunner(float_file(ZOO["several_inputs_and_outputs"]()))
    assert [spec.name for spec in runner.inputs] == ["image", "vector"]
    assert [spec.name.split("_")[-1] for spec in runner.outputs] == ["a", "b"]


def test_integer_inputs_and_outputs_on_request(trained, digits, tmp_path):
    (x, _), (x_test, _) = digits
    file = dw.export(trained, tmp_path / "model.tflite", scheme="int8", data=x[:200], io_type="int8").path
    runner = LiteRTRunner(file)
    assert runner.inputs[0].dtype == np.int8
    assert runner.outputs[0].dtype == np.int8
    float_io = dw.export(trained, tmp_path / "float.tflite", scheme="int8", data=x[:200]).path
    np.testing.assert_array_equal(runner.predict([x_test])[0], LiteRTRunner(float_io).predict([x_test])[0])


def test_sizes_fall_with_the_widths(trained, digits, tmp_path):
    sizes = {
        s: dw.export(trained, tmp_path / f"{s}.tflite", scheme=s, data=digits[0][0][:50]).size_bytes for s in SCHEMES
    }
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.4 * sizes["float32"]
    assert sizes["int8-dynamic"] < 0.4 * sizes["float32"]


def _broken(model):
    """Return a model's float file, and the same with one kernel changed, and that operator's output."""
    content = float_file(model)
    operation = next(op for op in read_graph(content).operations if op.name == "FULLY_CONNECTED")
    kernel = operation.inputs[1]
    return content, replace_constants(content, {kernel.name: kernel.value * -1.5}), operation.outputs[0].name


def test_a_wrong_file_is_refused_and_the_operator_named(trained, digits):
    content, wrong, name = _broken(trained)
    inputs = [digits[1][0][:64]]
    verification = check(wrong, trained, inputs, BOUNDS["float32"], "the Keras model")
    assert not verification.passed
    with pytest.raises(dw.VerificationError, match=r"FULLY_CONNECTED `.*nothing was written") as caught:
        require(verification, content, wrong, inputs)
    assert name in str(caught.value)
    assert name in worst_operator(content, wrong, inputs)


def test_export_writes_nothing_when_verification_fails(trained, digits, tmp_path, monkeypatch):
    import dwindle.exporting as exporting

    out = tmp_path / "model.tflite"
    out.write_bytes(b"the old file")
    _, wrong, _ = _broken(trained)
    monkeypatch.setattr(exporting, "write_quantized", lambda *_args, **_options: wrong)
    with pytest.raises(dw.VerificationError):
        dw.export(trained, out, scheme="float16", data=digits[0][0][:64])
    assert out.read_bytes() == b"the old file"


def test_comparison_counts_quanta_classes_and_ties():
    expected = np.array([[0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]], np.float32)
    found = expected.copy()
    found[0] = [0.1, 0.45, 0.45]  # a tie
    found[2] = [0.4, 0.5, 0.1]  # another class
    result = compare([expected], [found], Bound(tolerance=1.0, unit="quantum", share=0.5), reference="r", quanta=[0.05])
    assert result.samples == 3
    assert result.max_abs_error == pytest.approx(0.1)
    assert result.quanta == pytest.approx(2.0)
    assert result.within == pytest.approx(7 / 9)
    assert result.same_class == 2
    assert result.ties == 0
    assert result.passed
    assert not compare([expected], [found * np.nan], BOUNDS["float32"], reference="r").passed


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"path": "model.pb"}, dw.ConfigError, "must end in .tflite or .onnx"),
        ({"scheme": "int3"}, dw.ConfigError, "`scheme` is 'int3'"),
        ({"scheme": "int8"}, dw.DataError, "needs calibration data"),
        ({"io_type": "int8"}, dw.ConfigError, "has float inputs"),
        ({"io_type": "uint4"}, dw.ConfigError, "`io_type` is 'uint4'"),
        ({"model": "model.keras"}, dw.ConfigError, "must be a keras.Model"),
    ],
)
def test_bad_input(trained, tmp_path, monkeypatch, arguments, kind, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        dw.export(**{"model": trained, "path": "model.tflite", **arguments})
    assert not list(tmp_path.iterdir())


def test_a_model_for_one_scheme_is_not_exported_in_another(trained, digits, tmp_path):
    twin = dw.quantize(trained, "int8", digits[0][0][:50])
    with pytest.raises(dw.ConfigError, match=r"made by dw\.quantize for `int8`"):
        dw.export(twin, tmp_path / "model.tflite", scheme="float16")


def test_the_models_weights_and_state_are_untouched(trained, digits, tmp_path):
    before = [v.numpy().copy() for v in trained.variables]
    dw.export(trained, tmp_path / "model.tflite", scheme="int8", data=digits[0][0][:50])
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, trained.variables, strict=True))


def test_mixed_precision_models_export(tmp_path):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential(
            [keras.Input((12,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(4, dtype="float32")]
        )
        pruned = dw.prune(model, 0.5)
    finally:
        keras.config.set_dtype_policy(policy)
    pruned.compile("adam", "mse")
    x = samples(pruned, 32)[0]
    pruned.fit(x, np.zeros((32, 4)), verbose=0)
    artefact = dw.export(pruned, tmp_path / "model.tflite", scheme="int8", data=x)
    assert artefact.verification.passed


def test_a_model_whose_training_diverged_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    kernel = np.ones((4, 3), "float32")
    kernel[1, 2] = np.nan
    model.layers[0].kernel.assign(kernel)
    with pytest.raises(dw.ConversionError, match=r"`\S*head/kernel` of `\S+` has NaN.*smaller learning rate"):
        dw.export(model, tmp_path / "m.tflite")
    assert not (tmp_path / "m.tflite").exists()
