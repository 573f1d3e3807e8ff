"""Transforms hang on weights: same layers, same names, saved and loaded, baked in by finalize."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from zoo import ZOO, feed, outputs, samples, settle

import dwindle as dw
from dwindle.attaching import attached, effective_weights
from dwindle.weights import transform_from_dict

GRAPHS = [name for name in ZOO if name != "subclassed"]


def _fit_a_little(model, inputs):
    x = feed(model, inputs)
    targets = keras.tree.map_structure(np.zeros_like, model.predict(x, verbose=0))
    model.compile("adam", loss=keras.tree.map_structure(lambda _: "mse", targets))
    model.fit(x, targets, verbose=0)


@pytest.mark.parametrize("name", GRAPHS)
def test_pruning_keeps_layers_trains_saves_and_bakes(name, tmp_path):
    model = settle(ZOO[name]())
    before = [v.numpy().copy() for v in model.variables]
    inputs = samples(model, 16)
    pruned = dw.prune(model, 0.5)
    assert [(layer.name, tuple(w.shape for w in layer.weights[:1])) for layer in pruned.layers] == [
        (layer.name, tuple(w.shape for w in layer.weights[:1])) for layer in model.layers
    ]
    _fit_a_little(pruned, inputs)
    for weight in effective_weights(pruned).values():
        assert (weight == 0).sum() == round(weight.size * 0.5)
    pruned.save(tmp_path / "pruned.keras")
    loaded = dw.load(tmp_path / "pruned.keras")
    plain = dw.finalize(pruned)
    assert plain.count_params() == model.count_params()
    assert not attached(plain)
    for twin in (loaded, plain):
        for found, expected in zip(outputs(twin, inputs), outputs(pruned, inputs), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.variables, strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_finalizing_a_plain_model_changes_nothing(name):
    model = settle(ZOO[name]())
    inputs = samples(model, 8)
    for found, expected in zip(outputs(dw.finalize(model), inputs), outputs(model, inputs), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_plain_model_file_does_not_need_dwindle(tmp_path):
    plain = dw.finalize(dw.prune(ZOO["conv_bn_relu"](), 0.5))
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    plain.save(tmp_path / "plain.keras")
    assert b"dwindle" not in (tmp_path / "plain.keras").read_bytes()


def test_transforms_stack_in_their_order_whatever_the_order_of_calls():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="d")])
    twice = dw.prune(dw.prune(model, 0.25, l1=1e-3), 0.5)
    kinds = [transform.kind for transform in attached(twice)["d", "kernel"]]
    assert kinds == ["mask", "l1"]
    assert (effective_weights(twice)["d", "kernel"] == 0).sum() == 8


def test_unknown_transform_kind_is_named():
    with pytest.raises(dw.ConfigError, match=r"'msk'.*did you mean `mask`"):
        transform_from_dict({"kind": "msk"})


def test_a_subclassed_model_says_what_to_do_and_can_be_lifted():
    model = ZOO["subclassed"]()
    with pytest.raises(dw.UnsupportedModelError, match=r"dw\.lift"):
        dw.prune(model, 0.5)
    inputs = samples(model, 8)
    lifted = dw.lift(model)
    np.testing.assert_allclose(outputs(lifted, inputs)[0], outputs(model, inputs)[0], rtol=1e-5, atol=1e-6)
    assert [(w == 0).mean() for w in effective_weights(dw.prune(lifted, 0.5)).values()] == [0.5, 0.5]


class Shifted(keras.layers.Layer):
    """Derives a number from its variable as that is loaded."""

    def build(self, shape):
        self.shift = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False, name="shift")
        self.held = np.zeros(shape[-1], np.float32)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.held = self.shift.numpy()

    def call(self, x):
        return x + self.held


@pytest.mark.parametrize("rebuilt", [
    lambda model: dw.prune(model, 0.0, l1=1e-4),
    lambda model: dw.prune(model, 0.5, structure="channel"),
    dw.factorize,
    dw.finalize,
    lambda model: dw.shrink(model, width=0.5),
    lambda model: dw.shrink(model, width=0.5, start="teacher"),
])  # fmt: skip
def test_statistics_and_other_derived_state_come_along(rebuilt):
    x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Normalization(name="scale"), Shifted(name="own"), keras.layers.Dense(8),
        keras.layers.Dense(2),
    ])  # fmt: skip
    model.get_layer("scale").adapt(x)
    model.get_layer("own").load_own_variables({"0": np.arange(4.0)})
    twin = rebuilt(model)
    expected = (x - x.mean(0)) / x.std(0) + np.arange(4)
    np.testing.assert_allclose(twin.get_layer("own")(twin.get_layer("scale")(x)), expected, atol=1e-4)


@pytest.mark.slow
def test_lifted_graphs_may_be_deeper_than_keras_walks_by_itself(tmp_path):
    x = begin = keras.Input((4,))
    for _ in range(350):
        x = keras.layers.Add()([keras.layers.Dense(4, activation="swish")(x), begin])
    lifted = dw.lift(keras.Model(begin, x))
    assert len(lifted.layers) > 1000
    lifted.save(tmp_path / "deep.keras")
    loaded = dw.load(tmp_path / "deep.keras")
    sample = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(outputs(loaded, [sample])[0], outputs(lifted, [sample])[0])
    assert len(dw.finalize(dw.prune(loaded, 0.5)).layers) == len(lifted.layers)
