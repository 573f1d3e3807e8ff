"""The loss against hand-computed cases; the teacher untouched; the student better than alone."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import small_cnn

import dwindle as dw
from dwindle.distillation import ends_in


def linear(kernel, activation=None):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, use_bias=False, activation=activation)])
    model.layers[0].kernel.assign(kernel)
    return model


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize(("arguments", "label_weight", "teacher_weight"), [
    ({"alpha": 0.3}, 0.7, 0.3), ({"beta": 2.0}, 1.0, 2.0), ({"alpha": 1.0}, 0.0, 1.0)])  # fmt: skip
def test_loss_is_the_formula(activation, arguments, label_weight, teacher_weight):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 3, 3))
    x, y, weight = generator.normal(size=(8, 3)).astype(np.float32), np.arange(8) % 3, np.linspace(0.5, 2, 8)
    coach = dw.distill(linear(a, activation), linear(b, activation), temperature=3.0, **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    coach.compile(keras.optimizers.SGD(0.0), loss)
    found = coach.fit(x, y, sample_weight=weight, batch_size=8, verbose=0).history["loss"][0]
    student, teacher = x @ a, x @ b
    p, q = softmax(teacher / 3), softmax(student / 3)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1)
    cross = -np.log(softmax(student)[np.arange(8), y])
    expected = label_weight * (weight * cross).mean() + teacher_weight * 9 * (weight * kl).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_the_student_learns(trained, digits):
    (x, y), _ = digits
    before = [v.numpy().copy() for v in trained.variables]
    student = small_cnn()
    start = [v.numpy().copy() for v in student.trainable_variables]
    coach = dw.distill(student, trained)
    coach.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    coach.fit(x[:256], y[:256], verbose=0)
    assert coach.student is student
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, trained.variables, strict=True))
    assert not any(np.array_equal(a, v.numpy()) for a, v in zip(start, student.trainable_variables, strict=True))
    np.testing.assert_array_equal(coach.predict(x[:9], verbose=0), student.predict(x[:9], verbose=0))


def test_a_student_learns_labels_from_the_teacher_alone(trained, digits):
    (x, y), (x_test, y_test) = digits
    student = dw.shrink(trained, width=0.75)
    coach = dw.distill(student, trained, alpha=1.0)
    coach.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy")
    coach.fit(x, np.zeros_like(y), epochs=4, verbose=0)
    assert (student.predict(x_test, verbose=0).argmax(1) == y_test).mean() > 0.8


def test_saving_in_the_middle_and_going_on_gives_the_same_weights(trained, digits, tmp_path):
    (x, y), _ = digits
    x, y = x[:320], y[:320]

    def begun():
        keras.utils.set_random_seed(1)
        coach = dw.distill(dw.prune(small_cnn(), 0.5, schedule=dw.PolynomialDecay(end=15, frequency=2)), trained)
        coach.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
        coach.fit(x, y, shuffle=False, verbose=0)
        return coach

    # A teacher that was compiled and not trained has an optimizer without variables in the file.
    trained = keras.models.clone_model(trained)
    trained.compile(loss="sparse_categorical_crossentropy")
    straight, stopped = begun(), begun()
    stopped.save(tmp_path / "coach.keras")
    resumed = dw.load(tmp_path / "coach.keras")
    for coach in (straight, resumed):
        coach.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(straight.student.variables, resumed.student.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_ends_in_sees_through_nested_and_separate_activations():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Softmax()])
    outer = keras.Sequential([keras.Input((3,)), inner])
    assert ends_in(inner, "softmax")
    assert ends_in(outer, "softmax")
    assert not ends_in(linear(np.eye(3)), "softmax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "`temperature` is 0"),
        ({"alpha": 1.5}, r"`alpha` is 1.5"),
        ({"beta": -1}, "`beta` is -1"),
        ({"teacher": linear(np.ones((3, 3)))}, r"`student` gives \(None, 10\) and `teacher` gives \(None, 3\)"),
        ({"teacher": "teacher.keras"}, "`teacher.keras` does not exist"),
        ({"teacher": 3}, "`teacher` is a int"),
    ],
)
def test_bad_input(trained, arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.distill(**{"student": small_cnn(), "teacher": trained, **arguments})
