"""Divisions, logarithms and reciprocal roots of values that integers can't tell from 0."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring import LiteRTRunner
from dwindle.quantization import calibrate, resolve_scheme
from dwindle.quantization.assignment import assign
from dwindle.quantization.near_zero import kept_float

ops = keras.ops


def normalizing(form):
    """Return a network that divides by a deviation, between two layers."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16,))
    x = keras.layers.Dense(24, name="before")(inputs)
    far = ops.subtract(x, ops.mean(x, axis=-1, keepdims=True))
    variance = ops.add(ops.mean(ops.square(far), axis=-1, keepdims=True), 1e-6)
    x = ops.divide(far, ops.sqrt(variance)) if form == "DIV" else ops.multiply(far, ops.rsqrt(variance))
    return keras.Model(inputs, keras.layers.Dense(5, activation="softmax", name="after")(x))


def of_spreads(*spreads):
    generator = np.random.default_rng(0)
    return np.concatenate([generator.normal(0, s, (64, 16)) for s in spreads]).astype(np.float32)


@pytest.mark.parametrize("form", ["DIV", "RSQRT"])
def test_statistics_stay_float_where_they_span_too_much(form, tmp_path):
    model, x = normalizing(form), of_spreads(0.3, 1, 30)
    file = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=x)
    kept = {name: [] for name in ("DIV", "RSQRT", "SQRT", "FULLY_CONNECTED")}
    for operation in read_graph(file.path.read_bytes()).operations:
        kept.setdefault(operation.name, []).append(operation.outputs[0].dtype)
    assert kept["FULLY_CONNECTED"] == [np.int8, np.int8]
    roots = kept["DIV"] + kept["RSQRT"]
    assert roots
    assert set(roots + kept["SQRT"] + kept["MEAN"][-1:]) == {np.float32}
    runner = LiteRTRunner(file.path)
    found, expected = runner.predict([x])[0], model.predict(x, verbose=0)
    assert (found.argmax(1) == expected.argmax(1))[64:].mean() > 0.9
    assert np.isfinite(runner.predict([np.zeros((1, 16), np.float32)])[0]).all()  # a variance of 0 is no error


def test_statistics_that_span_little_are_integers():
    content, x = float_file(normalizing("RSQRT")), of_spreads(1, 1.5)
    choices = assign(read_graph(content), resolve_scheme("int8"))
    assert kept_float(read_graph(content), choices, calibrate(content, (x,))) == choices


def test_the_rest_of_the_network_is_not_touched():
    content, x = float_file(normalizing("RSQRT")), of_spreads(0.01, 30)
    graph = read_graph(content)
    choices = assign(graph, resolve_scheme("int8"))
    found = kept_float(graph, choices, calibrate(content, (x,)))
    named = {operation.name for operation, a, b in zip(graph.operations, choices, found, strict=True) if a != b}
    assert "RSQRT" in named
    assert not named & {"FULLY_CONNECTED", "SOFTMAX"}
    weights = resolve_scheme("int8-dynamic")
    assert kept_float(graph, assign(graph, weights), {}) == assign(graph, weights)


def test_numbers_without_axes_are_not_trained():
    twin = dw.quantize(normalizing("RSQRT"), "int8", data=of_spreads(1, 1.5))
    assert twin.trainable_variables
    assert all(variable.shape for variable in twin.trainable_variables)
    fixed = [float(v) for v in twin.non_trainable_variables if v.shape == () and "value" in v.path]
    assert pytest.approx(1e-6) in fixed
    twin.compile(keras.optimizers.Adam(0.1), "mse")
    x = of_spreads(1)
    twin.fit(x, np.eye(5, dtype=np.float32)[np.arange(64) % 5], verbose=0)
    assert np.isfinite(twin.predict(x, verbose=0)).all()


def test_the_gradient_of_a_root_at_0_is_0():
    import tensorflow as tf

    inputs = keras.Input((4,))
    lifted = dw.lift(keras.Model(inputs, ops.sqrt(ops.relu(keras.layers.Dense(4)(inputs)))))
    x = tf.zeros((2, 4))
    with tf.GradientTape() as tape:
        y = lifted(x)
    np.testing.assert_array_equal(y, np.zeros((2, 4)))
    for gradient in tape.gradient(y, lifted.trainable_variables):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))
