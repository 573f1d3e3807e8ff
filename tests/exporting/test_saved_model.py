"""A SavedModel folder predicts what the model with rounded weights predicts; float8 is what its definition says."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from zoo import ZOO, feed, outputs, samples, settle

import dwindle as dw
from dwindle.exporting import saved_model
from dwindle.exporting.saved_model import FORMATS, find_kernels, rounded, write_saved_model

L = keras.layers
FLOAT8 = {"float8-e4m3": (4, 3, 7), "float8-e5m2": (5, 2, 15)}  # bits of exponent and fraction, bias
LARGEST = {"float8-e4m3": 448.0, "float8-e5m2": 57344.0}


def decode(code: int, name: str) -> float:
    """The definition, arXiv 2209.05433, table 1."""
    exponent_bits, fraction_bits, bias = FLOAT8[name]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> fraction_bits) & (2**exponent_bits - 1)
    fraction = code & (2**fraction_bits - 1)
    if name == "float8-e4m3" and code & 0x7F == 0x7F:
        return float("nan")
    if name == "float8-e5m2" and exponent == 31:
        return sign * (float("inf") if fraction == 0 else float("nan"))
    if exponent == 0:
        return sign * fraction / 2**fraction_bits * 2.0 ** (1 - bias)
    return sign * (1 + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias)


def finite(name: str) -> list[tuple[float, int]]:
    """The finite numbers that are not negative, in order, with their codes."""
    return sorted((decode(code, name), code) for code in range(128) if np.isfinite(decode(code, name)))


@pytest.mark.parametrize("name", FLOAT8)
def test_all_256_codes_mean_what_the_definition_says_here_and_in_tensorflow(name):
    codes = np.arange(256, dtype=np.uint8).view(FORMATS[name])
    expected = np.array([decode(code, name) for code in range(256)], np.float32)
    np.testing.assert_array_equal(codes.astype(np.float32), expected)
    np.testing.assert_array_equal(tf.cast(tf.constant(codes), tf.float32).numpy(), expected)
    assert finite(name)[-1][0] == LARGEST[name]


@pytest.mark.parametrize("name", FLOAT8)
def test_rounding_is_to_the_nearest_and_to_even_between_every_two_numbers(name):
    table = finite(name)
    given, wanted = [], []
    for (low, low_code), (high, high_code) in itertools.pairwise(table):
        middle = (low + high) / 2
        given += [
            low,
            np.nextafter(np.float32(middle), np.float32(0)),
            middle,
            np.nextafter(np.float32(middle), np.float32(1e9)),
            high,
        ]
        even = low_code if low_code % 2 == 0 else high_code
        wanted += [low_code, low_code, even, high_code, high_code]
    weight = np.array([given, [-value for value in given]], np.float32).T
    stored = rounded(weight, FORMATS[name], (1,))
    np.testing.assert_array_equal(stored.scale, np.ones((1, 2)))  # the largest number is there, so a step is a step
    codes = stored.codes.view(np.uint8)
    np.testing.assert_array_equal(codes[:, 0], wanted)
    np.testing.assert_array_equal(codes[:, 1], np.array(wanted) | 0x80)
    np.testing.assert_array_equal(codes, weight.astype(FORMATS[name]).view(np.uint8))


def test_values_rounded_by_hand():
    # e4m3: steps of 2 from 16, of 2^-9 below 2^-6.  e5m2: steps of 2 from 8, of 2^-16 below 2^-14.
    weight = np.array([448, 17, 18, 19, 31, 2**-10, 3 * 2**-10, -300], np.float32)
    expected = [448, 16, 18, 20, 32, 0, 2**-8, -288]
    np.testing.assert_array_equal(rounded(weight[:, None], FORMATS["float8-e4m3"], (1,)).value[:, 0], expected)
    weight = np.array([57344, 9, 10, 11, 2**-17, 3 * 2**-17, -50000], np.float32)
    expected = [57344, 8, 10, 12, 0, 2**-15, -49152]
    np.testing.assert_array_equal(rounded(weight[:, None], FORMATS["float8-e5m2"], (1,)).value[:, 0], expected)
    # A largest weight of 0.896 has the scale 0.002; 0.035 is 17.5 scales, between 16 and 18, nearer to 18.
    stored = rounded(np.array([[0.896], [0.035]], np.float32), FORMATS["float8-e4m3"], (1,))
    np.testing.assert_allclose(stored.scale, 0.002, rtol=1e-6)
    np.testing.assert_allclose(stored.value[:, 0], [0.896, 0.036], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "relative", "least"), [("float8-e4m3", 2**-4, 2**-10), ("float8-e5m2", 2**-3, 2**-17)]
)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_the_error_of_every_weight_is_bounded(name, relative, least, size):
    generator = np.random.default_rng(0)
    weight = (generator.normal(size=(400, 7)) * 10.0 ** generator.uniform(-7, 0, (400, 7)) * size).astype(np.float32)
    stored = rounded(weight, FORMATS[name], (1,))
    np.testing.assert_allclose(np.abs(stored.value).max(axis=0), np.abs(weight).max(axis=0), rtol=1e-6)
    bound = np.maximum(np.abs(weight) * relative, stored.scale * least) * 1.000001
    assert (np.abs(stored.value.astype(np.float64) - weight) <= bound).all()
    np.testing.assert_array_equal(rounded(stored.value, FORMATS[name], (1,)).codes, stored.codes)  # twice is once


def test_channels_without_weights_and_with_tiny_ones():
    weight = np.zeros((4, 3), np.float32)
    weight[:, 1] = [1e-38, -1e-38, 0, 5e-39]
    stored = rounded(weight, FORMATS["float8-e4m3"], (1,))
    assert np.isfinite(stored.value).all()
    assert np.isfinite(stored.scale).all()
    np.testing.assert_array_equal(stored.value[:, 0], 0)
    assert np.abs(stored.value[:, 1] - weight[:, 1]).max() <= 1e-38 / 16


def _with_rounded_weights(model, name, inputs):
    """Predictions of the model with its kernels rounded by ml_dtypes; the model is put back as it was."""
    kept = [(kernel.variable, keras.ops.convert_to_numpy(kernel.variable)) for kernel in find_kernels(model)]
    for kernel, (variable, weight) in zip(find_kernels(model), kept, strict=True):
        if name.startswith("float8"):
            others = tuple(axis for axis in range(weight.ndim) if axis not in kernel.channel_axes)
            scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(LARGEST[name])
            variable.assign((weight / scale).astype(FORMATS[name]).astype(np.float32) * scale)
        else:
            variable.assign(weight.astype(FORMATS[name]).astype(np.float32))
    found = outputs(model, inputs)
    for variable, weight in kept:
        variable.assign(weight)
    return found


def _run(folder, model, inputs):
    """Outputs of a folder, by TensorFlow alone."""
    loaded = tf.saved_model.load(str(folder))
    found = loaded.serve(*[tf.constant(array) for array in inputs])
    return [found[key].numpy() for key in sorted(found)]


@pytest.mark.parametrize("name", ZOO)
def test_every_model_in_float8(name, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 32)
    before = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    artefact = dw.export(model, tmp_path / "folder", scheme="float8-e4m3", data=inputs)
    assert artefact.verification.passed
    assert artefact.verification.reference == "the model with rounded weights"
    assert all(np.array_equal(a, keras.ops.convert_to_numpy(v)) for a, v in zip(before, model.variables, strict=True))
    expected = _with_rounded_weights(model, "float8-e4m3", inputs)
    found = _run(artefact.path, model, inputs)
    original = outputs(model, inputs)
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    error = max(float(np.abs(a - b).max()) for a, b in zip(found, original, strict=True))
    assert artefact.float_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert artefact.float_error > 0
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("name", ["conv_bn_relu", "several_inputs_and_outputs", "lstm", "subclassed"])
def test_every_format(name, scheme, tmp_path):
    model = settle(ZOO[name]())
    inputs = samples(model, 32)
    artefact = dw.export(model, tmp_path / "folder", scheme=scheme, data=inputs)
    assert artefact.scheme == scheme
    wanted = outputs(model, inputs) if scheme == "float32" else _with_rounded_weights(model, scheme, inputs)
    for result, expected in zip(_run(artefact.path, model, inputs), wanted, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    assert (artefact.float_error < 1e-5) == (scheme == "float32")


def _wide():
    return keras.Sequential([keras.Input((256,)), L.Dense(1024, activation="relu"), L.Dense(1024), L.Dense(10)])


def test_float8_is_a_quarter_and_float16_a_half_of_float32(tmp_path):
    model = _wide()
    sizes = {}
    for scheme in FORMATS:
        artefact = dw.export(model, tmp_path / scheme.replace(".", "_"), scheme=scheme)
        sizes[scheme] = artefact.size_bytes
        assert artefact.size_bytes == sum(f.stat().st_size for f in artefact.path.rglob("*") if f.is_file())
    assert sizes["float32"] > 4 * 1_300_000
    assert sizes["float16"] < 0.52 * sizes["float32"]
    assert sizes["float8-e4m3"] < 0.27 * sizes["float32"]
    assert sizes["float8-e5m2"] < 0.27 * sizes["float32"]


def test_kernels_are_float8_on_disk_with_a_scale_for_each_channel_and_biases_are_float32(tmp_path):
    model = ZOO["shared_layer"]()
    dw.export(model, tmp_path / "folder", scheme="float8-e5m2")
    stored = tf.train.load_checkpoint(str(tmp_path / "folder" / "variables" / "variables"))
    kinds = sorted(
        (str(kind.name), tuple(stored.get_variable_to_shape_map()[key]))
        for key, kind in stored.get_variable_to_dtype_map().items()
        if "kept" in key
    )
    # The shared layer is stored once.
    assert kinds == [
        ("float32", (1, 4)), ("float32", (1, 12)), ("float32", (4,)), ("float32", (12,)),
        ("float8_e5m2", (12, 4)), ("float8_e5m2", (12, 12)),
    ]  # fmt: skip


def test_scales_follow_the_channels_of_the_layer():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2DTranspose(5, 2, name="up")(
        L.DepthwiseConv2D(3, depth_multiplier=2, name="deep")(L.Conv2D(3, 3)(inputs))
    )
    model = keras.Model(inputs, x)
    found = [
        rounded(keras.ops.convert_to_numpy(k.variable), FORMATS["float8-e4m3"], k.channel_axes).scale.shape
        for k in find_kernels(model)
    ]
    assert found == [(1, 1, 1, 3), (1, 1, 3, 2), (1, 1, 5, 1)]


def test_the_folder_loads_with_tensorflow_alone(tmp_path):
    model = settle(ZOO["several_inputs_and_outputs"]())
    inputs = samples(model, 5)
    dw.export(model, tmp_path / "folder", scheme="float8-e4m3")
    np.savez(tmp_path / "inputs.npz", *inputs)
    code = (
        "import sys; sys.modules['dwindle'] = sys.modules['keras'] = None\n"
        "import numpy as np, tensorflow as tf\n"
        f"run = tf.saved_model.load({str(tmp_path / 'folder')!r}).signatures['serving_default']\n"
        f"x = np.load({str(tmp_path / 'inputs.npz')!r})\n"
        "y = run(image=tf.constant(x['arr_0']), vector=tf.constant(x['arr_1']))\n"
        f"np.savez({str(tmp_path / 'outputs.npz')!r}, *[y[key] for key in sorted(y)])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with np.load(tmp_path / "outputs.npz") as found:
        for number, expected in enumerate(_with_rounded_weights(model, "float8-e4m3", inputs)):
            np.testing.assert_allclose(found[f"arr_{number}"], expected, atol=1e-5)


def test_loading_it_back_works_but_for_float8(trained, digits, tmp_path):
    x = digits[1][0][:50]
    dw.export(trained, tmp_path / "folder", scheme="float16", data=x)
    loaded = dw.load(tmp_path / "folder")
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), _with_rounded_weights(trained, "float16", [x])[0], atol=1e-5
    )
    dw.export(trained, tmp_path / "folder", scheme="float8-e4m3", data=x)
    with pytest.raises(
        dw.UnsupportedModelError, match=r"folder` has float8 weights.*load the model that it was exported"
    ):
        dw.load(tmp_path / "folder")


def test_a_trained_model_keeps_its_classes_in_float8(trained, digits, tmp_path):
    x = digits[1][0]
    artefact = dw.export(trained, tmp_path / "folder", scheme="float8-e4m3", data=x)
    found = _run(artefact.path, trained, [x])[0].argmax(1)
    assert (found == trained.predict(x, verbose=0).argmax(1)).mean() >= 0.98
    assert artefact.verification.same_class == artefact.verification.samples == 512


def test_zeros_of_a_pruned_model_stay_zero(trained, tmp_path):
    pruned = dw.prune(trained, 0.8)
    dw.export(pruned, tmp_path / "folder", scheme="float8-e4m3")
    kept = [v for v in tf.saved_model.load(str(tmp_path / "folder")).kept if "float8" in v.dtype.name]
    zeros = [float((v.numpy().astype(np.float32) == 0).mean()) for v in kept]
    assert len(zeros) == 3
    assert min(zeros) >= 0.79


def test_lifted_and_finalized_models(trained, digits, tmp_path):
    x = digits[1][0][:40]
    for model in (dw.lift(trained), dw.finalize(dw.quantize(trained, "int8", digits[0][0][:40]))):
        artefact = dw.export(model, tmp_path / "folder", scheme="float8-e4m3", data=x)
        expected = _with_rounded_weights(model, "float8-e4m3", [x])[0]
        np.testing.assert_allclose(_run(artefact.path, model, [x])[0], expected, atol=1e-5)


def test_other_formats_for_some_layers(tmp_path):
    model = ZOO["mlp"]()
    first, last = model.layers[0].name, model.layers[-1].name
    artefact = dw.export(model, tmp_path / "folder", scheme={"*": "float8-e4m3", last: "float32"})
    assert artefact.scheme == "float8-e4m3+layers"
    kinds = {tuple(v.shape): v.dtype.name for v in tf.saved_model.load(str(artefact.path)).kept}
    assert kinds[12, 16] == "float8_e4m3fn"
    assert kinds[16, 8] == "float8_e4m3fn"
    assert kinds[8, 4] == "float32"
    artefact = dw.export(model, tmp_path / "folder", scheme={first: "float16"})
    assert artefact.scheme == "float32+layers"
    kinds = {tuple(v.shape): v.dtype.name for v in tf.saved_model.load(str(artefact.path)).kept}
    assert (kinds[12, 16], kinds[16, 8]) == ("float16", "float32")


class Own(keras.Model):
    """Holds layers in a list, and a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = [L.Dense(32, activation="relu"), L.Dense(32)]
        self.slope = L.PReLU()
        self.matrix = self.add_weight(shape=(32, 40), name="matrix")
        self.gain = self.add_weight(shape=(40,), initializer="ones", name="gain")

    def call(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return self.slope((inputs @ self.matrix) * self.gain)


def test_weights_of_custom_layers_and_of_layers_in_lists_are_found(tmp_path):
    model = Own()
    model(np.zeros((1, 12), np.float32))
    assert sorted(tuple(k.variable.shape) for k in find_kernels(model)) == [(12, 32), (32, 32), (32, 40)]
    artefact = dw.export(model, tmp_path / "folder", scheme="float8-e4m3")
    assert artefact.verification.passed
    assert artefact.notes == ()


def test_large_weights_that_stay_float32_are_named(tmp_path):
    model = keras.Sequential(
        [keras.Input((16, 16, 3)), L.Conv2D(8, 3), L.PReLU(name="slope"), L.Flatten(), L.Dense(2)], name="net"
    )
    artefact = dw.export(model, tmp_path / "folder", scheme="float8-e4m3")
    assert artefact.notes == ("stays float32: `net/slope/alpha` (1,568 numbers)",)
    assert dw.export(model, tmp_path / "folder").notes == ()


def test_batches_are_as_the_model_has_them(tmp_path):
    model = ZOO["mlp"]()
    dw.export(model, tmp_path / "free")
    loaded = tf.saved_model.load(str(tmp_path / "free"))
    assert next(iter(loaded.serve(tf.zeros((7, 12))).values())).shape == (7, 4)
    fixed = keras.Sequential([keras.Input((6,), batch_size=3), L.Dense(2)])
    artefact = dw.export(fixed, tmp_path / "fixed", data=np.ones((4, 6), np.float32))
    assert artefact.verification.samples == 6
    assert tf.saved_model.load(str(tmp_path / "fixed")).signatures["serving_default"].inputs[0].shape == (3, 6)


def test_models_of_lower_precision_are_written_in_float32(tmp_path):
    model = keras.Sequential([keras.Input((12,)), L.Dense(8, dtype="mixed_float16"), L.Dense(4)])
    artefact = dw.export(model, tmp_path / "folder", scheme="float8-e4m3")
    assert artefact.verification.passed
    assert "lower precision" in artefact.notes[0]


def test_a_savedmodel_is_replaced_and_its_hash_is_that_of_its_files(tmp_path):
    model = ZOO["mlp"]()
    out = tmp_path / "deep" / "model.savedmodel"
    first = dw.export(model, out)
    second = dw.export(model, f"{tmp_path}/deep/model.savedmodel/", scheme="float8-e4m3")
    assert first.sha256 != second.sha256
    assert len(second.sha256) == 64
    assert [path.name for path in out.parent.iterdir()] == ["model.savedmodel"]
    assert "float8_e4m3fn" in {v.dtype.name for v in tf.saved_model.load(str(out)).kept}
    (tmp_path / "empty").mkdir()
    assert dw.export(model, tmp_path / "empty").path == tmp_path / "empty"


def test_nothing_is_written_when_verification_or_writing_fails(trained, tmp_path, monkeypatch):
    out = tmp_path / "folder"
    old = dw.export(trained, out).sha256
    real = saved_model._save

    def wrong(model, stored, folder):
        real(
            model,
            {k: saved_model.StoredKernel(codes=v.codes, scale=v.scale * 1.001) for k, v in stored.items()},
            folder,
        )

    monkeypatch.setattr(saved_model, "_save", wrong)
    with pytest.raises(dw.VerificationError, match=r"the model with rounded weights predicts.*nothing was written"):
        dw.export(trained, out, scheme="float8-e4m3")
    monkeypatch.setattr(saved_model, "_save", real)
    rename = Path.rename

    def full(self, target):
        if Path(target) == out and self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(dw.ConversionError, match="No space left on device"):
        dw.export(trained, out, scheme="float8-e4m3")
    monkeypatch.undo()
    from dwindle.files import sha256_of

    assert sha256_of(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def _place(folder):
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.txt").write_text("precious")
    (folder / "file").write_text("precious")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "saved_model.pb").write_bytes(b"")
    (folder / "mixed" / "notes.txt").write_text("precious")
    (folder / "link").symlink_to(folder / "papers")
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"path": "papers"}, dw.ConfigError, r"`papers` is a folder that holds something other than a SavedModel \(`thesis"),
        ({"path": "mixed"}, dw.ConfigError, r"other than a SavedModel \(`notes.txt`\)"),
        ({"path": "file"}, dw.ConfigError, "`file` is a file"),
        ({"path": "link"}, dw.ConfigError, "`link` is a link"),
        ({"path": "."}, dw.ConfigError, "has no name of its own"),
        ({"path": "new.pb"}, dw.ConfigError, r"it must end in \.tflite or \.onnx \(or in nothing, for a SavedModel folder\)"),
        ({"scheme": "int8"}, dw.ConfigError, r"`scheme` is `int8`, and a SavedModel folder holds floats.*\.tflite"),
        ({"scheme": dw.Scheme(weights=4, dynamic=True)}, dw.ConfigError, "a SavedModel folder holds floats"),
        ({"scheme": "float8"}, dw.ConfigError, r"`scheme` is 'float8'; it must be one of .*did you mean `float"),
        ({"scheme": {}}, dw.ConfigError, "empty mapping"),
        ({"scheme": {"*": "float8-e4m3", "digits": "float32"}}, dw.ConfigError, "'digits'.*did you mean `digit`"),
        ({"path": "new.tflite", "scheme": "float8-e4m3"}, dw.ConfigError, "LiteRT has no float8.*SavedModel"),
        ({"io_type": "int8"}, dw.ConfigError, "a SavedModel has float inputs"),
        ({"model": "model.keras"}, dw.ConfigError, r"must be a keras\.Model"),
        ({"data": np.zeros((4, 9, 9, 1), np.float32)}, dw.DataError, r"\(9, 9, 1\)"),
    ],
)  # fmt: skip
def test_bad_input(trained, tmp_path, monkeypatch, arguments, kind, message):
    monkeypatch.chdir(tmp_path)
    before = _place(tmp_path)
    with pytest.raises(kind, match=message):
        dw.export(**{"model": trained, "path": "new", **arguments})
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@keras.saving.register_keras_serializable("saved_model_tests")
class InPython(L.Layer):
    def call(self, inputs):
        doubled = tf.numpy_function(lambda x: x * 2, [inputs], tf.float32)
        doubled.set_shape(inputs.shape)
        return doubled


