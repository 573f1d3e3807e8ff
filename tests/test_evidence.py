"""Evidence: class tables as counted by hand, pictures that decode to the samples, and reasons where a part does not apply."""

from __future__ import annotations

import base64
import io
import json
import math

import keras
import numpy as np
import pytest
from PIL import Image

import dwindle as dw
from dwindle.compressing.evidence import class_table, evidence
from dwindle.compressing.sample_pictures import ALL_BYTES, LARGEST_SIDE, Pictures, smaller
from dwindle.data import Split
from dwindle.png import png_bytes


def decoded(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (7, 3, 1), (4, 6, 3), (8, 2, 4)])
def test_png_bytes_decode_to_the_array(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = np.asarray(Image.open(io.BytesIO(png_bytes(image))))
    np.testing.assert_array_equal(found, image[..., 0] if shape[2:] == (1,) else image)


@pytest.mark.parametrize(
    "image", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8), np.zeros(3, np.uint8)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="must be uint8 with 1, 3 or 4 channels"):
        png_bytes(image)


def test_the_class_table_is_that_counted_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    before = np.array([0, 0, 0, 1, 1, 0, 2, 2, 2, 2])
    after = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 0])
    table = class_table(labels, before, after, {0: "cat", 1: "dog", 2: "owl"}.get)
    rows = {row["name"]: row for row in table["rows"]}
    assert [row["name"] for row in table["rows"]] == ["cat", "owl", "dog"]
    counts = {
        name: [row[key] for key in ("samples", "before", "after", "only_before", "only_after")]
        for name, row in rows.items()
    }
    assert counts == {"cat": [4, 3, 1, 2, 0], "owl": [4, 4, 3, 1, 0], "dog": [2, 1, 2, 0, 1]}
    assert (rows["cat"]["taken_for"], rows["cat"]["taken_count"]) == ("dog", 2)
    assert (rows["dog"]["taken_for"], rows["dog"]["taken_count"]) == (None, 0)
    # cat by hand: b = 2.5, c = 0.5, n = 6, and z = 2.394 for three intervals that all hold with 95%
    half = 2.39398 * math.sqrt(2.5 + 0.5 - (2.5 - 0.5) ** 2 / 6) / 6
    assert rows["cat"]["low"] == pytest.approx(-2 / 6 - half, rel=1e-3)
    assert rows["cat"]["high"] == pytest.approx(-2 / 6 + half, rel=1e-3)
    assert {row["change"] for row in rows.values()} == {"within noise"}


def test_only_a_loss_beyond_chance_is_called_worse():
    labels = np.repeat([0, 1], 400)
    before = labels.copy()
    after = labels.copy()
    after[:40] = 1  # 40 of 400 of class 0
    after[400] = 0  # 1 of 400 of class 1
    table = class_table(labels, before, after)
    assert [(row["class"], row["change"]) for row in table["rows"]] == [(0, "worse"), (1, "within noise")]
    assert (table["worse"], table["better"]) == (1, 0)
    assert class_table(labels, after, before)["better"] == 1


def test_of_many_classes_the_worst_and_the_best_are_kept():
    labels = np.arange(300)
    after = labels.copy()
    after[7] = 8
    table = class_table(labels, labels, after)
    assert table["classes"] == 300
    assert len(table["rows"]) == 40
    assert table["rows"][0]["class"] == 7


def test_a_picture_is_the_sample():
    x = np.linspace(0, 1, 2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1)
    found = Pictures([x], np.array([0, 1])).of(1)
    np.testing.assert_array_equal(decoded(found["image"]), np.rint(x[1, ..., 0] * 255))
    assert found["shape"] == "8×8×1"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 255, [0, 255]), (-1, 1, [0, 255]), (-3, 5, [0, 255]), (0, 0.5, [0, 128])],
)
def test_values_are_shown_in_the_range_that_they_mean(low, high, expected):
    x = np.full((1, 8, 8, 3), low, np.float32)
    x[0, 0, 0] = high
    image = decoded(Pictures([x], np.array([0])).of(0)["image"])
    assert [image[1, 1, 0], image[0, 0, 0]] == expected


def test_channels_first_and_large_images_are_shown_small():
    x = np.zeros((1, 3, 200, 100), np.float32)
    x[0, 2] = 1
    image = decoded(Pictures([x], np.array([0])).of(0)["image"])
    assert image.shape == (LARGEST_SIDE, LARGEST_SIDE, 3)
    assert (image == [0, 0, 255]).all()
    halves = np.random.default_rng(0).random((128, 64, 1))
    np.testing.assert_allclose(smaller(halves), halves.reshape(64, 2, 64, 1).mean(axis=1))


def test_pictures_stay_within_their_bytes():
    x = np.random.default_rng(0).random((30, 300, 300, 4)).astype(np.float32)
    pictures = Pictures([x], np.arange(30))
    found = [pictures.of(number) for number in range(30)]
    assert sum(len(each.get("image", "")) for each in found) <= ALL_BYTES
    assert found[0].keys() == {"image", "shape"}
    assert found[-1].keys() == {"values"}


def test_what_is_no_image_is_told_in_numbers():
    x = [np.arange(10, dtype=np.float32).reshape(1, 10), np.array([[0.5]])]
    assert Pictures(x, np.array([0])).of(0) == {"values": "0 1 2 3 4 5 6 7 …; 0.5"}


