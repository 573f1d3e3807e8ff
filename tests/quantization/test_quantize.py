"""Quantized training computes what the file computes; grids against hand-computed cases."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.attaching import effective_weights
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring import LiteRTRunner
from dwindle.quantization.fake_quantization import FakeQuantize, FakeQuantizedWeight, quantized_range


def test_fake_quantization_of_an_activation_is_the_formula():
    layer = FakeQuantize(scale=0.5, zero_point=-3, bits=8)
    x = np.array([-100.0, -0.26, -0.25, 0.0, 0.24, 0.75, 1.25, 100.0], np.float32)
    expected = (np.clip(np.rint(x / 0.5) - 3, -128, 127) + 3) * 0.5
    np.testing.assert_array_equal(layer(x).numpy(), expected.astype(np.float32))
    inside = np.random.default_rng(0).uniform(-60, 60, 1000).astype(np.float32)
    assert np.abs(layer(inside).numpy() - inside).max() <= 0.25


def test_gradient_of_fake_quantization_is_one_inside_and_zero_outside():
    import tensorflow as tf

    layer = FakeQuantize(scale=0.5, zero_point=0, bits=8)
    x = tf.constant([-100.0, 0.3, 63.0, 64.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x))
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 1, 1, 0])


@pytest.mark.parametrize("bits", [4, 8])
def test_fake_quantization_of_a_weight_per_channel(bits):
    weight = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * np.logspace(-3, 1, 7, dtype=np.float32)
    low, high = quantized_range(bits, narrow=bits >= 8)
    scale = np.abs(weight).max(axis=0) / np.float32(high)
    expected = np.clip(np.rint(weight / scale), low, high) * scale
    found = FakeQuantizedWeight(bits=bits, channel_axes=(1,)).apply(keras.ops.convert_to_tensor(weight), {}, None)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert all(len(np.unique(column)) <= 2**bits for column in np.asarray(found).T)


GRAPHS = ["mlp", "conv_bn_relu", "residual", "concat", "depthwise", "grouped", "shared_layer", "nested",
          "squeeze_excite", "rescaled", "custom_layer", "subclassed", "several_inputs_and_outputs"]  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_int8_file_computes_what_the_twin_computes(name, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 200)
    twin = dw.quantize(model, "int8", inputs)
    artefact = dw.export(twin, tmp_path / "model.tflite", data=inputs)
    found = artefact.verification
    assert found.within >= 0.999, found
    assert found.quanta <= 2.0, found
    kinds = {op.name: op.inputs[1].dtype for op in read_graph(artefact.path.read_bytes()).operations
             if op.name in ("CONV_2D", "FULLY_CONNECTED", "DEPTHWISE_CONV_2D")}  # fmt: skip
    assert kinds
    assert set(kinds.values()) == {np.int8}


def test_training_the_twin_helps_and_the_file_gets_it(trained, digits, tmp_path):
    (x, y), (x_test, y_test) = digits
    twin = dw.quantize(trained, "int8", x[:200])
    twin.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = twin.evaluate(x, y, verbose=0)[0]
    twin.fit(x, y, batch_size=64, epochs=1, verbose=0)
    assert twin.evaluate(x, y, verbose=0)[0] < before
    artefact = dw.export(twin, tmp_path / "model.tflite", data=x_test, verify_samples=600)
    assert artefact.verification.quanta <= 1.0
    outputs = LiteRTRunner(artefact.path).predict([x_test])[0]
    expected = twin.predict(x_test, verbose=0)
    assert np.abs(outputs - expected).max() <= 1 / 256 + 1e-6
    tied = np.sort(outputs, axis=1)[:, -1] == np.sort(outputs, axis=1)[:, -2]
    assert ((outputs.argmax(1) == expected.argmax(1)) | tied).all()
    assert dw.measure(artefact.path, (x_test, y_test)).accuracy == (outputs.argmax(1) == y_test).mean()


def test_zeros_of_a_pruned_model_stay_zero_in_training_and_in_the_file(trained, digits, tmp_path):
    (x, y), _ = digits
    twin = dw.quantize(dw.prune(trained, 0.8), "int8", x[:200])
    twin.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    twin.fit(x, y, batch_size=64, epochs=1, verbose=0)
    artefact = dw.export(twin, tmp_path / "model.tflite", data=x[:200])
    rows = [row for row in dw.inspect_file(artefact.path).rows if row.bits == 8 and row.distinct]
    assert len(rows) == 3
    assert all(row.sparsity >= 0.79 for row in rows)


def test_a_channel_that_pruning_emptied_keeps_its_bias_in_the_file(tmp_path):
    model = ZOO["mlp"]()
    first = model.layers[0]
    first.kernel.assign(np.concatenate([np.zeros((12, 1)), first.kernel.numpy()[:, 1:]], axis=1))
    first.bias.assign(np.full(16, 0.7))
    inputs = samples(model, 100)
    artefact = dw.export(model, tmp_path / "model.tflite", scheme="int8", data=inputs)
    assert artefact.verification.quanta <= 1.0
    operation = read_graph(artefact.path.read_bytes()).operations[1]
    bias = operation.inputs[2]
    np.testing.assert_allclose(bias.value * bias.scale, 0.7, rtol=1e-2)


def test_stopping_in_the_middle_of_quantized_training_and_going_on_gives_the_same_weights(trained, digits, tmp_path):
    (x, y), _ = digits
    x, y = x[:640], y[:640]

    def begun():
        keras.utils.set_random_seed(3)
        twin = dw.quantize(dw.prune(trained, 0.5), "int8", x[:100])
        twin.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
        twin.fit(x, y, batch_size=64, shuffle=False, verbose=0)
        return twin

    straight, stopped = begun(), begun()
    stopped.save(tmp_path / "half.keras")
    resumed = dw.load(tmp_path / "half.keras")
    for model in (straight, resumed):
        model.fit(x, y, batch_size=64, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(straight.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert straight.to_float_file() == resumed.to_float_file()


def test_finalize_gives_float_layers_with_weights_on_the_grid(trained, digits):
    plain = dw.finalize(dw.quantize(trained, "int8", digits[0][0][:100]))
    assert not any(isinstance(layer, FakeQuantize) for layer in plain.layers)
    assert not effective_weights(plain)
    kernel = next(v.numpy() for layer in plain.layers for v in layer.weights if v.shape == (32, 10))
    assert all(len(np.unique(np.abs(column))) <= 128 for column in kernel.T)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"scheme": "int7"}, dw.ConfigError, r"`scheme` is 'int7'.*`int8`"),
        ({"scheme": "float16"}, dw.ConfigError, "no integers"),
        ({"data": None}, dw.DataError, "needs calibration data"),
        ({"data": np.zeros((0, 28, 28, 1), np.float32)}, dw.DataError, "no samples"),
        ({"data": np.zeros((5, 32, 32, 1), np.float32)}, dw.DataError, r"\(32, 32, 1\).*\(28, 28, 1\)"),
        ({"data": np.full((5, 28, 28, 1), np.nan, np.float32)}, dw.DataError, "NaN"),
        ({"data": [np.zeros((5, 28, 28, 1), np.float32)] * 2}, dw.DataError, "2 arrays and the model has 1 inputs"),
    ],
)
def test_bad_input_is_one_clear_sentence(trained, digits, arguments, kind, message):
    with pytest.raises(kind, match=message):
        dw.quantize(trained, **{"data": digits[0][0][:10], **arguments})