def test_models_that_run_python_are_refused(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.Dense(3)(InPython()(inputs)), name="net")
    with pytest.raises(dw.UnsupportedModelError, match=r"`net` runs Python while it computes \(`.*PyFunc`\)"):
        dw.export(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_models_that_a_folder_can_not_hold(trained, digits, tmp_path):
    with pytest.raises(dw.ConfigError, match=r"made by dw\.quantize for `int8`.*dw\.finalize"):
        dw.export(dw.quantize(trained, "int8", digits[0][0][:20]), tmp_path / "folder")
    stateful = keras.Sequential([keras.Input((5, 6), batch_size=1), L.LSTM(7, stateful=True, name="memory")])
    with pytest.raises(dw.UnsupportedModelError, match="`memory` keeps its state"):
        dw.export(stateful, tmp_path / "folder")
    model = ZOO["mlp"]()
    model.layers[0].kernel.assign(np.full((12, 16), np.nan))
    with pytest.raises(dw.ConversionError, match="NaN or infinite"):
        dw.export(model, tmp_path / "folder", scheme="float8-e4m3")
    model.layers[0].kernel.assign(np.full((12, 16), 70000.0))
    with pytest.raises(dw.ConversionError, match="beyond 65,504"):
        dw.export(model, tmp_path / "folder", scheme="float16")
    assert dw.export(model, tmp_path / "folder", scheme="float8-e4m3").verification.passed
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_function_itself_takes_what_export_takes(tmp_path):
    model = ZOO["mlp"]()
    verification, error, notes = write_saved_model(model, tmp_path / "folder", "float8-e5m2")
    assert verification.samples == 64
    assert verification.max_abs_error <= 1e-5 < error
    assert notes == []


def test_the_command_writes_a_folder(trained, digits, tmp_path, capsys):
    from dwindle.cli import main
    from dwindle.cli.convert import FOLDER_SCHEMES

    assert tuple(FORMATS) == FOLDER_SCHEMES
    trained.save(tmp_path / "cnn.keras")
    np.savez(tmp_path / "digits.npz", x_train=digits[0][0][:60], y_train=digits[0][1][:60])
    out = tmp_path / "folder"
    call = ["convert", str(tmp_path / "cnn.keras"), str(out), "--scheme", "float8-e4m3"]
    assert main([*call, "--data", str(tmp_path / "digits.npz"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scheme"] == "float8-e4m3"
    assert told["float_error"] > 0
    assert told["verification"]["passed"]
    assert main(call) == 2
    assert "exists; write over it with --force" in capsys.readouterr().err
    assert main([*call, "--force", "--layer", "digit=float32"]) == 0
    assert "largest difference from the model before rounding" in capsys.readouterr().out
    for more, message in (
        (["--scheme", "int8"], "a SavedModel folder holds floats"),
        (["--scheme", "float8"], "must be one of"),
        (["--layer", "digit=int4"], "a SavedModel folder holds floats"),
        (["--rounding", "gptq"], "are for integers"),
    ):
        assert main([*call, "--force", *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*call[:2], str(tmp_path / "x.tflite"), "--scheme", "float8-e4m3"]) == 2
    assert "LiteRT has no float8" in capsys.readouterr().err


def test_names_of_inputs_are_kept_where_the_model_takes_a_dictionary(tmp_path):
    model = settle(ZOO["inputs_by_name"]())
    inputs = samples(model, 4)
    dw.export(model, tmp_path / "folder")
    run = tf.saved_model.load(str(tmp_path / "folder")).signatures["serving_default"]
    given = dict(zip(["first", "second"], inputs, strict=True))
    found = run(**{name: tf.constant(array) for name, array in given.items()})
    expected = model(feed(model, inputs))
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key.rsplit("_", 1)[-1]], atol=1e-6)


def test_ml_dtypes_is_what_the_formats_are():
    assert FORMATS["float8-e4m3"] is ml_dtypes.float8_e4m3fn
    assert FORMATS["float8-e5m2"] is ml_dtypes.float8_e5m2
