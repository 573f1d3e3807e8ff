"""The pages on sources: every block runs, and what is refused is refused in the page's words."""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.cli import main
from dwindle.exporting.convert import quiet

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run(page, folder, capsys):
    """Run the blocks of a page in a folder; return what they printed."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf8"), re.S | re.M)
    assert [language for language, _ in blocks] == ["python", "sh"]
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        if page == "from-pytorch.md":
            warnings.simplefilter("ignore")  # PyTorch's exporter warns about its own code
        exec(compile(blocks[0][1], page, "exec"), names)
        for line in blocks[1][1].splitlines():
            program, *arguments = shlex.split(line)
            assert program == "dwindle"
            assert main(arguments) == 0, capsys.readouterr().err
    assert names["file"].verification.passed
    return capsys.readouterr().out


def sizes(folder, *names):
    return [(folder / name).stat().st_size for name in names]


def test_the_page_on_keras_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = run("from-keras.md", tmp_path, capsys)
    assert printed.startswith("1.0 99.0% of outputs within 1 quantum\n")
    assert "accuracy" in printed
    slim, whole = sizes(tmp_path, "slim.tflite", "digits.tflite")
    assert slim < 0.7 * whole
    assert dw.load("slim.keras").count_params() < 0.6 * dw.load("digits.keras").count_params()


def test_the_page_on_tensorflow_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow")
    monkeypatch.chdir(tmp_path)
    printed = run("from-tensorflow.md", tmp_path, capsys)
    assert "'image'" in printed  # the signature's name
    assert (tmp_path / "half" / "saved_model.pb").exists()
    assert max(sizes(tmp_path, "small.tflite", "digits.tflite")) < 20_000  # 11,730 weights of 8 bits


def test_the_page_on_litert_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    printed = run("from-litert.md", tmp_path, capsys)
    assert "['image', 'conv', 'flat', 'digit', 'softmax']" in printed
    assert "the file was quantized" in printed
    floats, small, pruned, whole = sizes(
        tmp_path, "digits.tflite", "small.tflite", "pruned.tflite", "floats.tflite"
    )  # fmt: skip
    assert max(small, pruned) < floats / 2
    assert whole > small * 2


def test_the_page_on_onnx_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    printed = run("from-onnx.md", tmp_path, capsys)
    assert printed.startswith("(None, 28, 28, 1)\nagrees with ONNX Runtime")
    small, slim, whole = sizes(tmp_path, "digits.tflite", "slim.onnx", "digits.onnx")
    assert max(small, slim) < whole / 2


def test_the_page_on_pytorch_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    printed = run("from-pytorch.md", tmp_path, capsys)
    assert printed.startswith("(None, 28, 28, 1)\nagrees with PyTorch")
    slim, whole = sizes(tmp_path, "slim.tflite", "digits.tflite")
    assert slim < 0.7 * whole


def rows(page):
    """Return the words of a page's table of what is not read, by their case."""
    table = (DOCS / page).read_text(encoding="utf8").partition("| what is not read | what it says |")[2]
    return dict(re.findall(r"^\| ([^|-][^|]*) \| (.*) \|$", table, re.M))


def says(page, case, source, **options):
    """Check that a source is refused in a page's words for a case."""
    with pytest.raises(dw.DwindleError) as caught:
        dw.load(source, **options)
    words = re.escape(rows(page)[case]).replace("…", ".*")
    assert re.fullmatch(words, str(caught.value)), f"{caught.value}\n{rows(page)[case]}"


def test_what_is_refused_of_keras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = keras.layers

    class Scale(layers.Layer):
        pass

    keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x, name="lambda")]).save("model.keras")
    keras.Sequential([keras.Input((3,)), layers.Dense(1)]).save_weights("model.weights.h5")
    keras.Sequential([keras.Input((3,)), Scale()]).save("custom.keras")
    with zipfile.ZipFile("custom.keras") as old, zipfile.ZipFile("old.keras", "w") as new:
        for name in old.namelist():
            content = json.dumps({"keras_version": "2.15.0"}) if name == "metadata.json" else old.read(name)
            new.writestr(name, content)
    for name in ("broken.keras", "broken.h5"):
        Path(name).write_text("no model")
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, layers.GlobalMaxPooling2D()(image))
    page = "from-keras.md"
    says(page, "lengths that contradict the model", model, inputs=(None, 20, 20, 1))
    with pytest.raises(dw.UnsupportedModelError) as caught:
        dw.export(model, "image.tflite")
    assert str(caught.value) == rows(page)["open lengths, when a file is written without `data`"]
    says(page, "code in the file", "model.keras")
    says(page, "weights only", "model.weights.h5")
    says(page, "a class that is not known", "custom.keras")
    says(page, "a `.keras` of Keras 2", "old.keras")
    says(page, "a damaged `.keras`", "broken.keras")
    says(page, "a damaged `.h5`", "broken.h5")


