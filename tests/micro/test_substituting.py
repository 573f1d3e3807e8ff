"""Operators that are written as others: the same bits in LiteRT, and TensorFlow Lite Micro has them."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from dwindle.exporting import export
from dwindle.measuring.litert import LiteRTRunner, quantize
from dwindle.micro import export_micro
from dwindle.micro.operators import operators_of
from dwindle.micro.running import run_micro
from dwindle.micro.substituting import substituted
from dwindle.micro.verifying import run_litert

layers = keras.layers


def upsampled() -> keras.Model:
    x = keras.Input((6, 5, 1))
    y = layers.UpSampling2D((2, 3), name="larger")(layers.Conv2D(3, 3, padding="same")(x))
    return keras.Model(x, layers.Conv2D(2, 3, activation="relu")(y))


def selected() -> keras.Model:
    x = keras.Input((6, 5, 1))
    y = layers.Conv2D(3, 3, padding="same", activation="selu", name="scaled")(x)
    return keras.Model(x, layers.Dense(4)(layers.Flatten()(y)))


@pytest.mark.parametrize(("build", "lacking", "instead"), [
    (upsampled, "TILE", "CONCATENATION"), (selected, "SELECT", "SELECT_V2"),
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["int8", "float32"])
def test_the_same_bits_with_operators_that_are_there(build, lacking, instead, scheme, digits, tmp_path):
    x = digits[1][0][:8, 8:14, 10:15]
    io_type = "int8" if scheme == "int8" else "float32"
    export(build(), tmp_path / "model.tflite", scheme=scheme, data=digits[0][0][:64, 8:14, 10:15], io_type=io_type)
    content = (tmp_path / "model.tflite").read_bytes()
    assert lacking in operators_of(content)
    made, notes = substituted(content)
    assert lacking not in operators_of(made)
    assert f"{lacking} of layer" in notes[0]
    assert notes[0].endswith(f"is written as {instead}")
    samples = [quantize(x, LiteRTRunner(content).inputs[0])]
    expected = run_litert(content, samples, reference=True)[0]
    assert len(np.unique(expected)) > 8
    np.testing.assert_array_equal(run_litert(made, samples, reference=True)[0], expected)
    np.testing.assert_allclose(
        run_micro(made, samples).outputs[0].astype(float), expected, atol=1 if scheme == "int8" else 1e-5
    )


def test_an_export_says_what_was_written_otherwise(digits, tmp_path):
    made = export_micro(upsampled(), tmp_path / "out", data=digits[0][0][:32, 8:14, 10:15])
    assert any(note.startswith("TILE of layer `larger") for note in made.notes)
    assert "CONCATENATION" in made.operators


def test_a_file_without_them_is_left_alone(cnn_file):
    made, notes = substituted(cnn_file.content)
    assert made is cnn_file.content
    assert notes == ()
