"""Criteria against NumPy, what they need, and how training follows them."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.attaching import attached, effective_weights
from dwindle.pruning import CRITERIA
from dwindle.pruning.criteria import L1, Evidence, Fisher, Movement, Proximal, Random, Snip, Taylor, Wanda

L = keras.layers
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(60, 20)).astype(np.float32)
Y = GENERATOR.normal(size=(60, 10)).astype(np.float32)


def dense():
    model = keras.Sequential([keras.Input((20,)), L.Dense(10, name="d")])
    model.layers[0].kernel.assign(np.random.default_rng(1).normal(size=(20, 10)))
    return model


def gradient(kernel, x, y):
    """Gradient of the mean squared error of a linear layer."""
    return x.T @ (2 * (x @ kernel - y)) / y.size


def scores(criterion, model, data):
    values = {("d", "kernel"): model.layers[0].kernel.numpy()}
    evidence = Evidence(model=model, values=values, outputs={("d", "kernel"): (1,)}, data=data)
    return criterion.scores(evidence)["d", "kernel"]


def removed(model):
    return effective_weights(model)["d", "kernel"] == 0


def test_scores_are_their_formulas():
    model = dense()
    w = model.layers[0].kernel.numpy()
    parts = [slice(begin, begin + 16) for begin in range(0, 60, 16)]
    taylor = sum(np.abs(w * gradient(w, X[part], Y[part])) for part in parts)
    np.testing.assert_allclose(scores(Taylor(batch=16), model, (X, Y)), taylor, rtol=1e-4, atol=1e-6)
    fisher = w**2 / 2 * np.mean([gradient(w, x[None], y[None]) ** 2 for x, y in zip(X, Y, strict=True)], axis=0)
    np.testing.assert_allclose(scores(Fisher(), model, (X, Y)), fisher, rtol=1e-4, atol=1e-6)
    snip = np.abs(w * gradient(w, X, Y)) * 60
    for batch in (7, 60):
        np.testing.assert_allclose(scores(Snip(batch=batch), model, (X, Y)), snip, rtol=1e-3, atol=1e-4)
    wanda = np.abs(w) * np.linalg.norm(X, axis=0)[:, None]
    np.testing.assert_allclose(scores(Wanda(batch=13), model, X), wanda, rtol=1e-5)


@pytest.mark.parametrize("criterion", [Taylor(), Fisher(), Snip(), Wanda()], ids=lambda c: type(c).__name__)
def test_the_least_important_go_at_once_and_over_a_schedule(criterion):
    model = dense()
    rated = scores(criterion, model, (X, Y)).astype(np.float32)
    expected = np.zeros(200, bool)
    expected[np.argsort(rated, axis=None, kind="stable")[:140]] = True
    np.testing.assert_array_equal(removed(dw.prune(model, 0.7, criterion=criterion, data=(X, Y))).ravel(), expected)
    later = dw.prune(model, 0.7, criterion=criterion, data=(X, Y), schedule=dw.PolynomialDecay(end=4, frequency=2))
    later.compile(keras.optimizers.SGD(0.01), "mse")
    later.fit(X, Y, batch_size=12, epochs=1, verbose=0)
    np.testing.assert_array_equal(removed(later).ravel(), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="d"), (7, 7, 3)),
        (L.Conv2D(4, 3, groups=2, name="d"), (6, 6, 4)),
        (L.Conv1D(4, 3, dilation_rate=2, name="d"), (9, 3)),
        (L.Dense(4, name="d"), (5, 3)),
        (L.EinsumDense("abc,cd->abd", output_shape=(None, 4), name="d"), (5, 3)),
    ],
    ids=["strided", "grouped", "dilated", "dense over time", "einsum"],
)
def test_wanda_sees_what_each_tap_multiplies(layer, shape):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(2).normal(size=(6, *shape)).astype(np.float32)
    # Independent: the norm of the outputs when the kernel is 1 at one tap and 0 elsewhere.
    kernel = layer.kernel.numpy()
    linear = type(layer).from_config({**layer.get_config(), "activation": None})
    linear.build((None, *shape))
    expected = np.zeros(kernel.shape)
    for place in np.ndindex(kernel.shape):
        one = np.zeros(kernel.shape, np.float32)
        one[place] = 1
        linear.kernel.assign(one)
        expected[place] = np.linalg.norm(keras.ops.convert_to_numpy(linear(x)))
    values = {("d", "kernel"): kernel}
    found = Wanda(batch=4).scores(Evidence(model=model, values=values, outputs={("d", "kernel"): (-1,)}, data=x))
    np.testing.assert_allclose(found["d", "kernel"], np.abs(kernel) * expected, rtol=1e-4, atol=1e-5)
    assert "call" not in vars(layer)


def test_wanda_per_output_takes_the_same_share_of_each():
    model = dense()
    model.layers[0].kernel.assign(model.layers[0].kernel.numpy() * np.linspace(0.1, 3, 10))
    gone = removed(dw.prune(model, 0.6, criterion=Wanda(per_output=True), data=X))
    assert (gone.sum(axis=0) == 12).all()
    rated = np.abs(model.layers[0].kernel.numpy()) * np.linalg.norm(X, axis=0)[:, None]
    for column in range(10):
        assert rated[gone[:, column], column].max() < rated[~gone[:, column], column].min()


def test_wanda_says_what_it_cannot_see():
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, L.LSTM(4, name="lstm")(inputs))
    with pytest.raises(dw.UnsupportedModelError, match=r"those of `lstm/cell/kernel` \(LSTMCell\)"):
        dw.prune(model, criterion="wanda", data=np.zeros((4, 5, 3), np.float32))
    found = effective_weights(dw.prune(model, 0.5, criterion="taylor", data=(np.ones((4, 5, 3)), np.ones((4, 4)))))
    assert all((value == 0).mean() == 0.5 for value in found.values())


def test_random_is_seeded():
    first, again, other = (removed(dw.prune(dense(), 0.5, criterion=Random(seed=seed))) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
    assert first.sum() == 100


def test_the_compiled_loss_is_used():
    model = dense()
    model.compile("sgd", "mean_absolute_error")
    w = model.layers[0].kernel.numpy()
    slope = X.T @ np.sign(X @ w - Y) / Y.size
    order = np.argsort(np.abs(w * slope).astype(np.float32), axis=None)
    gone = removed(dw.prune(model, 0.5, criterion="snip", data=(X, Y))).ravel()
    assert gone[order[:95]].all()
    assert not gone[order[105:]].any()


def test_proximal_steps_are_soft_thresholds_and_make_exact_zeros():
    model = dense()
    w = model.layers[0].kernel.numpy()
    twin = dw.prune(model, sparsity=0.0, criterion=Proximal(strength=0.05))
    twin.compile(keras.optimizers.SGD(0.1), "mse")
    twin.fit(X, Y, batch_size=60, verbose=0)
    stepped = w - 0.1 * gradient(w, X, Y)
    expected = np.sign(stepped) * np.maximum(np.abs(stepped) - 0.05, 0)
    np.testing.assert_allclose(twin.layers[0].weights[0].numpy(), expected, atol=1e-5)
    for _ in range(30):
        twin.fit(X, Y, batch_size=60, verbose=0)
    assert (effective_weights(twin)["d", "kernel"] == 0).mean() > 0.5


def test_proximal_and_l1_prune_as_well(tmp_path):
    for criterion, kinds in ((Proximal(strength=1e-3), ["proximal_l1", "mask"]), (L1(strength=1e-3), ["mask", "l1"])):
        twin = dw.prune(dense(), 0.8, criterion=criterion, schedule=dw.PolynomialDecay(end=4, frequency=1))
        assert [t.kind for t in attached(twin)["d", "kernel"]] == kinds
        twin.compile("adam", "mse")
        twin.fit(X, Y, batch_size=12, verbose=0)
        twin.save(tmp_path / "twin.keras")
        again = dw.load(tmp_path / "twin.keras")
        again.fit(X, Y, batch_size=12, verbose=0)
        assert removed(again).sum() == 160


def test_movement_follows_the_paper_for_a_step_and_keeps_the_highest_scores():
    model = dense()
    w = model.layers[0].kernel.numpy()
    twin = dw.prune(
        model, 0.5, criterion="movement", schedule=dw.PolynomialDecay(begin=2, end=4, frequency=1, power=1.0)
    )
    twin.compile(keras.optimizers.SGD(0.1), "mse")
    s, mask = np.zeros_like(w), np.ones_like(w)
    for step in range(6):
        if 2 <= step <= 4:
            mask = np.ones(200)
            mask[np.argsort(s, axis=None, kind="stable")[: round(100 * (step - 2) / 2)]] = 0
            mask = mask.reshape(w.shape)
        raw, bias = (variable.numpy() for variable in twin.layers[0].weights[:2])
        slope = X.T @ (2 * (X @ (raw * mask) + bias - Y)) / Y.size
        twin.fit(X, Y, batch_size=60, verbose=0)
        s = s - 0.1 * slope * raw
        np.testing.assert_allclose(_scores_of(twin), s, atol=1e-5)
        np.testing.assert_allclose(effective_weights(twin)["d", "kernel"], (raw - 0.1 * slope) * mask, atol=1e-5)
    assert removed(twin).sum() == 100


def _scores_of(twin):
    return next(v for v in twin.layers[0].weights if "scores" in v.name).numpy()


@pytest.mark.parametrize("structure", ["element", (2, 5)])
def test_regrowth_swaps_the_smallest_for_the_steepest_and_starts_them_at_zero(structure):
    model = dense()
    schedule = dw.Constant(begin=1, end=9, frequency=4, regrow=0.4)
    twin = dw.prune(model, 0.7, structure=structure, schedule=schedule)
    twin.compile(keras.optimizers.SGD(0.05), "mse")
    units = 200 if structure == "element" else 20
    size = 200 // units

    def rate(values):
        if structure == "element":
            return values.ravel()
        return values.reshape(10, 2, 2, 5).mean(axis=(1, 3)).ravel()

    def spread(values):
        return values.reshape(20, 10) if structure == "element" else values.reshape(10, 2).repeat(2, 0).repeat(5, 1)

    mask, slope = np.ones((20, 10), bool), None
    gone_count, changed = round(0.7 * units), 0
    for step in range(12):
        w, bias = effective_weights(twin)["d", "kernel"], twin.layers[0].bias.numpy()
        if step in (1, 5, 9):
            alive = rate(mask.astype(float)) > 0
            rated = np.where(alive, rate(np.abs(w)), -1)
            back = round(0.2 * (1 + np.cos(np.pi * (step - 1) / 8)) * (units - gone_count))
            gone = np.zeros(units, bool)
            gone[np.argsort(rated, kind="stable")[: gone_count + back]] = True
            grown = np.argsort(np.where(gone, -rate(np.abs(slope)), np.inf), kind="stable")[:back]
            gone[grown] = False
            new = spread(~gone)
            changed += int((new & ~mask).sum())
            w = np.where(new & mask, w, 0)
            mask = new
        twin.fit(X, Y, batch_size=60, verbose=0)
        error = 2 * (X @ w + bias - Y) / Y.size
        slope = X.T @ error
        np.testing.assert_array_equal(effective_weights(twin)["d", "kernel"] != 0, mask)
        np.testing.assert_allclose(
            effective_weights(twin)["d", "kernel"], np.where(mask, w - 0.05 * slope, 0), atol=1e-5
        )
    assert (~mask).sum() == gone_count * size
    assert changed > 0 or structure != "element"


def test_every_criterion_prunes_and_a_name_is_its_object():
    for name, criterion in CRITERIA.items():
        schedule = dw.PolynomialDecay(begin=1, end=3, frequency=1) if criterion.needs_schedule else None
        data = (X, Y) if criterion.needs_data else None
        for given in (name, criterion()):
            twin = dw.prune(dense(), 0.8, criterion=given, data=data, schedule=schedule)
            if schedule is not None:
                twin.compile("sgd", "mse")
                twin.fit(X, Y, batch_size=10, verbose=0)
            assert removed(twin).sum() == 160, name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"criterion": "taylor"}, dw.ConfigError, r"`data` is None, and criterion `taylor` needs labelled samples"),
        ({"criterion": "fisher", "data": X}, dw.DataError, r"no labels"),
        ({"criterion": "wanda"}, dw.ConfigError, r"criterion `wanda` needs samples"),
        ({"criterion": "wanda", "data": X[:, :7]}, dw.DataError, r"model's input has \(20,\)"),
        (
            {"criterion": "movement"},
            dw.ConfigError,
            r"movement learns its scores in training, so it needs a `schedule`",
        ),
        ({"criterion": "tailor"}, dw.ConfigError, r"did you mean `taylor`"),
    ],
)
def test_criteria_without_what_they_need_say_so(arguments, error, message):
    with pytest.raises(error, match=message):
        dw.prune(dense(), 0.5, **arguments)


def test_settings_out_of_range_are_refused():
    for make in (lambda: Taylor(samples=0), lambda: Proximal(strength=0.0), lambda: L1(strength=-1)):
        with pytest.raises(dw.ConfigError, match="it must be"):
            make()
    schedule = dw.PolynomialDecay(end=4, regrow=0.2)
    with pytest.raises(dw.ConfigError, match="not with movement"):
        dw.prune(dense(), 0.5, criterion=Movement(), schedule=schedule)
