"""The coach trains like any model: features, zeros of pruned and grids of quantized students, half precision, resuming."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import small_cnn

import dwindle as dw
from dwindle.distillation import Annealed, AttentionMaps, Contrast, Hints, Relations

L = keras.layers
# Where features alone teach, the layers behind them learn nothing, which Keras remarks on.
part = pytest.mark.filterwarnings("ignore:Gradients do not exist")


@pytest.fixture(scope="module")
def few(digits):
    return digits[0][0][:256], digits[0][1][:256]


def block(width, name, nested=False):
    """A small CNN with a map of 6x6 (stride 4, so that it is small), by itself or inside of a nested model."""
    inputs = keras.Input((28, 28, 1))
    maps = [L.Conv2D(width, 5, strides=4, activation="relu", name="maps")]
    body = keras.Sequential([keras.Input((28, 28, 1)), *maps], name="body") if nested else maps[0]
    return keras.Model(inputs, L.Dense(10, name="top")(L.Flatten()(body(inputs))), name=name)


def maps_of(model, x, nested=False):
    layer = model.get_layer("body").get_layer("maps") if nested else model.get_layer("maps")
    return np.asarray(layer(x))


@part
@pytest.mark.parametrize("nested", [False, True])
def test_hints_look_at_layers_through_a_learned_projection(nested, few):
    x, _ = few
    student, teacher = block(4, "student"), block(7, "teacher", nested)
    hint = Hints(student="maps", teacher="body/maps" if nested else "maps", weight=3.0)
    coach = dw.distill(student, teacher, alpha=0.0, features=hint)
    kernel, bias = (np.asarray(v) for v in coach.projections[0].trainable_variables)
    assert kernel.shape == (4, 7)
    before = [maps_of(student, x), maps_of(teacher, x, nested)]
    coach.compile(keras.optimizers.SGD(0.1))
    found = coach.fit(x, batch_size=len(x), verbose=0).history["loss"][0]
    expected = 3 * ((before[0] @ kernel + bias - before[1]) ** 2).mean() / 2
    assert found == pytest.approx(expected, rel=1e-4)
    # Both learn; the teacher does not, and the layers are as they were.
    assert not np.array_equal(kernel, coach.projections[0].trainable_variables[0])
    assert not np.array_equal(before[0], maps_of(student, x))
    np.testing.assert_array_equal(before[1], maps_of(teacher, x, nested))
    assert all("call" not in vars(layer) for layer in (*student.layers, *teacher.layers))
    assert len(student.trainable_variables) == 4


@part
def test_attention_maps_and_relations_of_layers(few):
    x = few[0][:32]
    student, teacher = block(4, "student"), block(7, "teacher")
    maps = [maps_of(model, x) for model in (student, teacher)]
    flat = [(m**2).mean(-1).reshape(32, -1) for m in maps]
    flat = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in flat]
    relations = Relations(student="maps", angles=0.0)
    features = [AttentionMaps(student="maps", weight=2.0), relations]
    coach = dw.distill(student, teacher, alpha=0.0, features=features)
    coach.compile(keras.optimizers.SGD(0.0))
    found = coach.fit(x, batch_size=32, verbose=0).history["loss"][0]
    pairs = np.asarray(relations.distance(*(keras.ops.convert_to_tensor(m) for m in maps))).mean()
    assert found == pytest.approx(2 * ((flat[0] - flat[1]) ** 2).sum(1).mean() + pairs, rel=1e-4)


@part
def test_contrast_of_layers_through_a_learned_projection(few):
    x = few[0][:32]
    student, teacher = block(4, "student"), block(7, "teacher")
    coach = dw.distill(student, teacher, alpha=0.0, features=Contrast(student="maps", weight=2.0))
    kernel, bias = (np.asarray(v) for v in coach.projections[0].trainable_variables)
    pooled = [maps_of(student, x).mean(axis=(1, 2)) @ kernel + bias, maps_of(teacher, x).mean(axis=(1, 2))]
    s, t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in pooled)
    alike = s @ t.T / 0.1
    coach.compile(keras.optimizers.Adam(1e-2))
    history = coach.fit(x, batch_size=32, epochs=30, verbose=0).history["loss"]
    expected = 2 * (np.log(np.exp(alike).sum(axis=1)) - alike.diagonal()).mean()
    assert history[0] == pytest.approx(expected, rel=1e-4)
    assert history[-1] < history[0] - 0.3
    assert not np.array_equal(kernel, coach.projections[0].kernel)


@part
def test_features_alone_let_a_teacher_with_other_outputs_teach(few):
    x, _ = few
    teacher = block(7, "teacher")
    other = keras.Model(teacher.inputs, L.Dense(3)(L.Flatten()(teacher.get_layer("maps").output)))
    with pytest.raises(dw.ConfigError, match=r"`student` gives \(None, 10\) and `teacher` gives \(None, 3\)"):
        dw.distill(block(4, "student"), other, features={"maps": "maps"})
    coach = dw.distill(block(4, "student"), other, objective=[], features={"maps": "maps"})
    coach.compile(keras.optimizers.Adam(1e-2))
    history = coach.fit(x, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0] / 2


@pytest.mark.parametrize(
    "features", [Hints(student="maps", teacher="top"), AttentionMaps(student="maps", teacher="top")]
)
def test_features_that_do_not_fit(features):
    with pytest.raises(
        dw.ConfigError, match=r"`maps` of the student gives .* and `top` of the teacher gives \(None, 10\)"
    ):
        dw.distill(block(4, "student"), block(7, "teacher"), features=features)


def test_zeros_of_a_pruned_student_stay_zero(trained, few):
    x, y = few
    student = dw.prune(trained, 0.8)
    zeros = [dw.finalize(student).get_layer(name).kernel.numpy() == 0 for name in ("conv", "hidden", "digit")]
    coach = dw.distill(student, trained, beta=1.0, features={"conv": "conv"})
    coach.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    coach.fit(x, y, verbose=0)
    after = dw.finalize(coach.student)
    for name, mask in zip(("conv", "hidden", "digit"), zeros, strict=True):
        kernel = after.get_layer(name).kernel.numpy()
        np.testing.assert_array_equal(kernel == 0, mask)
        assert not np.array_equal(kernel, trained.get_layer(name).kernel.numpy())


def test_a_student_in_quantized_training_ships_what_it_learned(trained, few, tmp_path):
    x, y = few
    aware = dw.quantize(trained, "int8", data=x)
    coach = dw.distill(aware, trained, beta=1.0)
    assert coach.settings.student_logits == (False,)
    coach.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    coach.fit(x, y, verbose=0)
    artefact = dw.export(coach.student, tmp_path / "int8.tflite", data=x)
    said = dw.measure(artefact.path, (x, y)).accuracy
    assert said == pytest.approx((coach.student.predict(x, verbose=0).argmax(1) == y).mean(), abs=1 / 256)


def test_half_precision_scales_the_loss(few):
    x, y = few
    student = keras.Sequential(
        [keras.Input((28, 28, 1)), L.Flatten(), L.Dense(16, activation="relu", dtype="mixed_float16"),
         L.Dense(10, dtype="mixed_float16")]
    )  # fmt: skip
    student.dtype_policy = keras.DTypePolicy("mixed_float16")
    coach = dw.distill(student, block(4, "teacher"), beta=1.0)
    coach.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert isinstance(coach.optimizer, keras.optimizers.LossScaleOptimizer)
    history = coach.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_a_data_set_a_callback_and_metrics(trained, few):
    import tensorflow as tf

    x, y = few
    seen = []
    keras.utils.set_random_seed(0)
    coach = dw.distill(small_cnn(), trained, beta=1.0)
    coach.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda _epoch, logs: seen.append(logs["accuracy"]))
    history = coach.fit(batches, validation_data=(x, y), shuffle=False, verbose=0, callbacks=[callback])
    assert seen == history.history["accuracy"]
    keras.utils.set_random_seed(0)
    other = dw.distill(small_cnn(), trained, beta=1.0)
    other.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    other.fit(x, y, shuffle=False, verbose=0)
    np.testing.assert_allclose(coach.predict(x, verbose=0), other.predict(x, verbose=0), atol=1e-5)


def test_unlabelled_training_with_labelled_validation(trained, few):
    x, y = few
    coach = dw.distill(small_cnn(), trained, alpha=1.0)
    coach.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = coach.fit(x, validation_data=(x, y), epochs=3, verbose=0).history
    assert history["val_accuracy"][-1] == pytest.approx((coach.student.predict(x, verbose=0).argmax(1) == y).mean())
    assert history["val_accuracy"][-1] > 0.5


def test_regularizers_of_the_student_count_and_the_teachers_do_not(few):
    x, _ = few

    def penalized():
        return keras.Sequential(
            [keras.Input((28, 28, 1)), L.Flatten(), L.Dense(10, kernel_regularizer="l2", activity_regularizer="l1")]
        )

    student, teacher = penalized(), penalized()
    coach = dw.distill(student, teacher, alpha=0.5)
    coach.compile(keras.optimizers.SGD(0.0))
    plain = dw.distill(keras.models.clone_model(student), teacher, alpha=1.0)
    plain.student.set_weights(student.get_weights())
    found = [one.fit(x, batch_size=256, verbose=0).history["loss"][0] for one in (coach, _compiled(plain))]
    z = x.reshape(256, -1) @ student.layers[1].kernel.numpy()
    penalty = 0.01 * (student.layers[1].kernel.numpy() ** 2).sum() + 0.01 * np.abs(z).sum() / 256
    assert found[0] == pytest.approx(0.5 * penalty + 0.5 * found[1], rel=1e-3)


def _compiled(coach):
    coach.compile(keras.optimizers.SGD(0.0))
    return coach


def test_a_subclassed_student_and_teacher(few):
    x, _ = few

    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.flat, self.top = L.Flatten(), L.Dense(10)

        def call(self, inputs):
            return self.top(self.flat(inputs))

    student, teacher = Plain(), Plain()
    for model in (student, teacher):
        model(x[:1])
    coach = dw.distill(student, teacher, temperature=2.0, alpha=1.0)
    coach.compile(keras.optimizers.SGD(0.0))
    found = coach.fit(x, batch_size=256, verbose=0).history["loss"][0]
    z = [np.asarray(model(x)) / 2 for model in (student, teacher)]
    log = [one - np.log(np.exp(one).sum(1, keepdims=True)) for one in z]
    assert found == pytest.approx(4 * (np.exp(log[1]) * (log[1] - log[0])).sum(1).mean(), rel=1e-4)


def test_resuming_with_projections_and_an_annealed_temperature(few, tmp_path):
    x, y = few

    def begun():
        keras.utils.set_random_seed(1)
        coach = dw.distill(
            block(4, "student"), block(7, "teacher"), Annealed(steps=20, start=8.0, end=1.0), beta=1.0,
            features=[Hints(student="maps"), AttentionMaps(student="maps", power=1.0)], objective=["soft", "decoupled"],
        )  # fmt: skip
        coach.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        coach.fit(x, y, shuffle=False, verbose=0)
        return coach

    straight, stopped = begun(), begun()
    stopped.save(tmp_path / "coach.keras")
    resumed = dw.load(tmp_path / "coach.keras")
    assert resumed.settings == stopped.settings
    assert int(resumed.steps) == 8
    for coach in (straight, resumed):
        coach.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(straight.trainable_variables, resumed.trainable_variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