@pytest.fixture(scope="module")
def files(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    (x, _), _ = digits
    dw.export(trained, folder / "float.tflite")
    twin = dw.quantize(trained, {"*": "int4", "conv": "int8"}, x[:200])
    dw.export(twin, folder / "small.tflite", data=x[:200])
    twin.save(folder / "small.keras")
    return folder


def test_the_evidence_of_a_quantized_file(files, digits):
    x, y = digits[1]
    found = evidence(files / "float.tflite", files / "small.tflite", Split(x=(x,), y=y), ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
                     twin=files / "small.keras")  # fmt: skip
    assert len(json.dumps(found)) < 100_000
    first, second = (dw.measure(files / name, (x, y)).accuracy for name in ("float.tflite", "small.tflite"))
    rows = found["classes"]["rows"]
    assert sum(row["before"] for row in rows) == round(first * len(x))
    assert sum(row["after"] for row in rows) == round(second * len(x))
    changed = found["changed"]
    assert changed["worse"] - changed["better"] == round(first * len(x)) - round(second * len(x))
    assert changed["worse"] == sum(row["only_before"] for row in rows) > 0
    for example in changed["examples"]:
        right, wrong = ("before", "after") if example["change"] == "worse" else ("after", "before")
        assert example[right] == example["label"] != example[wrong]
        np.testing.assert_array_equal(decoded(example["image"]), np.rint(x[example["index"], ..., 0] * 255))
    ends = found["latency"]["percentiles_ms"]
    assert all(len(ends[key]) == 101 and ends[key] == sorted(ends[key]) and ends[key][0] > 0 for key in ends)
    operators = found["operators"]["rows"]
    assert {row["name"] for row in operators} >= {"conv", "hidden", "digit"}
    noise = [row["sqnr_db"] for row in operators if row["sqnr_db"] is not None]
    assert noise == sorted(noise)
    assert {row["name"]: row["weights"] for row in operators}["hidden"] == 4


def test_the_errors_of_operators_are_those_of_blame(files, digits):
    from dwindle.blaming import blame, operator_errors
    from dwindle.exporting import float_file
    from dwindle.loading import load

    x, y = digits[1]
    content = float_file(load(files / "small.keras"))
    found = operator_errors(content, files / "small.tflite", (x, y))
    expected = blame(content, files / "small.tflite", (x, y), samples=64).rows
    assert [(row.name, row.sqnr_db, row.max_error) for row in found] == [
        (row.name, row.sqnr_db, row.max_error) for row in expected
    ]


def test_a_float_file_has_no_errors_of_integers(files, digits):
    x, y = digits[1]
    found = evidence(files / "float.tflite", files / "float.tflite", Split(x=(x[:50],), y=y[:50]))
    assert "floats" in found["operators"]["reason"]
    assert found["changed"] == {"worse": 0, "better": 0, "samples": 50, "examples": []}


def test_without_labels_or_samples_there_are_latencies(files, digits):
    x, _ = digits[1]
    found = evidence(
        files / "float.tflite", files / "small.tflite", Split(x=(x[:50],), y=None), twin=files / "small.keras"
    )
    assert found["classes"] == found["changed"] == {"reason": "there are no labels"}
    assert found["operators"]["rows"]
    found = evidence(files / "float.tflite", files / "small.tflite", None)
    assert found["latency"]["runs"][0] >= 30
    assert "no samples" in found["operators"]["reason"]


def test_regression_and_several_inputs_and_outputs(tmp_path):
    layers = keras.layers
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    joined = layers.Concatenate()([a, b])
    model = keras.Model([a, b], [layers.Dense(1, name="first")(joined), layers.Dense(2, name="second")(joined)])
    x = [np.random.default_rng(i).random((30, n)).astype(np.float32) for i, n in enumerate((4, 3))]
    dw.export(model, tmp_path / "a.tflite")
    dw.export(model, tmp_path / "b.tflite", scheme="int8", data=x)
    model.save(tmp_path / "b.keras")
    targets = np.linspace(0, 1, 30)
    found = evidence(
        tmp_path / "a.tflite",
        tmp_path / "b.tflite",
        Split(x=tuple(x), y=targets),
        twin=tmp_path / "b.keras",
        metric="mae",
    )
    assert found["classes"]["reason"] == "the model gives numbers, not classes"
    assert {row["name"] for row in found["operators"]["rows"]} >= {"first", "second"}
    two = evidence(tmp_path / "a.tflite", tmp_path / "b.tflite", Split(x=tuple(x), y=(targets > 0.5).astype(int)))
    assert two["classes"]["classes"] == 2
    assert two["classes"]["note"] == "of the first of 2 outputs"


def test_one_hot_labels_and_multi_label_targets(files, digits):
    x, y = digits[1]
    hot = np.eye(10, dtype=np.float32)[y]
    pair = files / "float.tflite", files / "small.tflite"
    assert (
        evidence(*pair, Split(x=(x,), y=hot))["classes"]["rows"]
        == evidence(*pair, Split(x=(x,), y=y))["classes"]["rows"]
    )
    hot[0, :] = 1
    assert evidence(*pair, Split(x=(x,), y=hot))["classes"] == {"reason": "the labels are not single classes"}
