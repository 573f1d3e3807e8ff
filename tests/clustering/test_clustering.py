"""At most k values in each table: while training, saved and loaded, pruned and quantized in any order, in the file."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from zoo import ZOO, outputs, samples, settle

import dwindle as dw
from dwindle.attaching import attached, effective_weights
from dwindle.clustering import clusters_of
from dwindle.lifting.flatbuffer import read_graph
from dwindle.weights import model_slots

L = keras.layers
X = np.random.default_rng(0).normal(size=(192, 8, 8, 2)).astype(np.float32)
Y = (X.sum((1, 2, 3)) > 0).astype(np.int64)
CLUSTERS = 8


def network():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 2))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, use_bias=False, name="conv")(x)))
    x = L.Dense(16, "relu", name="hidden")(L.Flatten()(x))
    return keras.Model(inputs, L.Dense(4, "softmax", name="last")(x))


@pytest.fixture(scope="module")
def model():
    model = network()
    fit(model, 2)
    return model


def fit(model, epochs=1, rate=0.01):
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(X, Y, batch_size=32, epochs=epochs, verbose=0)
    return model


def most_values(weight, axis=-1):
    """Distinct values of the fullest channel."""
    return max(len(np.unique(row)) for row in np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1))


def kernels_of(path):
    """Kernels of a file, by the layer's name, output channels first."""
    found = {}
    for tensor in read_graph(path.read_bytes()).tensors:
        for name in ("conv", "hidden", "last"):
            if tensor.value is not None and tensor.value.ndim > 1 and name in tensor.name:
                found[name] = tensor.value
    assert len(found) == 3
    return found


def test_the_twin_has_k_values_and_the_names_of_the_model(model):
    before = [value.numpy() for value in model.weights]
    shared = dw.cluster(model, CLUSTERS)
    assert [layer.name for layer in shared.layers] == [layer.name for layer in model.layers]
    for weight in effective_weights(shared).values():
        assert len(np.unique(weight)) == CLUSTERS
    for old, variable in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())


def test_small_weights_are_assigned_more_often():
    inputs = keras.Input((64,))
    model = keras.Model(inputs, L.Dense(8, name="small")(L.Dense(256, name="large")(inputs)))
    found = attached(dw.cluster(model, CLUSTERS))
    assert found["large", "kernel"][0].reassign == 100
    assert found["small", "kernel"][0].reassign == 10
    assert attached(dw.cluster(model, CLUSTERS, reassign=7))["large", "kernel"][0].reassign == 7


@pytest.mark.parametrize("settings", [
    {}, {"per_channel": True}, {"block": (0, 4)}, {"gradient": "mean"}, {"reassign": 0}, {"entropy": 1e-5},
    {"temperature": 0.5}, {"init": [-0.3, -0.2, -0.1, 0, 0.05, 0.1, 0.2, 0.3]},
])  # fmt: skip
def test_k_values_after_training_saving_loading_and_in_the_file(model, settings, tmp_path):
    shared = fit(dw.cluster(model, CLUSTERS, **{"reassign": 4, **settings}), 2)
    found = clusters_of(shared)
    assert set(found) == {"conv/kernel", "hidden/kernel", "last/kernel"}
    assert all(one.distinct <= CLUSTERS for one in found.values())
    shared.save(tmp_path / "shared.keras")
    loaded = dw.load(tmp_path / "shared.keras")
    plain = dw.finalize(loaded)
    expected = shared.predict(X, verbose=0)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, atol=1e-6)
    np.testing.assert_allclose(plain.predict(X, verbose=0), expected, atol=1e-6)
    assert not attached(plain)
    for key, weight in effective_weights(shared).items():
        np.testing.assert_array_equal(plain.get_layer(key[0]).kernel.numpy(), weight)
    dw.export(shared, tmp_path / "m.tflite")
    kernels = kernels_of(tmp_path / "m.tflite")
    # A table reaches over all channels but where BatchNorm is folded, and where tables are smaller anyway.
    whole = {} if "block" in settings or settings.get("per_channel") else {"hidden", "last"}
    assert all(len(np.unique(kernels[name])) <= CLUSTERS for name in whole)
    if "block" not in settings:
        assert all(most_values(kernel, 0) <= CLUSTERS for kernel in kernels.values())
    fit(loaded)  # and goes on
    assert all(one.distinct <= CLUSTERS for one in clusters_of(loaded).values())


