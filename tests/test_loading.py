"""Every source gives the same model; hostile files run no code."""

from __future__ import annotations

import inspect
import json
import sys
import warnings

import h5py
import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.exporting.convert import quiet
from dwindle.sources import keras_file


@pytest.fixture(scope="module")
def sources(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("sources")
    trained.save(folder / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras advises against HDF5
        trained.save(folder / "model.h5")
        trained.export(folder / "saved", format="tf_saved_model", verbose=False)
    (folder / "model.tflite").write_bytes(float_file(trained))
    return folder


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved", "model.tflite"])
def test_every_source_computes_the_same_and_trains(name, sources, trained, digits):
    (x, y), _ = digits
    model = dw.load(sources / name)
    np.testing.assert_allclose(
        model.predict(x[:64], verbose=0), trained.predict(x[:64], verbose=0), rtol=1e-4, atol=1e-5
    )
    pruned = dw.prune(model, 0.5)
    pruned.compile("adam", "sparse_categorical_crossentropy")
    pruned.fit(x[:64], y[:64], verbose=0)


def test_a_signatures_inputs_and_outputs_are_in_the_order_of_their_names(tmp_path):
    layers = keras.layers
    lengths = {"vector": 3, "b10": 5, "image": 2, "b9": 4, "mask": 1}
    inputs = [keras.Input((n,), name=name) for name, n in lengths.items()]
    joined = layers.Concatenate()(inputs)
    model = keras.Model(inputs, [layers.Dense(n + 1)(joined) for n in range(12)])  # output_0, … output_11
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.export(tmp_path / "saved", format="tf_saved_model", verbose=False)
    loaded = dw.load(tmp_path / "saved")
    names = ["b9", "b10", "image", "mask", "vector"]
    assert [(tensor.name, tensor.shape[1]) for tensor in loaded.inputs] == [(name, lengths[name]) for name in names]
    x = {name: np.random.default_rng(0).random((3, n), np.float32) for name, n in lengths.items()}
    found = loaded.predict_on_batch([x[name] for name in names])
    expected = model.predict_on_batch(list(x.values()))
    assert [y.shape[1] for y in found] == list(range(1, 13))
    for y, z in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


def saved(tmp_path, shape, function):
    """Write a SavedModel with one input `x` of a shape; return its path."""
    import tensorflow as tf

    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": function(tf, x)}, input_signature=[tf.TensorSpec(shape, name="x")])
    with quiet():
        tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": module.serve})
    return tmp_path / "saved"


def converted(folder):
    import tensorflow as tf

    with quiet():
        content = tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert()
    return (folder.parent / "saved.tflite").write_bytes(content) and folder.parent / "saved.tflite"


def test_open_lengths_are_no_lengths_of_one(tmp_path):
    folder = saved(tmp_path, (None, None, None, 3), lambda tf, x: tf.reduce_mean(tf.nn.relu(x), [1, 2]))
    with pytest.raises(dw.UnsupportedModelError, match=r"`x` has the shape \(None, None, None, 3\) in the signature"):
        dw.load(folder)
    with pytest.raises(dw.UnsupportedModelError, match=r"`x` has the open lengths \[-1, -1, -1, 3\]; convert"):
        dw.load(converted(folder))


def test_a_fixed_number_of_samples_is_refused_by_its_name(tmp_path):
    folder = saved(tmp_path, (4, 3), lambda tf, x: tf.nn.relu(x))
    with pytest.raises(dw.UnsupportedModelError, match="`x` has a fixed batch of 4 in the signature"):
        dw.load(folder)
    with pytest.raises(dw.UnsupportedModelError, match="`x` has a fixed batch of 4 in the file"):
        dw.load(converted(folder))


def test_what_litert_has_not_is_named_without_the_converters_places(tmp_path):
    folder = saved(tmp_path, (None, 3, 3), lambda tf, x: tf.linalg.det(x))
    with pytest.raises(dw.ConversionError) as caught:
        dw.load(folder)
    words = "can't be converted to LiteRT: 'tf.MatrixDeterminant' op is neither a custom op nor a flex op"
    assert str(caught.value) == f"`{folder}` {words}"


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_class_that_is_not_known_is_named(name, tmp_path):
    class Scale(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.Sequential([keras.Input((3,)), Scale(), keras.layers.Dense(2)]).save(tmp_path / name)
    with pytest.raises(dw.UnsupportedModelError, match=r"the class `Scale`, which is not known; import what registers"):
        dw.load(tmp_path / name)
    with keras.utils.custom_object_scope({"Scale": Scale}):
        assert isinstance(dw.load(tmp_path / name).layers[0], Scale)


def test_an_h5_of_keras_2_has_arguments_that_keras_3_does_not_know(tmp_path):
    layers = keras.layers
    images, steps = keras.Input((12, 12, 4)), keras.Input((6, 5))
    x = layers.Conv2D(8, 3, groups=2)(images)
    x = layers.SeparableConv2D(6, 3)(layers.DepthwiseConv2D(3)(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2DTranspose(6, 3)(x))
    y = layers.Bidirectional(layers.GRU(4))(layers.LSTM(8, return_sequences=True)(steps))
    model = keras.Model([images, steps], layers.Dense(3)(layers.Concatenate()([x, y])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "model.h5")
    unused = dict.fromkeys(["kernel_initializer", "kernel_regularizer", "kernel_constraint"])
    # What a file of tf_keras 2.21 has besides, found by writing one.
    more = {
        "DepthwiseConv2D": {"groups": 1}, "SeparableConv2D": {"groups": 1, **unused}, "Conv2DTranspose": {"groups": 1},
        "LSTM": {"time_major": False, "implementation": 2}, "GRU": {"time_major": False, "implementation": 2},
    }  # fmt: skip

    def older(part):
        if isinstance(part, dict):
            if isinstance(part.get("config"), dict):
                part["config"] |= more.get(part.get("class_name"), {})
            part = list(part.values())
        for inner in part if isinstance(part, list) else []:
            older(inner)

    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        older(config)
        file.attrs["model_config"] = json.dumps(config)
    before = (tmp_path / "model.h5").read_bytes()
    generator = np.random.default_rng(0)
    inputs = [generator.random((2, *tensor.shape[1:]), np.float32) for tensor in model.inputs]
    np.testing.assert_array_equal(dw.load(tmp_path / "model.h5")(inputs), model(inputs))
    assert (tmp_path / "model.h5").read_bytes() == before


def test_a_write_protected_h5_of_keras_2_is_read(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(2)]).save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1]["config"]["time_major"] = False
        file.attrs["model_config"] = json.dumps(config)
    (tmp_path / "model.h5").chmod(0o444)
    copied, read = [], keras_file._uncompiled

    def watched(path, *args, **kwargs):
        copied.append(path.stat().st_mode & 0o200)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(keras_file, "_uncompiled", watched)
    assert dw.load(tmp_path / "model.h5").output_shape == (None, 2)
    assert copied == [0o200]  # root alone could write into it otherwise


def test_an_h5_keeps_the_arguments_of_layers_of_ones_own(tmp_path):
    class GroupConv(keras.layers.Layer):
        def __init__(self, groups=8, time_major=True, **kwargs):
            super().__init__(**kwargs)
            self.groups, self.time_major = groups, time_major

        def call(self, x):
            return x * self.groups

        def get_config(self):
            return {**super().get_config(), "groups": self.groups, "time_major": self.time_major}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.Sequential([keras.Input((3,)), GroupConv(1, False)]).save(tmp_path / "model.h5")
    with keras.utils.custom_object_scope({"GroupConv": GroupConv}):
        found = dw.load(tmp_path / "model.h5").layers[0]
    assert (found.groups, found.time_major) == (1, False)


def test_an_h5_of_keras_2_with_a_layer_made_from_one_of_keras(tmp_path):
    class Own(keras.layers.LSTM):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.Sequential([keras.Input((4, 3)), Own(2)]).save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = file.attrs["model_config"]
        assert '"units": 2' in config
        file.attrs["model_config"] = config.replace('"units": 2', '"time_major": false, "units": 2')
    with keras.utils.custom_object_scope({"Own": Own}):
        assert isinstance(dw.load(tmp_path / "model.h5").layers[0], Own)


@pytest.mark.parametrize("name", keras_file._DROPPED)
def test_what_is_dropped_from_an_h5_is_what_keras_does_not_take(name):
    kind = getattr(keras.layers, name)
    given = {"cell": keras.layers.LSTMCell(2)} if name == "RNN" else {"units": 2, "filters": 2, "kernel_size": 3}
    given = {key: value for key, value in given.items() if key in inspect.signature(kind).parameters}
    kind(**given)
    argument, value = keras_file._DROPPED[name]
    with pytest.raises((TypeError, ValueError), match=argument):
        kind(**given, **{argument: value})


def test_a_keras_model_is_returned_as_it_is(trained):
    assert dw.load(trained) is trained


def test_a_compiled_file_stays_compiled(sources):
    assert dw.load(sources / "model.keras").loss == "sparse_categorical_crossentropy"


def test_weights_only_h5_says_what_to_do(tmp_path, trained):
    trained.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(dw.UnsupportedModelError, match="weights only"):
        dw.load(tmp_path / "model.weights.h5")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.keras", b"PK\x03\x04 no zip", "is no Keras file"),
        ("a.h5", b"no hdf5", "is no HDF5 file"),
        ("a.tflite", b"\x1c\x00\x00\x00TFL3" + b"\xff" * 40, "truncated or damaged"),
        ("a.pb", b"", r"ends in '\.pb'"),
    ],
)
def test_broken_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(dw.DwindleError, match=message):
        dw.load(tmp_path / name)


def test_other_bad_sources(tmp_path):
    with pytest.raises(dw.ConfigError, match="does not exist"):
        dw.load(tmp_path / "none.keras")
    with pytest.raises(dw.ConfigError, match="is a int"):
        dw.load(3)
    with pytest.raises(dw.ConfigError, match=r"without `saved_model\.pb`"):
        dw.load(tmp_path)


def test_a_lambda_does_not_run_unless_trusted(tmp_path):
    mark = tmp_path / "ran"
    code = f"lambda x: (open({str(mark)!r}, 'w').close(), x)[1]"
    model = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(eval(code)), keras.layers.Dense(2)])
    model.save(tmp_path / "code.keras")
    mark.unlink()
    with pytest.raises(dw.UnsupportedModelError, match="holds Python code"):
        dw.load(tmp_path / "code.keras")
    assert not mark.exists()
    dw.load(tmp_path / "code.keras", trust=True)
    assert mark.exists()


def test_a_pickle_of_pytorch_is_not_opened_until_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "net.pt2").write_bytes(b"PK")
    with pytest.raises(
        dw.UnsupportedModelError, match=r"net\.pt2` is unpickled by PyTorch, which runs whatever code it holds"
    ):
        dw.load(tmp_path / "net.pt2")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        dw.MissingDependencyError, match=r"`torch` package; install it with pip install 'dwindle\[torch\]'"
    ):
        dw.load(tmp_path / "net.pt2", trust=True)
