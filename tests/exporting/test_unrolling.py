"""SavedModels with loops load: recurrent layers are written out step by step, and compute what TensorFlow does."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.exporting.convert import quiet
from dwindle.exporting.unrolling import NotUnrolled, _imported, unrolled
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring.litert import LiteRTRunner

tf = pytest.importorskip("tensorflow")
L = keras.layers


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def served(folder, x):
    """Return what TensorFlow computes for the folder's only input."""
    with quiet():
        serving = tf.saved_model.load(str(folder)).signatures["serving_default"]
    (name,) = serving.structured_input_signature[1]
    return next(iter(serving(**{name: tf.constant(x)}).values())).numpy()


def kinds(model):
    return {operation.name for operation in read_graph(model.float_file).operations}


def exported(folder, layer, *, shape=(6, 3), dtype="float32"):
    """Write a model of Keras 3 with a layer or function; return the folder."""
    keras.utils.set_random_seed(0)
    x = keras.Input(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.Model(x, L.Dense(2)(layer(x))).export(folder, format="tf_saved_model", verbose=False)
    return folder


RECURRENT = {
    "LSTM": L.LSTM(4),
    "two GRU": lambda x: L.GRU(3)(L.GRU(4, return_sequences=True)(x)),
    "SimpleRNN backwards": L.SimpleRNN(4, go_backwards=True, return_sequences=True),
    "Bidirectional": L.Bidirectional(L.LSTM(3, return_sequences=True)),
    "several cells": L.RNN([L.LSTMCell(3), L.GRUCell(2)]),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_become_trainable_ones(name, tmp_path):
    folder = exported(tmp_path / "saved", RECURRENT[name])
    model = dw.load(folder)
    x = drawn(5, 6, 3)
    np.testing.assert_allclose(model.predict(x, verbose=0), served(folder, x), rtol=1e-4, atol=1e-5)
    assert model.notes == ()
    assert "WHILE" not in kinds(model)
    before = [keras.ops.convert_to_numpy(weight).copy() for weight in model.trainable_variables]
    model.compile("sgd", "mse")
    model.fit(x, served(folder, x) + 1, verbose=0)
    now = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_variables]
    assert all((one != old).any() for one, old in zip(now, before, strict=True))


def test_a_step_has_its_weights_from_the_others(tmp_path):
    folder = exported(tmp_path / "saved", L.LSTM(4))
    model = dw.load(folder)
    # A kernel, a recurrent kernel and a bias, and the last layer's kernel; its bias is 0, so the file has none.
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == 3 * 16 + 4 * 16 + 16 + 4 * 2
    written = dw.export(model, tmp_path / "small.tflite", "int8", data=drawn(64, 6, 3))
    assert written.verification.passed
    x = drawn(5, 6, 3)
    expected = served(folder, x)
    found = LiteRTRunner((tmp_path / "small.tflite").read_bytes()).predict([x])[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_words_of_any_number_that_are_masked(tmp_path):
    folder = exported(
        tmp_path / "saved", lambda x: L.GRU(4)(L.Embedding(9, 5, mask_zero=True)(x)), shape=(None,), dtype="int32"
    )
    model = dw.load(folder, inputs=(None, 7))
    x = np.random.default_rng(0).integers(0, 9, (5, 7)).astype(np.int32)
    x[:, 5:] = 0
    np.testing.assert_allclose(model.predict(x, verbose=0), served(folder, x), rtol=1e-4, atol=1e-5)
    assert model.notes == ()


def test_a_long_loop_stays_one(tmp_path):
    folder = exported(tmp_path / "saved", L.LSTM(3, return_sequences=True), shape=(300, 2))
    model = dw.load(folder)
    x = drawn(3, 300, 2)
    np.testing.assert_allclose(model.predict(x, verbose=0), served(folder, x), rtol=1e-4, atol=1e-5)
    (note,) = model.notes
    assert "(WHILE)" in note
    assert note.startswith("runs frozen in the interpreter")


class Loops(tf.Module):
    """Loops that are not of Keras."""

    def __init__(self):
        super().__init__()
        self.given = tf.Variable(drawn(3, 4) / 2)
        self.back = tf.Variable(drawn(4, 4) / 2)
        self.count = tf.Variable(0.0)

    def step(self, x, state):
        return tf.tanh(x @ self.given + state @ self.back)

    def start(self, x):
        return tf.zeros((tf.shape(x)[0], 4))

    def written(self, x):
        def step(i, state, every):
            state = self.step(x[:, i], state)
            return i + 1, state, every.write(i, state)

        steps = tf.shape(x)[1]
        every = tf.TensorArray(tf.float32, steps)
        found = tf.while_loop(lambda i, *_: i < steps, step, (0, self.start(x), every))[2]
        return tf.transpose(found.stack(), (1, 0, 2))

    def grown(self, x):
        every = tf.TensorArray(tf.float32, 0, dynamic_size=True)
        found = tf.while_loop(
            lambda i, _: i < 6, lambda i, every: (i + 1, every.write(i, x[:, i] @ self.given)), (0, every)
        )
        return tf.transpose(found[1].stack(), (1, 0, 2))

    def counted(self, x):
        self.count.assign_add(1.0)
        return self.plain(x) + self.count

    def plain(self, x):
        return tf.while_loop(
            lambda i, _: i < tf.shape(x)[1], lambda i, state: (i + 1, self.step(x[:, i], state)), (0, self.start(x))
        )[1]

    def scanned(self, x):
        return tf.scan(lambda state, one: self.step(one, state), tf.transpose(x, (1, 0, 2)), self.start(x))[-1]

    def mapped(self, x):
        return tf.transpose(tf.map_fn(lambda one: one @ self.given, tf.transpose(x, (1, 0, 2))), (1, 0, 2))

    def until(self, x):
        """Go on until a sum is large, which depends on the data."""
        return tf.while_loop(
            lambda state: tf.reduce_sum(state) < 5.0, lambda state: (state + tf.abs(x[:, 0] @ self.given),),
            (self.start(x),),
        )[0]  # fmt: skip

    def until_written(self, x):
        every = tf.TensorArray(tf.float32, 4)
        found = tf.while_loop(
            lambda i, one, _: (tf.reduce_sum(one) < 9.0) & (i < 4),
            lambda i, one, every: (i + 1, one + 1.0, every.write(i, one)), (0, x[:, 0], every),
        )  # fmt: skip
        return tf.transpose(found[2].stack(), (1, 0, 2))


def saved(folder, name):
    module = Loops()
    function = getattr(module, name)
    module.serve = tf.function(lambda x: {"y": function(x)}, input_signature=[tf.TensorSpec((None, 6, 3), name="x")])
    with quiet():
        tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


@pytest.mark.parametrize("name", ["written", "grown", "plain", "scanned", "mapped"])
def test_loops_of_other_people(name, tmp_path):
    folder = saved(tmp_path / "saved", name)
    model = dw.load(folder)
    x = drawn(5, 6, 3)
    np.testing.assert_allclose(model.predict(x, verbose=0), served(folder, x), rtol=1e-4, atol=1e-5)
    assert model.notes == ()
    assert model.trainable_variables


def test_a_loop_that_ends_as_the_data_say_stays_one(tmp_path):
    folder = saved(tmp_path / "saved", "until")
    model = dw.load(folder)
    assert "(WHILE)" in model.notes[0]
    for x in drawn(4, 1, 6, 3):
        np.testing.assert_allclose(model.predict(x, verbose=0), served(folder, x), rtol=1e-4, atol=1e-5)


def test_a_loop_beside_a_state_is_left_alone(tmp_path):
    loaded = tf.saved_model.load(str(saved(tmp_path / "saved", "counted")))
    with pytest.raises(NotUnrolled, match=r"beside a state that it keeps \(AssignAddVariableOp\)"):
        unrolled(tf, loaded.signatures["serving_default"], {"x": tf.TensorSpec((1, 6, 3))}, 256)
    assert loaded.count.numpy() == 0


def test_loops_of_too_many_operations_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("dwindle.exporting.unrolling._MOST_OPERATIONS", 60)
    folder = saved(tmp_path / "saved", "plain")
    model = dw.load(folder)
    assert "(WHILE)" in model.notes[0]
    with pytest.raises(dw.ConversionError, match="; its loops, written out, are more than 60 operations"):
        dw.load(saved(tmp_path / "other", "written"))


def test_such_a_loop_that_writes_a_list_is_refused(tmp_path):
    folder = saved(tmp_path / "saved", "until_written")
    with pytest.raises(
        dw.ConversionError, match=r"TensorListReserve.*; `.*while.*` is a loop that ends as the data say"
    ):
        dw.load(folder)


def test_a_function_becomes_a_graph_that_computes_the_same():
    # Results of several tensors, and a node that is to be placed beside one which the function does not have.
    function = tf.function(lambda x, y: (tf.split(x, 3)[1] * y, tf.unique_with_counts(x)[2]))
    spec = tf.TensorSpec([6], tf.float32)
    concrete = function.get_concrete_function(spec, tf.TensorSpec([], tf.float32))
    definition = concrete.function_def
    for node in definition.node_def:
        node.attr["_class"].list.s.append(b"loc:@elsewhere")
    inputs, results = _imported(tf, definition, concrete.graph.as_graph_def().library)
    x, y = np.array([1, 1, 2, 5, 2, 2], np.float32), np.float32(3)
    with tf.compat.v1.Session(graph=results[0].graph) as session:
        part, counts = session.run(results, dict(zip(inputs, (x, y), strict=True)))
    np.testing.assert_array_equal(part, [6, 15])
    np.testing.assert_array_equal(counts, [2, 3, 1])