def test_values_and_assignments_both_move(model):
    shared = dw.cluster(model, CLUSTERS, reassign=4)
    before = effective_weights(shared)["hidden", "kernel"]
    numbers = np.unique(before, return_inverse=True)[1]
    after = effective_weights(fit(shared, 2, rate=0.02))["hidden", "kernel"]
    assert not set(np.unique(before)) & set(np.unique(after))
    assert (np.unique(after, return_inverse=True)[1] != numbers).mean() > 0.02
    frozen = dw.cluster(model, CLUSTERS, reassign=0)
    kept = effective_weights(fit(frozen, 2))["hidden", "kernel"]
    np.testing.assert_array_equal(np.unique(kept, return_inverse=True)[1], numbers)
    assert not set(np.unique(before)) & set(np.unique(kept))


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (160, 120)])  # the second is compiled
def test_a_value_gets_the_gradients_of_its_weights(rows, columns, gradient):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((rows,)), L.Dense(columns, use_bias=False, name="a")])
    x = np.random.default_rng(0).normal(size=(5, rows)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(5, columns)).astype(np.float32)
    shared = dw.cluster(model, 3, gradient=gradient, reassign=0)
    weight = effective_weights(shared)["a", "kernel"]
    values, numbers = np.unique(weight, return_inverse=True)
    slope = 2 * x.T @ (x @ weight - y) / y.size
    of_values = np.array([slope.reshape(-1)[numbers.reshape(-1) == j].sum() for j in range(3)])
    if gradient == "mean":
        of_values /= np.bincount(numbers.reshape(-1))
    shared.compile(keras.optimizers.SGD(0.1), "mse")
    shared.fit(x, y, batch_size=5, verbose=0)
    expected = (values - 0.1 * of_values)[numbers].reshape(weight.shape)
    np.testing.assert_allclose(effective_weights(shared)["a", "kernel"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [10, 1000])
def test_assignment_gives_each_weight_the_nearest_value(columns):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((20,)), L.Dense(columns, use_bias=False, name="a")])
    shared = dw.cluster(model, 5, reassign=1)
    shared.compile(keras.optimizers.SGD(0.5), "mse")
    x = np.random.default_rng(0).normal(size=(64, 20)).astype(np.float32)
    shared.fit(x, np.ones((64, columns)), batch_size=64, epochs=1, verbose=0)
    raw = shared.get_layer("a").effective_before("kernel", order=0)
    shared.compile(keras.optimizers.SGD(0.0), "mse")
    shared.fit(x, np.ones((64, columns)), batch_size=64, epochs=1, verbose=0)
    after = effective_weights(shared)["a", "kernel"]
    values = np.unique(after)
    expected = values[np.abs(raw[..., None] - values).argmin(-1)]
    np.testing.assert_array_equal(after, expected)


def test_entropy_makes_the_numbers_cheaper(model):
    plain, cheap = (fit(dw.cluster(model, CLUSTERS, entropy=cost, reassign=4), 3) for cost in (0.0, 1e-4))
    bits = [clusters_of(each)["hidden/kernel"].bits for each in (plain, cheap)]
    assert bits[1] < 0.9 * bits[0]


