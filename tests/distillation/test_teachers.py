"""Every kind of teacher says the same; recordings cost no teacher and know their data; bad teachers get a sentence."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import small_cnn

import dwindle as dw
from dwindle.distillation import Hints, Recording, record


@pytest.fixture(scope="module")
def few(digits):
    return digits[0][0][:96], digits[0][1][:96]


def first_loss(teacher, x, y=None, *, seed=3, temperature=4.0, **arguments):
    """The loss of a step that changes nothing."""
    keras.utils.set_random_seed(seed)
    coach = dw.distill(small_cnn(), teacher, temperature=temperature, alpha=1.0, **arguments)
    coach.compile(keras.optimizers.SGD(0.0))
    return coach.fit(x, y, batch_size=len(x), verbose=0).history["loss"][0]


def test_a_function_a_file_and_its_path_say_what_the_model_says(trained, few, tmp_path):
    x, _ = few
    expected = first_loss(trained, x)
    trained.save(tmp_path / "teacher.keras")
    assert first_loss(tmp_path / "teacher.keras", x) == pytest.approx(expected, rel=1e-5)
    called = []

    def service(batch):
        called.append(len(batch))
        return trained.predict_on_batch(batch)

    assert first_loss(service, x) == pytest.approx(expected, rel=1e-3)
    assert sum(called) == len(x) + 2  # tried on two, then run once

    # Batches of a generator: the function runs in every step.
    coach = dw.distill(small_cnn(), service, alpha=1.0)
    keras.utils.set_random_seed(3)
    coach.student.set_weights(small_cnn().get_weights())
    coach.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    found = coach.fit(((x,) for _ in range(2)), shuffle=False, steps_per_epoch=1, verbose=0).history["loss"][0]
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_tflite_file_teaches_as_it_is(trained, few, tmp_path):
    x, _ = few
    dw.export(trained, tmp_path / "float.tflite")
    assert first_loss(tmp_path / "float.tflite", x) == pytest.approx(first_loss(trained, x), rel=1e-2)
    dw.export(trained, tmp_path / "int8.tflite", scheme="int8", data=x)
    from dwindle.measuring.litert import LiteRTRunner

    said = np.clip(LiteRTRunner(tmp_path / "int8.tflite").predict([x])[0], 1 / 512, 1 - 1 / 512)
    p = said ** (1 / 4)
    p = p / p.sum(axis=1, keepdims=True)
    keras.utils.set_random_seed(3)
    ours = np.log(small_cnn().predict(x, verbose=0)) / 4
    q = ours - np.log(np.exp(ours).sum(axis=1, keepdims=True))
    expected = 16 * (p * (np.log(p) - q)).sum(axis=1).mean()
    assert first_loss(tmp_path / "int8.tflite", x) == pytest.approx(expected, rel=1e-3)


def test_a_file_teaches_in_compiled_steps(trained, few, tmp_path):
    x, _ = few
    dw.export(trained, tmp_path / "float.tflite")
    keras.utils.set_random_seed(3)
    coach = dw.distill(small_cnn(), tmp_path / "float.tflite", alpha=1.0)
    coach.compile(keras.optimizers.SGD(0.0))
    assert coach.train_on_batch(x) == pytest.approx(first_loss(trained, x), rel=1e-2)


def test_recorded_outputs_teach_what_the_teacher_does_in_any_order(trained, few, tmp_path):
    x, y = few
    recording = record(trained, x, tmp_path / "said")
    assert recording.arrays[0].dtype == np.float16
    assert isinstance(recording.arrays[0], np.memmap)
    said = np.log(np.maximum(trained.predict(x, verbose=0), 1e-37))
    np.testing.assert_allclose(recording.arrays[0], said, rtol=1e-3, atol=1e-3)
    students = []
    for teacher in (trained, recording, tmp_path / "said"):
        keras.utils.set_random_seed(1)
        coach = dw.distill(small_cnn(), teacher, alpha=0.7)
        coach.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
        history = coach.fit(x, y, batch_size=16, epochs=2, validation_data=(x, y), verbose=0).history
        students.append((coach.student.predict(x, verbose=0), history["loss"], history["val_accuracy"]))
    for other in students[1:]:
        for a, b in zip(students[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_recording_is_used_again_and_never_written_over(trained, few, tmp_path):
    x, _ = few
    path = tmp_path / "said"
    runs = []

    def teacher(batch):
        runs.append(len(batch))
        return trained.predict_on_batch(batch)

    first = record(teacher, x, path, batch_size=32)
    computed = len(runs)
    assert computed >= 3
    again = record(teacher, x, path, batch_size=32)
    assert again.key == first.key
    assert len(runs) - computed <= 2  # tried on a batch, which tells whether it still says the same
    with pytest.raises(dw.ConfigError, match="holds recorded outputs of other data"):
        record(teacher, x[:50], path)
    with pytest.raises(dw.ConfigError, match="holds recorded outputs of another teacher"):
        record(small_cnn(), x, path)
    with pytest.raises(dw.ConfigError, match="holds recorded outputs of another `dtype`"):
        record(teacher, x, path, batch_size=32, dtype="float32")
    assert Recording(path).key == first.key
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(dw.ConfigError, match="is there already and no recording"):
        record(trained, x, tmp_path / "mine")


def test_recorded_outputs_of_other_data(trained, few, tmp_path):
    x, y = few
    coach = dw.distill(small_cnn(), record(trained, x, tmp_path / "said"))
    coach.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(dw.DataError, match=r"recorded outputs of other data .*96 samples .* and `x` has 50 samples"):
        coach.fit(x[:50], y[:50], verbose=0)
    with pytest.raises(dw.DataError, match=r"recorded outputs of other data.*in their order"):
        coach.fit(x[::-1].copy(), y, verbose=0)
    with pytest.raises(dw.ConfigError, match="these batches come without its outputs"):
        coach.train_on_batch(x, y)
    with pytest.raises(dw.DataError, match=r"`x` is a \w+, and `teacher` is a recording, which goes with NumPy arrays"):
        coach.fit(((x, y) for _ in range(1)), shuffle=False, verbose=0)
    (tmp_path / "said" / "output-0.npy").write_bytes(b"damaged")
    with pytest.raises(dw.DataError, match="no folder of recorded outputs, or a damaged one"):
        dw.distill(small_cnn(), tmp_path / "said")


def flat(size, seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((size,)), keras.layers.Dense(3)])


def test_inputs_that_do_not_fit(tmp_path):
    file = dw.export(flat(5), tmp_path / "five.tflite").path
    for teacher in (flat(5), file):
        with pytest.raises(dw.ConfigError, match=r"`student` takes \(None, 12\) and `teacher` takes \(None, 5\)"):
            dw.distill(flat(12), teacher)
        with pytest.raises(dw.ConfigError, match=r"`x` has samples of \(None, 12\) and `teacher` takes \(None, 5\)"):
            record(teacher, np.zeros((4, 12), np.float32), tmp_path / "said")
    assert not (tmp_path / "said").exists()
    with pytest.raises(dw.ConfigError, match=r"`student` takes \(None, 28, 28, 1\) and `teacher` takes \(None, 784\)"):
        dw.distill(small_cnn(), keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)]))
    color = keras.Sequential([keras.Input((28, 28, 3)), keras.layers.Flatten(), keras.layers.Dense(10)])
    with pytest.raises(dw.ConfigError, match=r"`teacher` takes \(None, 28, 28, 3\)"):
        dw.distill(small_cnn(), color)
    # A last axis of one may be missing, and an image may be smaller: Keras and the coach see to that.
    for shape in ((28, 28), (14, 14, 1)):
        dw.distill(small_cnn(), keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(10)]))


def test_recorded_outputs_of_several_outputs(tmp_path):
    inputs = keras.Input((4,))
    teacher = keras.Model(inputs, [keras.layers.Dense(3, activation="softmax")(inputs), keras.layers.Dense(2)(inputs)])
    student = keras.models.clone_model(teacher)
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    losses = []
    for told in (teacher, record(teacher, x, tmp_path / "said", dtype="float32")):
        coach = dw.distill(student, told, alpha=1.0)
        coach.compile(keras.optimizers.SGD(0.0))
        losses.append(coach.fit(x, batch_size=20, verbose=0).history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_teacher_that_returns_nan(trained, few, tmp_path):
    x, _ = few
    broken = keras.models.clone_model(trained)
    broken.set_weights(trained.get_weights())
    broken.get_layer("hidden").bias.assign(np.full(32, np.nan))
    with pytest.raises(dw.ConfigError, match=r"`teacher` .* has a weight `.*hidden/bias` with NaN or infinity"):
        dw.distill(small_cnn(), broken)

    def now_and_then(batch):
        said = trained.predict_on_batch(batch)
        said[batch[:, 14, 14, 0] > 0.99] = np.nan
        return said

    bad = np.flatnonzero(x[:, 14, 14, 0] > 0.99)
    assert len(bad)
    with pytest.raises(dw.DataError, match=f"returns NaN or infinity for sample {bad[0]} of 96"):
        record(now_and_then, x, tmp_path / "said")
    assert not (tmp_path / "said").exists()
    coach = dw.distill(small_cnn(), now_and_then)
    coach.compile("sgd")
    with pytest.raises(dw.DataError, match=f"returns NaN or infinity for sample {bad[0]} of 96"):
        coach.fit(x, verbose=0)


def test_samples_with_nan_leave_the_student_whole(few):
    x, _ = few
    x = x.copy()
    x[5] = np.nan  # the student predicts NaN there as well, but learns nothing from it where there are no labels

    class Noisy(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.where(keras.ops.isnan(inputs), 0.0, inputs)

    student = keras.Sequential([keras.Input((28, 28, 1)), Noisy(), *small_cnn().layers])
    # A fused convolution, or pooling, turns NaN into 0 on some processors; a product does not.
    teacher = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    coach = dw.distill(student, teacher, alpha=1.0)
    coach.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(dw.DataError, match="returned NaN or infinity for 1 samples of epoch 1, which were left out"):
        coach.fit(x, verbose=0)
    assert all(np.isfinite(v.numpy()).all() for v in student.variables)


def test_float16_does_not_hold_everything(tmp_path):
    teacher = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, kernel_initializer="ones")])
    x = np.array([[1.0], [1e6]], np.float32)
    with pytest.raises(dw.DataError, match="returns 1e\\+06, which float16 does not hold; pass dtype='float32'"):
        record(teacher, x, tmp_path / "said")
    assert record(teacher, x, tmp_path / "said", dtype="float32").arrays[0][1, 0] == 1e6


def test_a_function_that_does_not_fit():
    def one_row(batch):
        return np.zeros((1, 10))

    def fails(batch):
        raise RuntimeError("out of order")

    with pytest.raises(dw.ConfigError, match=r"`teacher` .*one_row returns \(1, 10\) for 2 samples"):
        dw.distill(small_cnn(), one_row)
    with pytest.raises(dw.ConfigError, match=r"`teacher` .*fails fails on \(2, 28, 28, 1\): out of order"):
        dw.distill(small_cnn(), fails)
    with pytest.raises(dw.ConfigError, match="`features` look at the teacher's layers, and it is no Keras model"):
        dw.distill(small_cnn(), lambda batch: np.zeros((len(batch), 10)), features={"conv": "conv"})
    with pytest.raises(dw.ConfigError, match="`features` look at one teacher, and there are 2"):
        dw.distill(small_cnn(), [small_cnn(), small_cnn()], features=Hints(student="conv"))


@pytest.mark.parametrize("kind", ["recording", "file", "function"])
def test_a_saved_coach_finds_its_teacher_again(kind, trained, few, tmp_path):
    x, _ = few
    if kind == "recording":
        teacher = record(trained, x, tmp_path / "said")
    elif kind == "file":
        teacher = dw.export(trained, tmp_path / "teacher.tflite").path
    else:
        teacher = trained.predict_on_batch
    keras.utils.set_random_seed(2)
    coach = dw.distill(small_cnn(), teacher)
    coach.compile(keras.optimizers.SGD(0.0))
    expected = coach.fit(x, batch_size=96, verbose=0).history["loss"]
    coach.save(tmp_path / "coach.keras")
    loaded = dw.load(tmp_path / "coach.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), coach.predict(x, verbose=0))
    if kind == "function":
        with pytest.raises(dw.ConfigError, match="was saved without its teacher"):
            loaded.fit(x, verbose=0)
        return
    assert loaded.fit(x, batch_size=96, verbose=0).history["loss"] == pytest.approx(expected, rel=1e-6)
