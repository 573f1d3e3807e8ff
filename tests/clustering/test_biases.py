"""Biases on a grid: within half a step, the model that came in unchanged, nothing else touched, fewer bytes packed."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.clustering import round_biases
from dwindle.errors import ConfigError
from dwindle.weights import KeepZeros

L = keras.layers


def network(units: int = 200) -> keras.Model:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((units,)), L.Dense(units, "relu", name="inner")], name="nested")
    inputs = keras.Input((12,))
    x = inner(L.Dense(units, "relu", name="hidden")(inputs))
    model = keras.Model(inputs, L.Dense(4, use_bias=False, name="last")(x))
    rng = np.random.default_rng(0)
    for layer in (model.get_layer("hidden"), inner.get_layer("inner")):
        layer.bias.assign(rng.normal(size=units) * 0.3)
    return model


def biases(model: keras.Model) -> list[np.ndarray]:
    layers = (model.get_layer("hidden"), model.get_layer("nested").get_layer("inner"))
    return [layer.bias.numpy() for layer in layers]


@pytest.mark.parametrize("bits", [2, 4, 6, 16])
def test_every_bias_is_the_nearest_multiple_of_a_power_of_two(bits):
    model = network()
    before = [np.array(weight) for weight in model.get_weights()]
    rounded = round_biases(model, bits)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    for old, new in zip(biases(model), biases(rounded), strict=True):
        step = 2.0 ** (np.floor(np.log2(np.abs(old).max())) + 1 - (bits - 1))
        np.testing.assert_array_equal(new, np.rint(old / step) * step)
        assert np.abs(new / step).max() <= 2 ** (bits - 1)
        assert np.abs(new - old).max() <= step / 2
    np.testing.assert_array_equal(rounded.get_layer("hidden").kernel, model.get_layer("hidden").kernel)
    again = round_biases(rounded, bits)
    assert all(np.array_equal(a, b) for a, b in zip(biases(rounded), biases(again), strict=True))


def test_zeros_and_what_is_no_number_stay():
    model = keras.Sequential([keras.Input((2,)), L.Dense(3, name="zero"), L.Dense(2, name="broken")])
    model.get_layer("broken").bias.assign([np.nan, 1.0])
    rounded = round_biases(model)
    np.testing.assert_array_equal(rounded.get_layer("zero").bias, np.zeros(3))
    np.testing.assert_array_equal(rounded.get_layer("broken").bias, [np.nan, 1.0])


def test_pruned_and_shared_weights_stay_so():
    model = dw.prune(network(), 0.7)
    shared = dw.cluster(model, 8)
    rounded = round_biases(shared)
    for layer in ("hidden", "last"):
        old = dw.finalize(shared).get_layer(layer).kernel.numpy()
        np.testing.assert_array_equal(dw.finalize(rounded).get_layer(layer).kernel.numpy(), old)
    assert any(
        isinstance(t, KeepZeros) or t.kind == "mask" for ts in dw.attaching.attached(rounded).values() for t in ts
    )


def test_a_packed_file_gets_smaller_by_two_bytes_a_bias(tmp_path):
    sizes = []
    for number, model in enumerate((network(), round_biases(network()))):
        file = dw.export(model, tmp_path / f"{number}.tflite").path
        sizes.append(dw.pack(file, tmp_path / f"{number}.dwz").packed_bytes)
    assert sizes[0] - sizes[1] > 2 * 400


@pytest.mark.parametrize("bits", [1, 17, 2.0, True, "6"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="`bits`"):
        round_biases(network(4), bits)
