"""Each objective against a NumPy reference; through `fit`, with labels, weights and several outputs."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.distillation import (
    Annealed,
    AttentionMaps,
    Contrast,
    Decoupled,
    Hints,
    Lesson,
    LogitError,
    Relations,
    SoftTargets,
)  # fmt: skip
from dwindle.distillation.objectives import resolve_objective

L = keras.layers
GENERATOR = np.random.default_rng(3)
STUDENT, TEACHER = GENERATOR.normal(0, 3, (2, 6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(axis=-1)


def lesson(task="classes", temperature=3.0, labels=None, student=STUDENT, teacher=TEACHER):
    tensor = keras.ops.convert_to_tensor
    return Lesson(
        student=tensor(student, "float32"), teacher=tensor(teacher, "float32"), task=task, temperature=temperature,
        labels=None if labels is None else tensor(labels),
    )  # fmt: skip


def value(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_soft_targets():
    expected = 9 * kl(softmax(TEACHER / 3), softmax(STUDENT / 3))
    np.testing.assert_allclose(value(SoftTargets().distance(lesson())), expected, rtol=1e-4)


def test_soft_targets_of_yes_or_no_units():
    p, q = 1 / (1 + np.exp(-TEACHER / 3)), 1 / (1 + np.exp(-STUDENT / 3))
    expected = 9 * (kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1))).mean(axis=1)
    np.testing.assert_allclose(value(SoftTargets().distance(lesson("binary"))), expected, rtol=1e-4)


def test_one_yes_or_no_unit_is_two_classes():
    two = [np.concatenate([np.zeros((6, 1)), z[:, :1]], axis=1) for z in (STUDENT, TEACHER)]
    one = lesson("binary", student=STUDENT[:, :1], teacher=TEACHER[:, :1])
    both = lesson("classes", student=two[0], teacher=two[1])
    np.testing.assert_allclose(
        value(SoftTargets().distance(one)), value(SoftTargets().distance(both)), rtol=1e-4, atol=1e-6
    )


def test_soft_targets_of_quantities():
    expected = ((STUDENT - TEACHER) ** 2).mean(axis=1)
    np.testing.assert_allclose(value(SoftTargets().distance(lesson("regression"))), expected, rtol=1e-5)


def test_logit_error_is_half_the_squared_difference_of_centred_logits():
    a, b = (z - z.mean(axis=1, keepdims=True) for z in (STUDENT, TEACHER))
    found = value(LogitError().distance(lesson()))
    np.testing.assert_allclose(found, ((a - b) ** 2).mean(axis=1) / 2, rtol=1e-4)
    # A constant on a sample's logits, as recovering them from probabilities leaves, changes nothing.
    moved = lesson(student=STUDENT + 7, teacher=TEACHER - 5)
    np.testing.assert_allclose(value(LogitError().distance(moved)), found, rtol=1e-3)


def test_soft_targets_tend_to_the_logit_error():
    # In float32 the difference of nearly equal distributions has few digits left.
    found = value(SoftTargets().distance(lesson(temperature=100.0)))
    np.testing.assert_allclose(found, value(LogitError().distance(lesson())), rtol=0.05)


def decoupled(labels, target, others, temperature=3.0):
    rows = np.arange(len(labels))
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    first = kl(*(np.stack([z[rows, labels], 1 - z[rows, labels]], -1) for z in (p, q)))
    wrong = [np.stack([np.delete(z[i], labels[i]) for i in rows]) for z in (TEACHER, STUDENT)]
    second = kl(*(softmax(z / temperature) for z in wrong))
    return temperature**2 * (target * first + others * second)


@pytest.mark.parametrize("form", ["numbers", "column", "one-hot"])
def test_decoupled(form):
    labels = {"numbers": LABELS, "column": LABELS[:, None], "one-hot": np.eye(5)[LABELS]}[form]
    found = value(Decoupled(target=0.7, others=2.0).distance(lesson(labels=labels)))
    np.testing.assert_allclose(found, decoupled(LABELS, 0.7, 2.0), rtol=1e-4)


def test_decoupled_without_labels_takes_the_teachers_first():
    np.testing.assert_allclose(
        value(Decoupled().distance(lesson())), decoupled(TEACHER.argmax(axis=1), 1.0, 8.0), rtol=1e-4
    )


def test_soft_targets_are_decoupled_with_the_teachers_doubt_as_weight():
    p = softmax(TEACHER / 3)[np.arange(6), LABELS]
    target, both = (value(Decoupled(target=1.0, others=o).distance(lesson(labels=LABELS))) for o in (0.0, 1.0))
    expected = value(SoftTargets().distance(lesson()))
    np.testing.assert_allclose(target + (1 - p) * (both - target), expected, rtol=1e-4)


def huber(d):
    return np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5)


def test_relations():
    a, b = GENERATOR.normal(size=(6, 4)), GENERATOR.normal(size=(6, 7))  # sizes differ
    expected_pairs, expected_angles = [], []
    units, distances = [], []
    for z in (a, b):
        gap = z[None] - z[:, None]
        length = np.sqrt((gap**2).sum(-1))
        distances.append(length / length[length > 0].mean())
        units.append(gap / np.where(length > 0, length, 1)[..., None])
    for i in range(6):
        expected_pairs.append(huber(distances[0][i] - distances[1][i]).mean())
        cosines = [u[i] @ u[i].T for u in units]
        expected_angles.append(huber(cosines[0] - cosines[1]).mean())
    tensors = [keras.ops.convert_to_tensor(z, "float32") for z in (a, b)]
    pairs = value(Relations(distances=1.0, angles=0.0).distance(*tensors))
    angles = value(Relations(distances=0.0, angles=1.0).distance(*tensors))
    np.testing.assert_allclose(pairs, expected_pairs, rtol=1e-4)
    np.testing.assert_allclose(angles, expected_angles, rtol=1e-4)
    both = value(Relations(distances=3.0, angles=0.5).distance(*tensors))
    np.testing.assert_allclose(both, 3 * pairs + angles / 2, rtol=1e-5)


def test_attention_maps():
    a, b = GENERATOR.normal(size=(3, 4, 5, 2)), GENERATOR.normal(size=(3, 4, 5, 6))
    maps = [(z**2).mean(-1).reshape(3, -1) for z in (a, b)]
    maps = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps]
    found = AttentionMaps(student="x").distance(*(keras.ops.convert_to_tensor(z, "float32") for z in (a, b)))
    np.testing.assert_allclose(value(found), ((maps[0] - maps[1]) ** 2).sum(axis=1), rtol=1e-4)


def test_hints_resize_the_teachers_map():
    a = GENERATOR.normal(size=(3, 2, 2, 4))
    b = np.repeat(np.repeat(a, 2, axis=1), 2, axis=2) + 2  # the mean over each 2x2 is a + 2
    found = Hints(student="x").distance(*(keras.ops.convert_to_tensor(z, "float32") for z in (a, b)))
    # Antialiased resizing of constant blocks takes a little of the neighbours.
    np.testing.assert_allclose(value(found), 2.0, rtol=0.35)
    same = Hints(student="x").distance(*(keras.ops.convert_to_tensor(z, "float32") for z in (a, a + 2)))
    np.testing.assert_allclose(value(same), 2.0, rtol=1e-5)


def test_contrast():
    a, b = GENERATOR.normal(size=(5, 3, 2, 4)), GENERATOR.normal(size=(5, 6, 4))
    pooled = [a.mean(axis=(1, 2)), b.mean(axis=1)]
    s, t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in pooled)
    expected = -np.log(softmax(s @ t.T / 0.2).diagonal())
    tensors = [keras.ops.convert_to_tensor(z, "float32") for z in (a, b)]
    np.testing.assert_allclose(value(Contrast(student="x", tau=0.2).distance(*tensors)), expected, rtol=1e-4)
    flat = [keras.ops.convert_to_tensor(z, "float32") for z in pooled]
    np.testing.assert_allclose(value(Contrast(student="x", tau=0.2).distance(*flat)), expected, rtol=1e-4)
    same = Contrast(student="x").distance(*(keras.ops.ones((7, 4)) for _ in "ab"))
    np.testing.assert_allclose(value(same), np.log(7), rtol=1e-5)


@pytest.mark.parametrize("one", [SoftTargets(weight=2.0), Decoupled(others=3.0), Relations(student="a", angles=0.0),
                                 Hints(student="a", teacher="b"), AttentionMaps(student="a", power=1.0),
                                 Contrast(student="a", tau=0.5)])  # fmt: skip
def test_objectives_go_through_plain_data(one):
    assert resolve_objective(one.to_dict()) == one


def test_the_temperature_goes_down_in_a_straight_line():
    annealed = Annealed(steps=10, start=11.0, end=1.0)
    assert [float(annealed.at(step)) for step in (0, 5, 10, 99)] == pytest.approx([11, 6, 1, 1])


# Through fit: what is compared, with which weights.


def dense(kernels, activation=None, names=None):
    """A model of one Dense per kernel on the same input."""
    inputs = keras.Input((3,))
    names = names or [f"out{number}" for number in range(len(kernels))]
    activations = activation if isinstance(activation, list) else [activation] * len(kernels)
    outputs = [
        L.Dense(kernel.shape[1], use_bias=False, activation=one, name=name)(inputs)
        for kernel, one, name in zip(kernels, activations, names, strict=True)
    ]
    model = keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0])
    for name, kernel in zip(names, kernels, strict=True):
        model.get_layer(name).kernel.assign(kernel)
    return model


X = GENERATOR.normal(size=(8, 3)).astype(np.float32)
A, B, C = GENERATOR.normal(size=(3, 3, 4))
Y = np.arange(8) % 4


def fitted(coach, y=Y, loss=None, **kwargs):
    coach.compile(keras.optimizers.SGD(0.0), loss)
    return coach.fit(X, y, batch_size=8, verbose=0, **kwargs).history["loss"][0]


def test_no_labels_and_no_loss():
    found = fitted(dw.distill(dense([A]), dense([B]), temperature=2.0, alpha=0.25), y=None)
    assert found == pytest.approx(0.25 * 4 * kl(softmax(X @ B / 2), softmax(X @ A / 2)).mean(), rel=1e-4)


def test_a_loss_is_not_used_without_labels():
    coach = dw.distill(dense([A]), dense([B]), temperature=2.0, beta=1.0)
    found = fitted(coach, y=None, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert found == pytest.approx(4 * kl(softmax(X @ B / 2), softmax(X @ A / 2)).mean(), rel=1e-4)


def test_class_weights_weigh_both_terms():
    factor = {0: 1.0, 1: 3.0, 2: 0.0, 3: 0.5}
    weight = np.array([factor[label] for label in Y])
    coach = dw.distill(dense([A]), dense([B]), temperature=2.0, beta=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = fitted(coach, loss=loss, class_weight=factor)
    cross = -np.log(softmax(X @ A)[np.arange(8), Y])
    expected = (weight * cross).mean() + 4 * (weight * kl(softmax(X @ B / 2), softmax(X @ A / 2))).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_several_teachers_are_averaged():
    coach = dw.distill(dense([A]), [dense([B]), dense([C], "softmax")], temperature=2.0, alpha=1.0)
    distances = [4 * kl(softmax(X @ one / 2), softmax(X @ A / 2)).mean() for one in (B, C)]
    assert fitted(coach) == pytest.approx(np.mean(distances), rel=1e-4)


def test_several_objectives_are_added():
    coach = dw.distill(
        dense([A]), dense([B]), temperature=2.0, alpha=1.0, objective=["soft", LogitError(weight=0.5)]
    )  # fmt: skip
    a, b = (z - z.mean(axis=1, keepdims=True) for z in (X @ A, X @ B))
    expected = 4 * kl(softmax(X @ B / 2), softmax(X @ A / 2)).mean() + 0.25 * ((a - b) ** 2).mean()
    assert fitted(coach) == pytest.approx(expected, rel=1e-4)


def test_outputs_of_different_meaning_in_one_model():
    activations = ["softmax", "sigmoid", "relu"]
    coach = dw.distill(dense([A, A, A], activations), dense([B, B, B], activations), temperature=2.0, alpha=1.0)
    assert coach.settings.tasks == ("classes", "binary", "regression")
    p, q = 1 / (1 + np.exp(-X @ B / 2)), 1 / (1 + np.exp(-X @ A / 2))
    expected = [
        4 * kl(softmax(X @ B / 2), softmax(X @ A / 2)).mean(),
        4 * kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1)).mean(),
        ((np.maximum(X @ A, 0) - np.maximum(X @ B, 0)) ** 2).mean(),
    ]
    assert fitted(coach, y=[Y, (p > 0.5).astype(float), X @ B]) == pytest.approx(sum(expected), rel=1e-3)


@pytest.mark.parametrize(("loss", "task"), [
    (keras.losses.BinaryCrossentropy(from_logits=True), "binary"), ("mse", "regression"), ("kld", "classes"), (None, "classes")])  # fmt: skip
def test_the_loss_says_what_linear_outputs_mean(loss, task, tmp_path):
    coach = dw.distill(dense([A]), dense([B]), temperature=2.0, beta=1.0)
    coach.compile(keras.optimizers.SGD(0.0), loss)
    assert coach.tasks == (task,)
    found = coach.fit(X, batch_size=8, verbose=0).history["loss"][0]
    p, q = (1 / (1 + np.exp(-X @ z / 2)) for z in (B, A))
    expected = {
        "binary": 4 * kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1)).mean(),
        "regression": ((X @ A - X @ B) ** 2).mean(),
        "classes": 4 * kl(softmax(X @ B / 2), softmax(X @ A / 2)).mean(),
    }
    assert found == pytest.approx(expected[task], rel=1e-3)
    coach.save(tmp_path / "coach.keras")
    assert dw.load(tmp_path / "coach.keras").tasks == coach.tasks


def test_losses_say_it_of_each_output_unless_it_is_known():
    coach = dw.distill(dense([A, C, B], [None, None, "softmax"]), dense([B, B, B], [None, None, "softmax"]))
    coach.compile("sgd", {"out0": "mse", "out1": keras.losses.BinaryCrossentropy(from_logits=True), "out2": "mse"})
    assert coach.tasks == ("regression", "binary", "classes")
    coach.compile("sgd", ["categorical_crossentropy", "mse", None])
    assert coach.tasks == ("classes", "regression", "classes")
    given = dw.distill(dense([A]), dense([B]), task="classes")
    given.compile("sgd", "mse")
    assert given.tasks == ("classes",)
    decoupled = dw.distill(dense([A]), dense([B]), objective="decoupled")
    decoupled.compile("sgd", "mse")
    with pytest.raises(dw.ConfigError, match="`objective` 'decoupled' is for classes, and an output is regression"):
        decoupled.fit(X, X @ B, verbose=0)


def test_losses_metrics_and_weights_of_named_outputs():
    coach = dw.distill(dense([A, C], names=["one", "two"]), dense([B, B], names=["p", "q"]), beta=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    coach.compile(
        keras.optimizers.SGD(0.0), {"one": loss, "two": "mse"}, loss_weights={"one": 1.0, "two": 0.5},
        metrics={"one": ["accuracy"]},
    )  # fmt: skip
    history = coach.fit(X, [Y, X @ B], batch_size=8, verbose=0).history
    cross = -np.log(softmax(X @ A)[np.arange(8), Y]).mean()
    assert history["loss"][0] == pytest.approx(cross + 0.5 * ((X @ C - X @ B) ** 2).mean(), rel=1e-4)
    assert history["one_accuracy"][0] == pytest.approx(((X @ A).argmax(1) == Y).mean())


def test_a_student_of_some_of_the_teachers_classes():
    coach = dw.distill(dense([A[:, :2]]), dense([B], "softmax"), temperature=2.0, alpha=1.0, classes=[3, 1])
    expected = 4 * kl(softmax((X @ B)[:, [3, 1]] / 2), softmax(X @ A[:, :2] / 2)).mean()
    assert fitted(coach, y=Y % 2) == pytest.approx(expected, rel=1e-4)


def test_relations_of_outputs_teach_other_classes():
    coach = dw.distill(dense([A[:, :2]]), dense([B]), alpha=1.0, objective=Relations(angles=0.0))
    distance = Relations(angles=0.0).distance(*(keras.ops.convert_to_tensor(X @ z, "float32") for z in (A[:, :2], B)))
    assert fitted(coach, y=Y % 2) == pytest.approx(float(value(distance).mean()), rel=1e-4)


def test_an_annealed_temperature_counts_steps():
    coach = dw.distill(dense([A]), dense([B]), temperature=Annealed(steps=2, start=5.0, end=1.0), alpha=1.0)
    coach.compile(keras.optimizers.SGD(0.0))
    history = coach.fit(X, epochs=4, batch_size=8, verbose=0).history["loss"]
    expected = [t**2 * kl(softmax(X @ B / t), softmax(X @ A / t)).mean() for t in (5.0, 3.0, 1.0, 1.0)]
    np.testing.assert_allclose(history, expected, rtol=1e-4)


@pytest.mark.parametrize("made", ["dense", "activation", "layer", "operation"])
def test_logits_are_recovered_however_the_softmax_is_made(made):
    inputs = keras.Input((3,))
    kernel = B * 8  # sure: probabilities down to 1e-20
    z = L.Dense(4, use_bias=False, activation="softmax" if made == "dense" else None, name="z")(inputs)
    z = {
        "dense": lambda z: z,
        "activation": L.Activation("softmax"),
        "layer": L.Softmax(),
        "operation": keras.ops.softmax,
    }[made](z)
    teacher = keras.Model(inputs, z)
    teacher.get_layer("z").kernel.assign(kernel)
    coach = dw.distill(dense([A]), teacher, temperature=20.0, alpha=1.0)
    expected = 400 * kl(softmax(X @ kernel / 20), softmax(X @ A / 20)).mean()
    assert fitted(coach) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "sotf"}, r"`objective` is 'sotf'.*did you mean `soft`"),
        ({"objective": {"kind": "decoupled", "othrs": 1.0}}, r"`othrs` is no setting.*did you mean `others`"),
        ({"objective": Hints(student="z")}, "pass it in `features`"),
        ({"features": {"out0": "z"}}, r"names the layer 'z', which `\w+` does not have"),
        ({"features": SoftTargets()}, "pass it in `objective`"),
        ({"classes": [0, 4, 1, 2]}, "`classes` has 4, and the teacher has 4 classes, 0 to 3"),
        (
            {"task": "binary", "objective": "decoupled"},
            "`objective` 'decoupled' is for classes, and an output is binary",
        ),
        ({"task": "clases"}, "did you mean `classes`"),
        ({"teacher": []}, "`teacher` is an empty list"),
        ({"temperature": "hot"}, "`temperature` is 'hot'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.distill(**{"student": dense([A]), "teacher": dense([B]), **arguments})


def test_bad_settings():
    with pytest.raises(dw.ConfigError, match="`others` of Decoupled is -1"):
        Decoupled(others=-1.0)
    with pytest.raises(dw.ConfigError, match="`tau` of Contrast is 0"):
        Contrast(student="a", tau=0.0)
    with pytest.raises(dw.ConfigError, match="`student` of Contrast is None"):
        Contrast()
    with pytest.raises(dw.ConfigError, match="`steps` of Annealed is 0"):
        Annealed(steps=0)
    student = dense([A])
    with pytest.raises(dw.ConfigError, match="`teacher` is the student itself"):
        dw.distill(student, student)
