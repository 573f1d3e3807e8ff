"""Arrays as training reads them: what comes is what Keras would feed, in the seed's order."""

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.feeding import fed

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow's pipeline waits")


def rows_of(given):
    return [np.concatenate([np.asarray(batch[1]) for batch in given["x"]]) for _ in range(2)]


def test_every_sample_comes_once_an_epoch_with_its_label_in_an_order_of_the_seed():
    x = np.arange(70, dtype=np.float64).reshape(35, 2)
    y = np.arange(35)
    orders = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        given = fed(x=x, y=y, batch_size=8, verbose=0)
        assert set(given) == {"x", "shuffle", "verbose"}
        sizes = [batch[0].shape[0] for batch in given["x"]]
        assert sizes == [8, 8, 8, 8, 3]
        for batch, labels in given["x"]:
            assert batch.dtype == "float32"
            np.testing.assert_array_equal(np.asarray(batch)[:, 0], 2 * np.asarray(labels))
        first, second = rows_of(given)
        np.testing.assert_array_equal(np.sort(first), y)
        assert (first != second).any()
        orders.append(first)
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


def test_structures_stay_and_whole_numbers_keep_their_type():
    x = {"left": np.zeros((6, 2), np.float16), "right": [np.ones((6, 1), np.uint8), np.ones((6,), bool)]}
    batch = next(iter(fed(x=x, batch_size=4)["x"]))
    assert batch[0]["left"].dtype == "float32"
    assert [part.dtype.name for part in batch[0]["right"]] == ["uint8", "bool"]


@pytest.mark.parametrize("arguments", [
    {"shuffle": False}, {"sample_weight": np.ones(4)}, {"validation_split": 0.5}, {"steps_per_epoch": 2},
    {"y": np.ones(3)}, {"x": [[1.0], [2.0]]}, {"x": None}, {"x": np.array(["a", "b", "c", "d"])},
])  # fmt: skip
def test_what_needs_arrays_gets_them(arguments):
    given = {"x": np.ones((4, 1)), "y": np.ones(4), **arguments}
    assert fed(**given) is not given
    assert all(fed(**given)[name] is value for name, value in given.items())


def test_training_on_it_is_training_on_the_arrays():
    """One batch of all samples: its order does not matter, and each epoch is one step of plain gradient descent."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 4)).astype("float32"), rng.integers(0, 3, 32)

    def trained(feed):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(**feed(x=x, y=y, batch_size=32, epochs=3, verbose=0))
        return model.get_weights()

    for one, two in zip(trained(fed), trained(dict), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_student_learns_from_several_inputs_and_a_recording(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(40, 3)).astype("float32"), rng.normal(size=(40, 2)).astype("float32")]
    left, right = keras.Input((3,)), keras.Input((2,))
    outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Concatenate()([left, right]))
    teacher = keras.Model([left, right], outputs)
    student = keras.models.clone_model(teacher)
    coach = dw.distill(student, dw.distillation.record(teacher, arrays, tmp_path / "said"), alpha=1.0)
    coach.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy")
    before = np.abs(student.predict(arrays, verbose=0) - teacher.predict(arrays, verbose=0)).mean()
    coach.fit(arrays, rng.integers(0, 2, 40), batch_size=8, epochs=30, verbose=0)
    after = np.abs(student.predict(arrays, verbose=0) - teacher.predict(arrays, verbose=0)).mean()
    assert after < 0.3 * before