ORDERS = [
    ("cluster", "prune"), ("prune", "cluster", "quantize"), ("quantize", "cluster", "prune"),
    *(pytest.param(order, marks=pytest.mark.slow)
      for order in (("cluster", "prune", "quantize"), ("quantize", "prune", "cluster"), ("prune", "quantize", "cluster"))),
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(order))
def test_each_technique_keeps_what_the_former_reached(model, order, tmp_path):
    steps = {
        "prune": lambda twin: dw.prune(twin, 0.6),
        "cluster": lambda twin: dw.cluster(twin, CLUSTERS, reassign=4),
        "quantize": lambda twin: dw.quantize(twin, "int8", data=X[:64]),
    }
    twin = model
    for step in order:
        twin = fit(steps[step](twin))
    twin.save(tmp_path / "m.keras")
    twin = fit(dw.load(tmp_path / "m.keras"))
    made = dw.export(twin, tmp_path / "m.tflite")
    if "quantize" in order:
        assert made.verification.quanta == 0.0
    for name, kernel in kernels_of(tmp_path / "m.tflite").items():
        assert kernel.dtype == (np.int8 if "quantize" in order else np.float32)
        assert most_values(kernel, 0) <= CLUSTERS, name
        if "prune" in order:
            assert (kernel == 0).mean() >= 0.58, name
            assert (kernel == 0).mean() < 1, name


def test_interrupted_training_goes_on_as_if_nothing_had_happened(model, tmp_path):
    def start():
        keras.utils.set_random_seed(1)
        twin = dw.cluster(model, CLUSTERS, reassign=5)
        twin.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
        return twin

    whole = start()
    for _ in range(2):
        whole.fit(X, Y, batch_size=32, shuffle=False, verbose=0)
    half = start()
    half.fit(X, Y, batch_size=32, shuffle=False, verbose=0)
    half.save(tmp_path / "half.keras")
    loaded = dw.load(tmp_path / "half.keras")
    loaded.fit(X, Y, batch_size=32, shuffle=False, verbose=0)
    for key, weight in effective_weights(whole).items():
        np.testing.assert_array_equal(effective_weights(loaded)[key], weight)


@pytest.mark.parametrize("name", ["lstm", "attention", "nested", "shared_layer", "two_towers", "token_classifier"])
def test_any_weight_of_any_layer(name):
    model = settle(ZOO[name]())
    shared = dw.cluster(model, 4)
    found = clusters_of(shared)
    assert set(found) == {f"{path}/{slot.key}" for path, slots in model_slots(model).items() for slot in slots}
    assert all(one.distinct <= 4 for one in found.values())
    inputs = samples(model, 4)
    for one, other in zip(outputs(shared, inputs), outputs(dw.finalize(shared), inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_weights_fewer_than_values_stay_and_it_is_said(model):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shared = dw.cluster(model, 100)
    (message,) = [str(one.message) for one in said if issubclass(one.category, UserWarning)]
    assert message == (
        "`clusters` is 100, more than the weights of a table in last/kernel (64); these stay as they are"
    )
    assert ("last", "kernel") not in attached(shared)
    assert ("hidden", "kernel") in attached(shared)


@pytest.mark.parametrize(("settings", "message"), [
    ({"clusters": 1}, "`clusters` is 1; it must be a whole number from 2 to 65536"),
    ({"clusters": 2.5}, "`clusters` is 2.5"),
    ({"clusters": 60_000}, "more than the weights of a table in .*; use fewer"),
    ({"init": "kmean"}, "`init` is 'kmean'.*did you mean `kmeans`"),
    ({"init": [0.1, float("nan")]}, "a list of numbers: the values to share"),
    ({"init": [0.1, 0.2, 0.3]}, "`init` has 3 values and `clusters` is 8; pass clusters=3"),
    ({"block": (0,)}, r"`block` is \(0,\); it must be \(rows, columns\)"),
    ({"block": (0, 8), "per_channel": True}, "`per_channel` and `block` both say"),
    ({"gradient": "max"}, "`gradient` is 'max'"),
    ({"reassign": -1}, "`reassign` is -1; it must be a number of steps"),
    ({"entropy": -1.0}, "`entropy` is -1.0; it must be 0 or above"),
    ({"entropy": 1e-6, "temperature": 0.5}, "soft assignments have no bits"),
    ({"layers": "block*"}, "block"),
])  # fmt: skip
def test_bad_input_gets_one_sentence(model, settings, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.cluster(model, **{"clusters": CLUSTERS, **settings})
