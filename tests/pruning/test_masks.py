"""Masks against a NumPy reference, schedules against their formula, resuming against not stopping."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.attaching import attached, effective_weights
from dwindle.pruning.selection import smallest


def dense(rows=20, columns=10, seed=0):
    model = keras.Sequential([keras.Input((rows,)), keras.layers.Dense(columns, name="d")])
    model.layers[0].kernel.assign(np.random.default_rng(seed).normal(size=(rows, columns)))
    return model


@pytest.mark.parametrize("sparsity", [0.0001, 0.3, 0.5, 0.8, 0.999])
def test_mask_is_that_of_a_numpy_reference(sparsity):
    model = dense()
    kernel = model.layers[0].kernel.numpy()
    removed = min(round(kernel.size * sparsity), kernel.size - 1)
    expected = kernel.copy().ravel()
    expected[np.argsort(np.abs(expected), kind="stable")[:removed]] = 0
    found = effective_weights(dw.prune(model, sparsity))["d", "kernel"]
    np.testing.assert_array_equal(found, expected.reshape(kernel.shape))


def test_equal_weights_reach_the_target_and_one_is_always_kept():
    model = dense()
    model.layers[0].kernel.assign(np.full((20, 10), 0.5))
    assert (effective_weights(dw.prune(model, 0.75))["d", "kernel"] == 0).sum() == 150
    assert (smallest(np.ones(4), 3) == [True, True, True, False]).all()


def test_global_scope_is_one_ranking():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")])
    model.get_layer("a").kernel.assign(np.full((8, 8), 1.0))
    model.get_layer("b").kernel.assign(np.full((8, 8), 0.1))
    found = effective_weights(dw.prune(model, 0.5, scope="global"))
    assert (found["b", "kernel"] == 0).sum() == 63  # never a whole layer
    assert (found["a", "kernel"] == 0).sum() == 1  # and half of all weights all the same


def test_pruning_more_keeps_what_was_removed():
    once = dw.prune(dense(), 0.5)
    twice = dw.prune(once, 0.8)
    first, second = effective_weights(once)["d", "kernel"] == 0, effective_weights(twice)["d", "kernel"] == 0
    assert first.sum() == 100
    assert second.sum() == 160
    assert (second | ~first).all()


def test_a_schedule_removes_what_its_formula_says_at_each_step():
    schedule = dw.PolynomialDecay(begin=1, end=6, frequency=2)
    model = dw.prune(dense(), 0.8, schedule=schedule)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.ones((4, 20), np.float32), np.zeros((4, 10), np.float32)
    counts = []
    for _ in range(9):
        model.fit(x, y, batch_size=4, verbose=0)
        counts.append(int((effective_weights(model)["d", "kernel"] == 0).sum()))
    expected, current = [], 0
    for step in range(9):
        if 1 <= step <= 6 and ((step - 1) % 2 == 0 or step == 6):
            share = 1 - (1 - min((step - 1) / 5, 1)) ** 3
            current = round(0.8 * 200 * share)
        expected.append(current)
    assert counts == expected
    assert counts[-1] == 160


def test_a_constant_schedule_removes_at_its_step():
    model = dw.prune(dense(), 0.5, schedule=dw.Constant(begin=2))
    model.compile("sgd", "mse")
    x, y = np.ones((4, 20), np.float32), np.zeros((4, 10), np.float32)
    counts = []
    for _ in range(4):
        model.fit(x, y, verbose=0)
        counts.append(int((effective_weights(model)["d", "kernel"] == 0).sum()))
    assert counts == [0, 0, 100, 100]


def test_a_shared_layer_counts_training_steps_not_calls():
    inputs = keras.Input((6,))
    shared = keras.layers.Dense(6, name="shared")
    model = dw.prune(keras.Model(inputs, shared(shared(inputs))), 0.5, schedule=dw.Constant(begin=2))
    model.compile("sgd", "mse")
    x = np.ones((2, 6), np.float32)
    counts = []
    for _ in range(4):
        model.fit(x, x, verbose=0)
        counts.append(int((effective_weights(model)["shared", "kernel"] == 0).sum()))
    assert counts == [0, 0, 18, 18]


def test_a_custom_training_loop_prunes_too():
    import tensorflow as tf

    model = dw.prune(dense(), 0.5, schedule=dw.PolynomialDecay(end=3, frequency=1))
    optimizer = keras.optimizers.SGD(0.01)
    x = tf.ones((4, 20))
    for _ in range(4):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    assert (effective_weights(model)["d", "kernel"] == 0).sum() == 100


def test_l1_training_loss_is_the_formula_and_shrinks_weights():
    model = dw.prune(dense(), sparsity=0.0, l1=0.01)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((4, 20), np.float32), np.zeros((4, 10), np.float32)
    loss = model.fit(x, y, verbose=0).history["loss"][0]
    kernel = dense().layers[0].kernel.numpy()
    assert loss == pytest.approx(0.01 * np.abs(kernel).sum(), rel=1e-5)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, epochs=20, verbose=0)
    assert np.abs(effective_weights(model)["d", "kernel"]).sum() < 0.99 * np.abs(kernel).sum()


def test_stopping_in_the_middle_of_pruning_and_going_on_gives_the_same_weights(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 20)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32)
    schedule = dw.PolynomialDecay(end=20, frequency=3)

    def begun():
        model = dw.prune(dense(), 0.8, schedule=schedule, l1=1e-4)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
        return model

    straight = begun()
    straight.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    stopped = begun()
    stopped.save(tmp_path / "half.keras")
    resumed = dw.load(tmp_path / "half.keras")
    assert 0 < (effective_weights(resumed)["d", "kernel"] == 0).mean() < 0.8
    resumed.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(straight.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert (effective_weights(resumed)["d", "kernel"] == 0).sum() == 160


def test_layers_are_chosen_by_pattern():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")])
    assert set(attached(dw.prune(model, 0.5, layers="a*"))) == {("a", "kernel")}
    with pytest.raises(dw.ConfigError, match=r"'c\*', which matches none .* a, b"):
        dw.prune(model, 0.5, layers=["a", "c*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` is 1.0; .*\[0, 1\)"),
        ({"sparsity": -0.1}, r"`sparsity` is -0.1"),
        ({"sparsity": "80%"}, r"`sparsity` is '80%'"),
        ({"structure": "elements"}, r"`structure` is 'elements'.*did you mean `element`"),
        ({"criterion": "magnitud"}, r"did you mean `magnitude`"),
        ({"scope": "model"}, r"`scope` is 'model'"),
        ({"l1": -1.0}, r"`l1` is -1.0"),
        ({"sparsity": 0.0}, r"nothing to do"),
        ({"schedule": {"kind": "polynomial", "end": 0}}, r"0 <= begin < end"),
        ({"schedule": {"kind": "cosine"}}, r"'cosine'; known are"),
        ({"schedule": {"kind": "polynomial", "ends": 3}}, r"ends"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.prune(dense(), **arguments)


def test_models_that_cannot_be_pruned_say_why():
    with pytest.raises(dw.ConfigError, match=r"keras\.Model"):
        dw.prune("model.keras", 0.5)
    with pytest.raises(dw.ConfigError, match="not built"):
        dw.prune(keras.Sequential([keras.layers.Dense(3)]), 0.5)
    with pytest.raises(dw.UnsupportedModelError, match="no dense"):
        dw.prune(keras.Sequential([keras.Input((3,)), keras.layers.ReLU()]), 0.5)
