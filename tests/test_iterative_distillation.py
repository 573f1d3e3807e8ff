"""Distilling in rounds until a requirement is met: who comes back, what is reported, going on after an interruption."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw

L = keras.layers
X = np.random.default_rng(0).normal(size=(512, 12)).astype(np.float32)
Y = (X[:, :4].sum(axis=1) > 0).astype(np.int64)
COMPILE = {"optimizer": keras.optimizers.Adam(0.01), "loss": "sparse_categorical_crossentropy"}
FIT = {"epochs": 2, "batch_size": 64}


def network(units, seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((12,)), L.Dense(units, "relu"), L.Dense(2, "softmax")], name=f"units{units}")


@pytest.fixture(scope="module")
def teacher():
    model = network(32)
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    model.fit(X, Y, epochs=15, verbose=0)
    return model


def accuracy(model):
    return float((model.predict(X, verbose=0).argmax(1) == Y).mean())


def until(student, teacher, **changed):
    arguments = {"train": (X, Y), "validation": (X, Y), "compile": COMPILE, "fit": FIT, "progress": None, **changed}
    return dw.distill_until(student, teacher, **arguments)


def test_rounds_go_on_until_the_student_is_good_enough(teacher, capsys):
    found = until(network(8, 1), teacher, max_drop=0.03, rounds=12, progress=print, temperature=2.0)
    assert found.met
    assert found.teacher == pytest.approx(accuracy(teacher))
    assert found.required == pytest.approx(found.teacher - 0.03)
    assert len(found.rounds) > 1
    assert [one.met for one in found.rounds] == [one.value >= found.required for one in found.rounds]
    assert [one.met for one in found.rounds].index(True) == len(found.rounds) - 1
    assert found.value == accuracy(found.model) == found.rounds[-1].value
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found.rounds)
    assert lines[0].startswith(f"units8, round 1: {found.rounds[0].value:.4f} (teacher {found.teacher:.4f}, required")
    assert "not good enough" in lines[0]
    assert ": good enough" in lines[-1]


def test_the_first_of_several_students_that_is_good_enough_comes_back(teacher):
    small, middle, large = network(1, 1), network(16, 1), network(32, 1)
    untouched = large.get_weights()
    found = until([small, middle, large], teacher, at_least=0.95, rounds=6)
    assert found.met
    assert found.model is middle
    assert [one.student for one in found.rounds][:6] == [0] * 6
    assert max(one.student for one in found.rounds) == 1
    for before, after in zip(untouched, large.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_where_none_is_good_enough_the_best_round_comes_back(teacher):
    settings = {**COMPILE, "optimizer": keras.optimizers.SGD(3.0)}  # goes up and down
    found = until(network(4, 1), teacher, at_least=1.0, rounds=5, compile=settings)
    assert not found.met
    assert found.value == max(one.value for one in found.rounds) == accuracy(found.model)


def test_what_the_student_reaches_alone_is_told_and_thrown_away(teacher):
    found = until(network(8, 1), teacher, at_least=0.0, alone=True, rounds=1)
    assert [one.number for one in found.rounds] == [0, 1]
    same = network(8, 1)
    expected = until(same, teacher, at_least=0.0, rounds=1)
    assert expected.alone is None
    keras.utils.set_random_seed(1)
    control = network(8, 1)
    control.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    control.fit(X, Y, verbose=0, **FIT)
    assert found.alone == pytest.approx(accuracy(control), abs=0.02)  # other order of samples


def test_no_student_is_trained_alone_once_another_is_good_enough(teacher):
    found = until([network(8, 1), network(16, 1)], teacher, at_least=0.0, alone=True)
    assert [(one.student, one.number) for one in found.rounds] == [(0, 0), (0, 1)]


def test_an_interrupted_search_goes_on_where_it_was(teacher, tmp_path):
    class Interrupts(keras.callbacks.Callback):
        calls = 0

        def on_train_begin(self, logs=None):
            del logs
            Interrupts.calls += 1
            if Interrupts.calls == 3:
                raise KeyboardInterrupt

    settings = {"at_least": 1.0, "rounds": 4, "folder": tmp_path / "rounds"}
    with pytest.raises(KeyboardInterrupt):
        until(network(2, 1), teacher, **settings, fit={**FIT, "callbacks": [Interrupts()]})
    found = until(network(2, 1), teacher, **settings)
    whole = until(network(2, 1), teacher, at_least=1.0, rounds=4)
    assert [one.number for one in found.rounds] == [one.number for one in whole.rounds] == [1, 2, 3, 4]
    assert found.value == accuracy(found.model)
    again = until(network(2, 1), teacher, **settings)
    assert [one.value for one in again.rounds] == [one.value for one in found.rounds]
    np.testing.assert_array_equal(again.model.get_weights()[0], found.model.get_weights()[0])
    with pytest.raises(dw.ConfigError, match="holds rounds with another rounds: 4, and here it is 5"):
        until(network(2, 1), teacher, at_least=1.0, rounds=5, folder=tmp_path / "rounds")


def test_a_teacher_may_be_recorded_where_the_goal_is_a_number(teacher, tmp_path):
    said = dw.record(teacher, X, tmp_path / "said")
    found = until(network(8, 1), said, at_least=0.6, train=(X,), rounds=6, alpha=1.0)
    assert found.met
    assert found.teacher is None
    with pytest.raises(dw.ConfigError, match="`teacher` is a recording, which says nothing of the validation data"):
        until(network(8, 1), said, max_drop=0.1)


@pytest.mark.parametrize(("changed", "message"), [
    ({"rounds": 0}, "`rounds` is 0; it must be a whole number, 1 or more"),
    ({}, "pass one of `max_drop`, such as 0.01, and `at_least`, such as 0.97"),
    ({"max_drop": 0.1, "at_least": 0.9}, "pass one of"),
    ({"at_least": 0.9, "metric": "accuracies"}, "accuracies"),
])  # fmt: skip
def test_bad_settings_get_one_sentence(teacher, changed, message):
    with pytest.raises(dw.ConfigError, match=message):
        until(network(4), teacher, **changed)
    with pytest.raises(dw.ConfigError, match="`student` is empty"):
        until([], teacher, at_least=0.9)
