"""A small task for searches."""

from __future__ import annotations

import keras
import numpy as np
import pytest


@pytest.fixture(scope="session")
def task():
    """A small classifier of vectors, its data, and a model that was trained on it."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(4, 12)).astype(np.float32)
    y = generator.integers(0, 4, 900)
    x = (centers[y] + 0.7 * generator.normal(size=(900, 12))).astype(np.float32)
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((12,), name="x"),
        keras.layers.Dense(48, activation="relu"),
        keras.layers.Dense(32, activation="relu"),
    ]
    model = keras.Sequential([*layers, keras.layers.Dense(4, activation="softmax")], name="small")
    model.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy")
    model.fit(x[:500], y[:500], epochs=15, verbose=0)
    parts = {"train": (x[:500], y[:500]), "val": (x[500:700], y[500:700]), "test": (x[700:], y[700:])}
    return model, parts
