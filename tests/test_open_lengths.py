"""Models that leave lengths of their inputs open get fixed ones: as asked for, or as the data have them."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.cli import main
from dwindle.compressing.plans import Plan
from dwindle.compressing.run import begun_search
from dwindle.measuring.litert import LiteRTRunner

L = keras.layers


def images():
    """A convolutional network with a nested model, for images of any size."""
    inner = keras.Sequential([keras.Input((None, None, 4)), L.Conv2D(4, 3, strides=2), L.BatchNormalization()])
    x = inputs = keras.Input((None, None, 3), name="image")
    x = inner(L.Conv2D(4, 3, padding="same", activation="relu", name="conv")(x))
    x = L.Concatenate()([L.GlobalAveragePooling2D()(x), L.GlobalMaxPooling2D()(x)])
    return keras.Model(inputs, L.Dense(5, name="ends")(x))


def tokens():
    """A recurrent network for sequences of any length."""
    x = inputs = keras.Input((None,), dtype="int32", name="words")
    x = L.Embedding(20, 6, keras.initializers.RandomNormal(stddev=1.0, seed=0))(x)
    return keras.Model(inputs, L.Dense(3)(L.GRU(5)(x)))


def drawn(shape, count=24):
    return np.random.default_rng(0).random((count, *shape), np.float32)


def words(length, count=24):
    return np.random.default_rng(0).integers(1, 20, (count, length)).astype(np.int32)


def of_file(path, x):
    return LiteRTRunner(path.read_bytes()).predict([x])[0]


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved", "in memory", "sequential"])
def test_a_model_is_loaded_with_the_lengths_that_were_asked_for(name, tmp_path):
    model = images()
    if name == "sequential":
        model = keras.Sequential([keras.Input((None, None, 3), name="image"), *model.layers[1:3]])
    source = model if name in ("in memory", "sequential") else tmp_path / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras advises against HDF5
        if name == "saved":
            model.export(source, format="tf_saved_model", verbose=False)
        elif source is not model:
            model.save(source)
    before = [np.array(weight) for weight in model.get_weights()]
    loaded = dw.load(source, inputs=(None, 20, 28, 3))
    assert loaded.input_shape == (None, 20, 28, 3)
    dw.export(loaded, tmp_path / "model.tflite")
    x = drawn((20, 28, 3))
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_file(tmp_path / "model.tflite", x), expected, rtol=1e-4, atol=1e-5)
    # The model that came in is as it was, and shares nothing with the new one.
    loaded.set_weights([weight + 1 for weight in loaded.get_weights()])
    assert model.input_shape == (None, None, None, 3)
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_inputs_without_a_name_have_open_lengths_too(kind, tmp_path):
    x = drawn((20, 28, 3))
    layers = [L.Conv2D(4, 3), L.GlobalMaxPooling2D(), L.Dense(2)]
    if kind == "sequential":
        model = keras.Sequential([keras.Input((None, None, 3)), *layers])
    else:
        y = inputs = keras.Input((None, None, 3))
        for layer in layers:
            y = layer(y)
        model = keras.Model(inputs, y)
    assert dw.load(model, inputs=(None, 20, 28, 3)).input_shape == (None, 20, 28, 3)
    found = dw.export(model, tmp_path / "model.tflite", "int8", x)
    assert "has the lengths (20, 28, 3) of `data`" in " ".join(found.notes)
    expected = keras.ops.convert_to_numpy(layers[2](layers[1](layers[0](x))))
    assert np.abs(of_file(tmp_path / "model.tflite", x) - expected).max() < 0.05 * np.abs(expected).max()


def test_a_search_trains_with_the_loss_of_a_model_with_open_lengths(tmp_path):
    model = images()
    model.compile("adam", keras.losses.Huber(0.5))
    x = drawn((20, 28, 3))
    data = {"x_train": x, "y_train": drawn((5,)), "x_val": x, "y_val": drawn((5,))}
    search, _ = begun_search(
        model, data=data, goals=dw.Goals(max_drop=0.5), out=tmp_path / "out", target="litert",
        metric="mean_absolute_error", epochs=1, seed=0, threads=1,
    )  # fmt: skip
    search.store.close()
    assert isinstance(search.case.bench.loss, keras.losses.Huber)
    assert search.case.bench.original.input_shape == (None, 20, 28, 3)


def test_some_lengths_may_stay_open_and_inputs_are_chosen_by_name():
    one, other = keras.Input((None, None, 3), name="one"), keras.Input((None, 2), name="other")
    model = keras.Model({"one": one, "other": other}, [L.GlobalMaxPooling2D()(one), L.GlobalMaxPooling1D()(other)])
    loaded = dw.load(model, inputs={"one": (None, 7, None, 3)})
    assert {tensor.name: tensor.shape for tensor in loaded.inputs} == {
        "one": (None, 7, None, 3), "other": (None, None, 2)
    }  # fmt: skip
    assert set(loaded.input) == {"one", "other"}
    assert dw.load(model, inputs={"other": (None, None, 2)}) is model  # nothing new


def test_a_pruned_model_stays_pruned():
    pruned = dw.prune(images(), 0.5)
    loaded = dw.load(pruned, inputs=(None, 12, 12, 3))
    x = drawn((12, 12, 3))
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), pruned.predict(x, verbose=0))
    assert float((np.asarray(dw.finalize(loaded).get_layer("conv").kernel) == 0).mean()) >= 0.5


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((None, 20, 20, 1), r"has the shape \(None, None, None, 3\) in the model; \(None, 20, 20, 1\) does not fit it"),
        (224, "the shape of input `image` is 224; it must be a tuple"),
        ((20, 20, 3), r"\(20, 20, 3\) does not fit it: only lengths that are None there, but for the first"),
        ((1, 20, 20, 3), r"\(1, 20, 20, 3\) does not fit it"),
        ((None, 0, 20, 3), r"\(None, 0, 20, 3\) does not fit it"),
        ((None, 20, 20, None), r"\(None, 20, 20, None\) does not fit it"),
        ({"picture": (None, 20, 20, 3)}, "the model has no input `picture`; it has `image`"),
        ((None, 2, 2, 3), r"does not take inputs of the shape \(None, 2, 2, 3\) \(`image`\): .*negative"),
    ],
)
def test_lengths_that_contradict_the_model_are_refused(inputs, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.load(images(), inputs=inputs)


def test_lengths_of_what_has_none_to_choose_are_refused(tmp_path):
    dw.export(keras.Sequential([keras.Input((3,)), L.Dense(2)]), tmp_path / "a.tflite")
    with pytest.raises(dw.ConfigError, match=r"`inputs` chooses open lengths, and `.*a\.tflite` is a \.tflite"):
        dw.load(tmp_path / "a.tflite", inputs=(None, 3))

    class Net(keras.Model):
        def call(self, x):
            return x

    net = Net(name="net")
    net(drawn((4, 4)))
    with pytest.raises(dw.UnsupportedModelError, match="`net` is a subclassed model, whose shapes can't be changed"):
        dw.load(net, inputs=(None, 4, 4))


def test_without_lengths_nothing_is_written_and_it_is_said_which_are_open(tmp_path):
    message = (
        r"input `image` has open lengths, \(None, None, None, 3\), and a \.tflite needs all but the first; choose them "
        r"with dw\.load\(model, inputs=\{'image': \(None, 224, 224, 3\)\}\) \(--input image=\?,224,224,3\), or pass"
    )
    for path in ("a.tflite", "a.onnx"):
        with pytest.raises(dw.UnsupportedModelError, match=message):
            dw.export(images(), tmp_path / path)
    with pytest.raises(dw.UnsupportedModelError, match=message):
        dw.quantize(images(), "int8-dynamic")
    with pytest.raises(dw.UnsupportedModelError, match=r"`words` has open lengths, \(None, None\)"):
        dw.lift(tokens())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "x"), [(images, drawn((16, 12, 3))), (tokens, words(5))])
def test_lengths_are_those_of_the_data(make, x, tmp_path):
    model = make()
    name, own = model.inputs[0].name, tuple(model.inputs[0].shape[1:])
    note = f"input `{name}` has the lengths {x.shape[1:]} of `data`; the model leaves them open: {own}"
    written = dw.export(model, tmp_path / "model.tflite", data=x)
    assert note in written.notes
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(of_file(tmp_path / "model.tflite", x), expected, rtol=1e-4, atol=1e-5)
    aware = dw.quantize(model, "int8", data=x)
    assert note in aware.notes
    assert aware.input_shape == (None, *x.shape[1:])
    assert note in dw.export(aware, tmp_path / "int8.tflite", data=x).notes
    assert np.abs(of_file(tmp_path / "int8.tflite", x) - expected).max() < 0.1 * np.abs(expected).max()


def test_a_folder_keeps_its_lengths_open(tmp_path):
    import tensorflow as tf

    model = images()
    assert dw.export(model, tmp_path / "saved").verification.passed  # on random images of a size that it can take
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for x in (drawn((16, 12, 3)), drawn((9, 30, 3))):
        np.testing.assert_allclose(next(iter(loaded.serve(x).values())), model(x), rtol=1e-4, atol=1e-5)


def test_the_command_takes_lengths(tmp_path, capsys):
    model, out = images(), tmp_path / "model.tflite"
    model.save(tmp_path / "model.keras")
    command = ["convert", str(tmp_path / "model.keras"), str(out)]
    assert main(command) == 2
    assert "(--input image=?,224,224,3)" in capsys.readouterr().err
    assert main([*command, "--input", "image=?,16,12,3"]) == 0
    x = drawn((16, 12, 3))
    np.testing.assert_allclose(of_file(out, x), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=np.zeros(len(x), np.int32))
    assert main([*command, "--force", "--data", str(tmp_path / "data.npz")]) == 0
    assert "note: input `image` has the lengths (16, 12, 3) of `data`" in capsys.readouterr().out


def test_a_search_takes_the_lengths_of_its_data(tmp_path):
    x, y = drawn((16, 12, 3), 60), np.random.default_rng(1).integers(0, 5, 60)
    told = []
    result = dw.compress(
        images(), train=(x[:40], y[:40]), validation=(x[40:], y[40:]), goals=dw.Goals(max_size="1MB", max_drop=0.9),
        out=tmp_path / "out", plan=Plan(name="as it is", steps=[("export", {"scheme": "float32"})]), say=told.append,
    )  # fmt: skip
    assert any("input `image` has the lengths (16, 12, 3) of `data`" in line for line in told)
    assert result.met
    assert keras.saving.load_model(tmp_path / "out" / "model.keras", compile=False).input_shape == (None, 16, 12, 3)
