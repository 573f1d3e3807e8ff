"""A weight that several operators of a file read stays one weight in training; zeros that were merged do not."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.exporting import float_file, pack_inputs
from dwindle.lifting.flatbuffer import read_graph
from dwindle.lifting.shared_constants import followers, unshared
from dwindle.measuring import LiteRTRunner
from dwindle.quantization import resolve_scheme, write_quantized

layers = keras.layers


def trained(model, inputs, steps=6):
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    given = pack_inputs(model, inputs)
    generator = np.random.default_rng(0)
    aims = [a + generator.normal(0, 1, a.shape) for a in keras.tree.flatten(model.predict(given, verbose=0))]
    model.fit(given, aims[0] if len(aims) == 1 else aims, epochs=1, batch_size=len(inputs[0]) // steps, verbose=0)
    return model


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("shared_layer", "learned"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("shared_layer", "fixed"), ("gru", "fixed"),
                                                                   ("shared_convolution", "learned"))),
    ],
)  # fmt: skip
def test_quantized_training_of_a_shared_weight_is_what_the_file_computes(name, ranges, tmp_path):
    inputs = samples(ZOO[name](), 96)
    model = dw.quantize(settle(ZOO[name]()), scheme="int8", data=inputs, ranges=ranges)
    assert followers(model.links)
    trained(model, inputs)
    found = dw.export(model, tmp_path / "m.tflite", data=inputs).verification
    assert found.quanta == 0.0, found
    model.save(tmp_path / "m.keras")
    again = trained(keras.saving.load_model(tmp_path / "m.keras", safe_mode=True), inputs)
    assert dw.export(again, tmp_path / "again.tflite", data=inputs).verification.quanta == 0.0


def test_accumulators_of_layers_that_share_only_a_bias_have_the_steps_of_the_file():
    inputs = keras.Input((12,))
    hidden = layers.Dense(8, activation="relu")(inputs)
    one, other = (layers.Dense(1, bias_initializer=keras.initializers.Constant(0.25)) for _ in range(2))
    merged = layers.Add()([one(inputs), other(hidden)])  # the converter merges the two biases
    samples = [np.random.default_rng(0).normal(size=(96, 12)).astype(np.float32)]
    model = dw.quantize(keras.Model(inputs, merged), scheme="int8", data=samples)
    assert [follower.variable for _, follower in followers(model.links)] == ["bias"]
    written = write_quantized(model.float_file, resolve_scheme("int8"), model.quantization["ranges"])
    steps = {}
    for operation in read_graph(written).operations:
        if operation.name in ("CONV_2D", "FULLY_CONNECTED"):
            given, kernel, output = operation.inputs[0], operation.inputs[1], operation.outputs[0]
            steps[output.name] = np.ravel(kernel.scale) * np.ravel(given.scale) / np.ravel(output.scale)
    checked = 0
    for layer, (source, *_) in model.quantization["snaps"].items():
        link = next((link for link in model.links if link.layer == source and link.variable == "kernel"), None)
        fake = model.get_layer(layer)
        if link is None or not np.any(fake.step):
            continue
        found = np.asarray(fake.step)
        assert any(s.size in (1, found.size) and np.allclose(found, s, rtol=1e-5) for s in steps.values()), layer
        checked += 1
    assert checked == 3


def test_a_lifted_model_trains_a_shared_weight_once_and_writes_it_back():
    inputs = samples(ZOO["shared_layer"](), 96)
    model = trained(dw.lift(settle(ZOO["shared_layer"]())), inputs)
    expected = model.predict(pack_inputs(model, inputs), verbose=0)
    found = LiteRTRunner(model.to_float_file()).predict(inputs)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    plain = trained(dw.finalize(model), inputs)
    found = LiteRTRunner(plain.to_float_file()).predict(inputs)[0]
    expected = plain.predict(pack_inputs(plain, inputs), verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_zero_biases_that_the_converter_merged_are_trained_apart(tmp_path):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU(),
         layers.DepthwiseConv2D(3), layers.GlobalAveragePooling2D(), layers.Dense(5)]
    )  # fmt: skip
    content = float_file(model)
    biases = [op.inputs[2].name for op in read_graph(content).operations if op.name.endswith("CONV_2D")]
    assert len(biases) == 2
    assert len(set(biases)) == 1  # or this tests nothing
    graph = read_graph(unshared(content))
    assert len({op.inputs[2].name for op in graph.operations if op.name.endswith("CONV_2D")}) == 2
    x = np.random.default_rng(0).normal(size=(96, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        LiteRTRunner(unshared(content)).predict([x])[0], LiteRTRunner(content).predict([x])[0]
    )
    aware = trained(dw.quantize(model, scheme="int8", data=x), [x])
    assert dw.export(aware, tmp_path / "m.tflite", data=x).verification.quanta == 0.0


def test_a_table_that_is_also_the_output_layer_is_one_variable():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(20, 6)

        def call(self, tokens):
            return keras.ops.matmul(
                keras.ops.mean(self.table(tokens), axis=1), keras.ops.transpose(self.table.embeddings)
            )

    tokens = np.random.default_rng(0).integers(0, 20, (96, 5)).astype(np.int32)
    model = Tied()
    model(tokens)
    lifted = trained(dw.lift(model), [tokens])
    expected = lifted.predict(tokens, verbose=0)
    found = LiteRTRunner(lifted.to_float_file()).predict([tokens])[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
