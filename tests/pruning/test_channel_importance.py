"""Each criterion against a few lines of NumPy, or a loss that is computed with the channel really masked."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.pruning import ChannelOptions, groups, plan_channels
from dwindle.pruning.channel_importance import CHANNEL_CRITERIA, Evidence, scores
from dwindle.pruning.loss_gradients import labelled_samples, loss_gradients, loss_of
from dwindle.pruning.slimming import slim

L = keras.layers


def network():
    inputs = keras.Input((6, 6, 2))
    x = L.ReLU()(L.BatchNormalization(name="norm")(L.Conv2D(5, 3, name="made")(inputs)))
    model = keras.Model(inputs, L.Dense(3, name="head")(L.Flatten()(x)))
    generator = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(generator.normal(0.2, 0.5, variable.shape) ** (2 if "variance" in variable.name else 1))
    return model


def evidence(model, data=None, batch=8):
    found = groups(model)
    sites = found.analysis.sites
    gradients = {}
    if data is not None:
        split = labelled_samples(model, data, 64, "the test")
        taking = [key for key, site in sites.items() if "in" in site.roles]
        values = loss_gradients(
            model, split, loss_of(model, split, None), batch=batch, variables=[sites[key].variable for key in taking]
        )
        gradients = dict(zip(taking, values, strict=True))
    weights = {key: site.variable.numpy() for key, site in sites.items()}
    group = next(group for group in found if group.producers == ("made",))
    return group, Evidence(weights=weights, gradients=gradients, generator=np.random.default_rng(0))


def test_norms_are_means_over_the_kernels_of_relative_sizes():
    model = network()
    made, head = model.get_layer("made").kernel.numpy(), model.get_layer("head").kernel.numpy().reshape(16, 5, 3)
    for name, size in (("l1", lambda w: np.abs(w).sum()), ("l2", lambda w: np.sqrt((w**2).sum()))):
        a = np.array([size(made[..., c]) for c in range(5)])
        b = np.array([size(head[:, c]) for c in range(5)])
        found = CHANNEL_CRITERIA[name].score(*evidence(model))
        np.testing.assert_allclose(found, (a / a.mean() + b / b.mean()) / 2, rtol=1e-5)


def test_scales_are_those_of_the_normalization_and_a_group_without_one_stays():
    model = network()
    found = CHANNEL_CRITERIA["batchnorm-scale"].score(*evidence(model))
    np.testing.assert_allclose(found, np.abs(model.get_layer("norm").gamma.numpy()))
    plain = keras.Sequential(
        [keras.Input((3,)), L.Dense(4, name="a"), L.BatchNormalization(), L.Dense(4, name="b"), L.Dense(2)]
    )
    plan = plan_channels(plain, ChannelOptions(criterion="batchnorm-scale"))
    assert "b stays: `batchnorm-scale` has nothing to judge it by" in plan.notes
    assert [layer.units for layer in plan.apply().layers if isinstance(layer, L.Dense)] == [2, 4, 2]


def test_geometric_median_is_the_sum_of_distances():
    model = network()
    made = model.get_layer("made").kernel.numpy().reshape(-1, 5).T
    distances = np.linalg.norm(made[:, None] - made[None], axis=-1).sum(axis=1)
    found = CHANNEL_CRITERIA["geometric-median"].score(*evidence(model))
    np.testing.assert_allclose(found, distances / distances.mean(), rtol=1e-5)


def test_taylor_and_fisher_are_the_derivative_by_a_mask():
    model = network()
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(24, 6, 6, 2)).astype(np.float32), generator.integers(0, 3, 24)
    kernel = model.get_layer("head").kernel
    original = kernel.numpy()

    def loss(channel, mask, part):
        changed = original.reshape(16, 5, 3).copy()
        changed[:, channel] *= mask
        kernel.assign(changed.reshape(80, 3))
        logits = np.float64(model.predict(x[part], verbose=0))
        kernel.assign(original)
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), y[part]])

    step, parts = 1e-2, [slice(begin, begin + 8) for begin in (0, 8, 16)]
    slopes = np.array(
        [[(loss(c, 1 + step, part) - loss(c, 1 - step, part)) / (2 * step) for c in range(5)] for part in parts]
    )
    given = evidence(model, (x, y))
    np.testing.assert_allclose(
        CHANNEL_CRITERIA["taylor"].score(*given), np.abs(slopes.mean(axis=0)), rtol=2e-3, atol=1e-4
    )
    np.testing.assert_allclose(CHANNEL_CRITERIA["fisher"].score(*given), (slopes**2).mean(axis=0), rtol=4e-3, atol=1e-4)


def test_random_is_seeded():
    first, second, third = (
        plan_channels(network(), ChannelOptions(criterion="random", sparsity=0.4, seed=seed)).removed
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize("name", sorted(CHANNEL_CRITERIA))
def test_every_criterion_removes_dead_channels_first(name):
    model = network()
    dead = [1, 3]
    for layer, weight in (("made", "kernel"), ("made", "bias"), ("norm", "gamma"), ("norm", "beta")):
        variable = getattr(model.get_layer(layer), weight)
        value = variable.numpy()
        value[..., dead] = 0
        variable.assign(value)
    head = model.get_layer("head").kernel
    head.assign(np.where(np.isin(np.arange(80) % 5, dead)[:, None], 0, head.numpy()))
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 2)).astype(np.float32)
    plan = plan_channels(model, ChannelOptions(criterion=name, sparsity=0.4), data=(x, np.arange(32) % 3))
    removed = np.flatnonzero(np.isin(next(g for g in plan.groups if g.producers == ("made",)).channels, plan.removed))
    assert len(removed) == 2
    if name == "geometric-median":  # two equal filters are near to each other, whatever their size
        return
    if name != "random":
        assert removed.tolist() == dead
        np.testing.assert_allclose(plan.apply().predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)


def test_scores_of_groups_are_relative_for_one_ranking():
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, name="a"), L.Dense(6, name="b"), L.Dense(2, name="c")])
    model.get_layer("a").kernel.assign(100 * model.get_layer("a").kernel)
    found = groups(model)
    given = Evidence(
        weights={key: site.variable.numpy() for key, site in found.analysis.sites.items()}, gradients={},
        generator=np.random.default_rng(0),
    )  # fmt: skip
    values, notes = scores("l2", [group for group in found if group.pinned is None], given)
    assert [float(value.mean()) for value in values] == pytest.approx([1, 1])
    assert notes == []


def test_slimming_adds_the_penalty_and_takes_it_away():
    model = network()
    before = [variable.numpy() for variable in model.variables]
    twin = slim(model, 0.1)
    assert float(sum(twin.losses)) == pytest.approx(0.1 * np.abs(model.get_layer("norm").gamma.numpy()).sum(), rel=1e-5)
    assert slim(twin, 0).losses == []
    twin.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(64, 6, 6, 2)).astype(np.float32)
    twin.fit(x, np.arange(64) % 3, epochs=30, verbose=0)
    free = slim(model, 0)
    free.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    free.fit(x, np.arange(64) % 3, epochs=30, verbose=0)
    gammas = [np.abs(m.get_layer("norm").gamma.numpy()).sum() for m in (twin, free)]
    assert gammas[0] < 0.7 * gammas[1]
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    with pytest.raises(dw.ConfigError, match="`strength` is -1"):
        slim(model, -1)
    with pytest.raises(dw.UnsupportedModelError, match="no batch normalization"):
        slim(keras.Sequential([keras.Input((3,)), L.Dense(2)]))
