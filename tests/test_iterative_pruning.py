"""Pruning until a requirement is met or missed: which sparsities are tried, what comes back, interruption."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.attaching import effective_weights
from dwindle.iterative_pruning import Round, _Settings

L = keras.layers
X = np.random.default_rng(0).normal(size=(256, 12)).astype(np.float32)
Y = (X[:, :4].sum(axis=1) > 0).astype(np.int64)
SETTINGS = {
    "compile": {
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
    },
    "fit": {"epochs": 3, "batch_size": 64},
}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), L.Dense(32, "relu", name="a"), L.Dense(2, "softmax", name="b")])
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    model.fit(X, Y, epochs=15, verbose=0)
    return model


def tried(settings, good):
    """Play the search against a rule that says which sparsities are good enough."""
    rounds = []
    while (sparsity := settings.next(rounds)) is not None:
        rounds.append(Round(sparsity=sparsity, value=0.0, met=good(sparsity), seconds=0.0))
    return rounds


def test_sparsities_rise_by_a_share_of_what_is_left_and_step_back_half_way():
    settings = _Settings(start=0.5, step=0.5, stop=0.99, refinements=2)
    found = tried(settings, lambda sparsity: sparsity < 0.9)
    assert [round(one.sparsity, 4) for one in found] == [0.5, 0.75, 0.875, 0.9375, 0.9116, 0.8949]
    assert [one.met for one in found] == [True, True, True, False, False, True]
    assert [round(one.sparsity, 4) for one in tried(settings, lambda _: True)] == [
        0.5, 0.75, 0.875, 0.9375, 0.9688, 0.9844, 0.99,
    ]  # fmt: skip
    assert [round(one.sparsity, 4) for one in tried(settings, lambda _: False)] == [0.5, 0.2929, 0.1591]


def test_the_sparsest_good_model_comes_back(model, capsys):
    before = [value.numpy() for value in model.weights]
    found = dw.prune_until(
        model,
        train=(X, Y),
        validation=(X, Y),
        max_drop=0.03,
        start=0.6,
        step=0.5,
        refinements=1,
        scope="global",
        **SETTINGS,
    )
    assert found.met
    assert found.sparsity == pytest.approx(max(one.sparsity for one in found.rounds if one.met), abs=0.002)
    outputs = found.model.predict(X, verbose=0)
    assert (outputs.argmax(axis=1) == Y).mean() == pytest.approx(found.value)
    assert found.value >= found.required == pytest.approx(found.baseline - 0.03)
    assert not all(one.met for one in found.rounds) or found.rounds[-1].sparsity == pytest.approx(0.99)
    for value, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(value.numpy(), old)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(found.rounds)
    assert printed[0].startswith("round 1: sparsity 0.6000")


def test_a_requirement_out_of_reach_returns_the_model_as_it_was(model):
    found = dw.prune_until(
        model, train=(X, Y), validation=(X, Y), at_least=1.01, start=0.9, refinements=1, progress=None, **SETTINGS
    )
    assert not found.met
    assert (found.sparsity, len(found.rounds)) == (0.0, 2)
    np.testing.assert_array_equal(found.model.predict(X, verbose=0), model.predict(X, verbose=0))


def test_an_interrupted_search_goes_on(model, tmp_path):
    class Stop(Exception):
        pass

    lines = []

    def interrupt(line):
        lines.append(line)
        if len(lines) == 2:
            raise Stop

    arguments = {
        "train": (X, Y), "validation": (X, Y), "max_drop": 0.5, "start": 0.5, "step": 0.5, "stop": 0.9,
        "folder": tmp_path / "rounds", **SETTINGS,
    }  # fmt: skip
    with pytest.raises(Stop):
        dw.prune_until(model, progress=interrupt, **arguments)
    more = []
    found = dw.prune_until(model, progress=more.append, **arguments)
    assert [round(one.sparsity, 3) for one in found.rounds] == [0.5, 0.75, 0.875, 0.9]
    assert [line.split(":")[0] for line in more] == ["round 3", "round 4"]
    assert found.sparsity == pytest.approx(0.9, abs=0.01)
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir()) == ["round-004.keras", "rounds.json"]
    again = dw.prune_until(model, progress=None, **arguments)
    for key, value in effective_weights(again.model).items():
        np.testing.assert_array_equal(value, effective_weights(found.model)[key])
    with pytest.raises(dw.ConfigError, match=r"holds rounds with another step: 0\.5, and here it is 0\.4"):
        dw.prune_until(model, **{**arguments, "step": 0.4})


def test_a_loss_may_not_rise_and_functions_make_settings(model):
    found = dw.prune_until(
        model, train=(X, Y), validation=(X, Y), metric="sparse_categorical_crossentropy", max_drop=0.1, start=0.5, step=0.6,
        compile=lambda: {"optimizer": "adam", "loss": "sparse_categorical_crossentropy"}, fit={"epochs": 2}, refinements=0,
        progress=None,
    )  # fmt: skip
    assert found.required == pytest.approx(found.baseline + 0.1)
    assert all(one.met == (one.value <= found.required) for one in found.rounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass one of `max_drop`"),
        ({"max_drop": 0.1, "at_least": 0.9}, "pass one of `max_drop`"),
        ({"max_drop": 0.1, "step": 1.0}, r"`step` is 1.0"),
        ({"max_drop": 0.1, "start": 0.995}, r"`start` is 0.995 and `stop` is 0.99"),
        ({"max_drop": 0.1, "refinements": -1}, r"`refinements` is -1"),
        ({"max_drop": 0.1, "structure": "2:4"}, r"`structure` is '2:4'; pruning in rounds"),
    ],
)
def test_bad_input_is_one_clear_sentence(model, arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.prune_until(model, train=(X, Y), validation=(X, Y), **SETTINGS, **arguments)
