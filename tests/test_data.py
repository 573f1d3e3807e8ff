"""Every form of data gives the same arrays; what is wrong with data is said in one sentence."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

import dwindle as dw
from dwindle.data import fit_to_model, load_demo_data, read_data

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "src" / "dwindle" / "demo_data" / "mnist.npz"


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {"x_train": generator.integers(0, 255, (40, 6, 6), dtype=np.uint8), "y_train": np.arange(40) % 4,
            "x_test": generator.integers(0, 255, (10, 6, 6), dtype=np.uint8), "y_test": np.arange(10) % 4}  # fmt: skip


def test_shipped_digits_are_balanced_small_and_disjoint():
    assert SHIPPED.stat().st_size <= 3_000_000
    with np.load(SHIPPED) as file:
        found = {name: file[name] for name in file.files}
    for part, count in (("train", 12_000), ("val", 2_000), ("test", 3_000)):
        assert found[f"x_{part}"].shape == (count, 28, 28)
        assert found[f"x_{part}"].dtype == np.uint8
        assert (np.bincount(found[f"y_{part}"]) == count // 10).all()
    train = {image.tobytes() for image in found["x_train"]}
    assert not train & {image.tobytes() for image in found["x_val"]}


@pytest.mark.skipif("DWINDLE_MNIST" not in os.environ, reason="DWINDLE_MNIST names the full mnist.npz")
def test_shipped_digits_are_what_the_script_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("subset", ROOT / "scripts" / "make_mnist_subset.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([os.environ["DWINDLE_MNIST"], str(tmp_path / "out.npz")]) == 0
    assert (tmp_path / "out.npz").read_bytes() == SHIPPED.read_bytes()


def test_demo_data_takes_the_full_set_where_the_keras_cache_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert "17,000" in load_demo_data().source
    with pytest.raises(dw.DataError, match=r"mnist\.npz` does not exist"):
        load_demo_data(full=True)
    (tmp_path / "datasets").mkdir()
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "datasets" / "mnist.npz", x_train=generator.integers(0, 255, (120, 28, 28), dtype=np.uint8),
             y_train=np.arange(120) % 10, x_test=generator.integers(0, 255, (20, 28, 28), dtype=np.uint8), y_test=np.arange(20) % 10)  # fmt: skip
    found = load_demo_data()
    assert "cache" in found.source
    assert (len(found.train), len(found.val), len(found.test)) == (110, 10, 20)
    assert found.train.x[0].shape[1:] == (28, 28, 1)
    assert found.train.x[0].max() <= 1.0


def test_npz_dict_function_and_dataset_give_the_same_arrays(arrays, tmp_path, monkeypatch):
    import tensorflow as tf

    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "mine.py").write_text("import numpy as np\ndef load():\n    return dict(np.load('data.npz'))\n")
    monkeypatch.chdir(tmp_path)
    expected = read_data(arrays)
    for source in ("data.npz", tmp_path / "data.npz", "mine:load", "mine.py:load"):
        found = read_data(source)
        assert found.sha256 == expected.sha256, source
        np.testing.assert_array_equal(found.test.x[0], arrays["x_test"])
    dataset = tf.data.Dataset.from_tensor_slices((arrays["x_test"], arrays["y_test"])).batch(3)
    for source in (dataset, (arrays["x_test"], arrays["y_test"])):
        found = read_data(source)
        np.testing.assert_array_equal(found.evaluation().x[0], arrays["x_test"])
        np.testing.assert_array_equal(found.evaluation().y, arrays["y_test"])


def test_validation_is_set_aside_evenly_and_by_seed(arrays):
    found = read_data(arrays, validation_fraction=0.2)
    assert (np.bincount(found.val.y) == 2).all()
    assert len(found.train) == 32
    together = np.concatenate([found.train.x[0], found.val.x[0]])
    assert sorted(map(bytes, together)) == sorted(map(bytes, arrays["x_train"]))
    assert read_data(arrays, validation_fraction=0.2).sha256 == found.sha256
    assert read_data(arrays, validation_fraction=0.2, seed=1).sha256 != found.sha256


def test_several_inputs(arrays):
    several = {"x_train_0": arrays["x_train"], "x_train_1": arrays["x_train"] * 0, "y_train": arrays["y_train"]}
    assert len(read_data(several).train.x) == 2


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_image_folders(tmp_path, parts, arrays):
    from PIL import Image

    for part in parts:
        for number, (image, label) in enumerate(zip(arrays["x_train"], arrays["y_train"], strict=True)):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03d}.png")
    found = read_data(tmp_path, validation_fraction=0.0)
    assert found.class_names == ("class0", "class1", "class2", "class3")
    assert found.train.x[0].shape == (40, 6, 6, 1)
    order = np.argsort(arrays["y_train"], kind="stable")
    np.testing.assert_array_equal(found.train.x[0][..., 0], arrays["x_train"][order])
    np.testing.assert_array_equal(found.train.y, arrays["y_train"][order])
    assert (found.test is None) == (parts == ("",))
    assert read_data(tmp_path, image_size=(3, 4)).train.x[0].shape[1:] == (3, 4, 1)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "odd.png")
    with pytest.raises(dw.DataError, match=r"`odd\.png` is 9x9 and others are 6x6"):
        read_data(tmp_path)
    (folder / "odd.png").write_text("no image")
    with pytest.raises(dw.DataError, match=r"odd\.png` can't be read"):
        read_data(tmp_path)


def test_fitting_adds_channels_flattens_and_casts(arrays):
    data = read_data(arrays, rescale=1 / 255)
    image = fit_to_model(data, [(6, 6, 1)], 4)
    assert image.train.x[0].shape[1:] == (6, 6, 1)
    flat = fit_to_model(data, [(36,)], 4)
    np.testing.assert_allclose(flat.test.x[0], arrays["x_test"].reshape(10, 36) / 255, rtol=1e-6)
    assert flat.test.x[0].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": np.arange(39)}, r"39, 40 samples"),
        ({"x_train": np.zeros((0, 6, 6))}, r"`x_train` is empty"),
        ({"y_train": np.array(["a"] * 40)}, r"`y_train` holds <U1, not numbers"),
        ({"x_train": np.full((40, 6, 6), np.inf)}, r"40 of 40 samples, the first at index 0"),
    ],
)
def test_bad_arrays(arrays, change, message):
    with pytest.raises(dw.DataError, match=message):
        read_data({**arrays, **change})


def test_bad_arguments(arrays, tmp_path):
    with pytest.raises(dw.ConfigError, match="`rescale` is 0"):
        read_data(arrays, rescale=0)
    with pytest.raises(dw.DataError, match="is a int"):
        read_data(3)
    with pytest.raises(dw.DataError, match="no images"):
        read_data(tmp_path)
    (tmp_path / "bad.py").write_text("def load():\n    return 1 / 0\n")
    with pytest.raises(dw.DataError, match=r"ZeroDivisionError: division by zero"):
        read_data(f"{tmp_path / 'bad.py'}:load")


def test_one_array_under_the_name_of_an_npz_is_said_to_be_one(tmp_path):
    with (tmp_path / "one.npz").open("wb") as stream:
        np.save(stream, np.zeros((3, 2)))
    with pytest.raises(dw.DataError, match=r"one\.npz` is one array, not an \.npz with x_train"):
        read_data(tmp_path / "one.npz")


def test_a_damaged_npz_is_one_sentence_and_is_closed(arrays, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    content = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(dw.DataError, match=r"cut\.npz` is no \.npz file, or a damaged one"):
        read_data(tmp_path / "cut.npz")