def test_what_is_refused_of_tensorflow_and_litert(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    monkeypatch.chdir(tmp_path)

    def save(folder, shape, function, *, key="serving_default", name="x"):
        module = tf.Module()
        signature = [tf.TensorSpec(shape, name=name)]
        module.serve = tf.function(lambda x: {"y": function(x)}, input_signature=signature)
        with quiet():
            tf.saved_model.save(module, folder, signatures={key: module.serve})
            if folder in ("fixed", "open"):
                converter = tf.lite.TFLiteConverter.from_saved_model(folder)
                Path(f"{folder}.tflite").write_bytes(converter.convert())

    save("other", (None, 3), lambda x: tf.nn.relu(x), key="predict")
    save("flex", (None, 3, 3), lambda x: tf.linalg.det(x))

    def until(x):
        every = tf.TensorArray(tf.float32, 4)
        found = tf.while_loop(
            lambda i, one, _: (tf.reduce_sum(one) < 9.0) & (i < 4),
            lambda i, one, every: (i + 1, one + 1.0, every.write(i, one)), (0, x, every),
        )  # fmt: skip
        return tf.transpose(found[2].stack(), (1, 0, 2))

    save("until", (None, 3), until)
    save("image", (None, None, None, 3), lambda x: tf.nn.relu(x), name="image")
    save("open", (None, None, None, 3), lambda x: tf.nn.relu(x))
    save("fixed", (4, 3), lambda x: tf.nn.relu(x))
    dw.export(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), "small8", "float8-e4m3")
    Path("empty").mkdir()
    Path("frozen.pb").write_bytes(b"")
    page = "from-tensorflow.md"
    says(page, "no `serving_default`", "other")
    says(page, "an operator that LiteRT has not", "flex")
    says(page, "a loop that ends as the data say, and writes a list", "until")
    says(page, "open lengths", "image")
    says(page, "a fixed number of samples above 1", "fixed")
    says(page, "float8 weights", "small8")
    says(page, "another folder", "empty")
    says(page, "a frozen graph", "frozen.pb")
    Path("text.tflite").write_text("hello world, this is text")
    Path("damaged.tflite").write_bytes(Path("fixed.tflite").read_bytes()[:400])
    page = "from-litert.md"
    says(page, "a fixed number of samples above 1", "fixed.tflite")
    says(page, "open lengths", "open.tflite")
    says(page, "another file", "text.tflite")
    says(page, "a damaged file", "damaged.tflite")


def test_what_is_refused_of_onnx(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    monkeypatch.chdir(tmp_path)

    def model(kind, inputs, *, name="", initializers=(), **attributes):
        given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        names = [*inputs, *(tensor.name for tensor in initializers)]
        node = helper.make_node(kind, names, ["y"], name=name, **attributes)
        end = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        return helper.make_model(helper.make_graph([node], "graph", given, [end], initializers))

    page = "from-onnx.md"
    says(page, "a shape that does not fit", model("Relu", {"image": ("N", 1, 28, 28)}), inputs=(None, 3, 28, 28))
    weight = TensorProto(
        name="weight", dims=(3,), data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )  # fmt: skip
    weight.external_data.add(key="location", value="../weight.bin")
    onnx.save(model("Add", {"x": (1, 3)}, initializers=[weight]), "outside.onnx")
    says(page, "weights outside the folder", "outside.onnx")
    Path("broken.onnx").write_text("no model")
    says(page, "a damaged file", "broken.onnx")
    words = model("Identity", {"words": (1, 3)})
    words.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    says(page, "text", words)
    several = model("SequenceLength", {"list": (1, 3)})
    several.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, (1, 3)))
    says(page, "sequences", several)
    sparse = model("Relu", {"x": (1, 3)})
    sparse.graph.sparse_initializer.add().values.name = "few"
    says(page, "sparse constants", sparse)
    monkeypatch.setitem(sys.modules, "onnx", None)
    says(page, "no package", "broken.onnx")


def test_what_is_refused_of_pytorch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits.pt2", "net.pth"):
        Path(name).write_bytes(b"")
    says("from-pytorch.md", "a `.pt2` that is not trusted", "digits.pt2")
    says("from-pytorch.md", "another file of PyTorch", "net.pth")
    torch = pytest.importorskip("torch")
    says("from-pytorch.md", "a module without `inputs`", torch.nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    says("from-pytorch.md", "no package", torch.nn.Linear(2, 2), inputs=(1, 2))


def test_a_lifted_model_without_a_change_is_the_same_file(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.Conv2D(3, 3), keras.layers.Flatten()])
    dw.export(model, tmp_path / "one.tflite")
    dw.export(dw.load(tmp_path / "one.tflite"), tmp_path / "two.tflite")
    assert (tmp_path / "one.tflite").read_bytes() == (tmp_path / "two.tflite").read_bytes()


def test_a_quantized_file_with_integer_ends_becomes_a_model_of_floats(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.Conv2D(3, 3), keras.layers.Flatten()])
    x = np.random.default_rng(0).random((64, 6, 6, 2), np.float32)
    dw.export(model, tmp_path / "int8.tflite", "int8", x, io_type="int8")
    loaded = dw.load(tmp_path / "int8.tflite")
    assert loaded.inputs[0].dtype == "float32"
    expected = model.predict(x, verbose=0)
    assert np.abs(loaded.predict(x, verbose=0) - expected).max() < 0.02 * np.abs(expected).max()
