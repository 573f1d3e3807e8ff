"""Dynamic schemes are simulated as the kernel that runs rounds: XNNPACK's where it has one, else LiteRT's own."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw

L = keras.layers


def largest_error(model: keras.Model, scheme: str, x: np.ndarray, path) -> float:
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return dw.export(model, path, scheme=scheme, data=x).verification.max_abs_error


@pytest.mark.parametrize("width", [45, 46, 47, 48])
@pytest.mark.parametrize("scheme", ["int2-dynamic", "int4-dynamic", "int8-dynamic"])
def test_fully_connected_rows_that_end_within_a_byte(tmp_path, scheme, width):
    x = np.random.default_rng(0).normal(0.5, 1, (32, width)).astype(np.float32)
    model = keras.Sequential([keras.Input((width,)), L.Dense(7)])
    assert largest_error(model, scheme, x, tmp_path / "m.tflite") < 1e-4


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("scheme", ["int4-dynamic", "int8-dynamic"])
def test_convolutions_of_one_place_and_of_more(tmp_path, scheme, channels, kernel):
    x = np.random.default_rng(0).normal(0.5, 1, (32, 9, 9, channels)).astype(np.float32)
    model = keras.Sequential([keras.Input((9, 9, channels)), L.Conv2D(7, kernel)])
    assert largest_error(model, scheme, x, tmp_path / "m.tflite") < 1e-4


def test_positions_are_rounded_by_themselves(tmp_path):
    x = np.random.default_rng(0).normal(0.5, 1, (32, 5, 45)).astype(np.float32)
    model = keras.Sequential([keras.Input((5, 45)), L.Dense(7)])
    assert largest_error(model, "int4-dynamic", x, tmp_path / "m.tflite") < 1e-4
