"""Shared fixtures: everything is seeded, nothing is fetched."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

from dwindle.measuring.litert import quiet_stderr

with quiet_stderr():  # what the backend prints as it starts would hide the tests' own output
    import keras


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def digits():
    """A few of the shipped digits: (x_train, y_train), (x_test, y_test), images 28x28x1 in [0, 1]."""
    from dwindle.data import load_demo_data

    data = load_demo_data(full=False)
    train, test = data.train.pick(np.arange(3000)), data.test.pick(np.arange(600))
    return (train.x[0], train.y.astype(np.int64)), (test.x[0], test.y.astype(np.int64))


def small_cnn() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(8, 5, strides=2, activation="relu", name="conv"),
            layers.MaxPooling2D(name="pool"), layers.Flatten(), layers.Dense(32, activation="relu", name="hidden"),
            layers.Dense(10, activation="softmax", name="digit"),
        ],
        name="small_cnn",
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(digits):
    """A small CNN trained on the digits, about 94% accurate; tests must not change it."""
    keras.utils.set_random_seed(0)
    model = small_cnn()
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*digits[0], epochs=6, batch_size=32, verbose=0)
    return model
