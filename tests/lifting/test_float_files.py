"""Files that are widened to float32, and files as they were written years ago."""

from __future__ import annotations

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from zoo import settle

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import parse, read_graph, serialize
from dwindle.lifting.float_files import as_float, modern, named
from dwindle.measuring import LiteRTRunner
from dwindle.quantization import calibrate, resolve_scheme, write_quantized

layers = keras.layers


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(inputs)
    wide = layers.Conv2D(12, 1)(x)
    x = layers.ReLU()(layers.Add()([wide, keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, 4]])]))
    return settle(keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.Flatten()(x))))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((32, 16, 16, 3), np.float32)


def old(content):
    """Return a file as converters wrote it before 2021: without a signature, operators numbered in one byte."""
    found = copy.deepcopy(parse(content))
    found.signatureDefs = None
    for code in found.operatorCodes:
        code.deprecatedBuiltinCode, code.builtinCode = min(code.builtinCode, 127), 0
    return serialize(found)


def test_an_old_file_is_quantized_as_a_new_one(model, images):
    content, scheme = float_file(model), resolve_scheme("int8")
    before = old(content)
    ranges = calibrate(before, (images,))
    expected, found = write_quantized(content, scheme, ranges), write_quantized(before, scheme, ranges)
    names = [operation.name for operation in read_graph(expected).operations]
    assert [operation.name for operation in read_graph(found).operations] == names
    np.testing.assert_array_equal(LiteRTRunner(found).predict([images])[0], LiteRTRunner(expected).predict([images])[0])
    assert modern(content) == content


def test_a_signature_is_made_with_the_names_that_inputs_and_outputs_have(model):
    bare = parse(old(float_file(model)))
    for tensor in bare.subgraphs[0].tensors:
        tensor.name = None
    before = read_graph(serialize(bare))
    signature = parse(modern(serialize(bare))).signatureDefs[0]
    assert [(found.name.decode(), found.tensorIndex) for found in signature.inputs] == [
        ("input_0", before.inputs[0].index)
    ]
    assert [(found.name.decode(), found.tensorIndex) for found in signature.outputs] == [
        (before.outputs[0].name, before.outputs[0].index)
    ]


def test_a_signature_that_names_no_tensor_of_the_graph_is_damage(model, images):
    broken = parse(write_quantized(float_file(model), resolve_scheme("int8"), calibrate(float_file(model), (images,))))
    broken.signatureDefs[0].outputs[0].tensorIndex = 1000
    with pytest.raises(dw.UnsupportedModelError, match=r"damaged \(tensor 1000 of its signature is not in its graph\)"):
        as_float(serialize(broken))


def test_names_are_written_where_there_are_none_and_each_is_one_tensors(model):
    content = float_file(model)
    assert named(content) == content
    expected = [tensor.name for tensor in read_graph(content).tensors]
    bare = parse(content)
    main = bare.subgraphs[0]
    first = read_graph(content).operations[0].outputs[0].index
    main.tensors[first].name = None
    taken = main.tensors[main.operators[1].outputs[0]]
    taken.name = b"conv_2d_0"
    expected[main.operators[1].outputs[0]], expected[first] = "conv_2d_0", "conv_2d_0_"
    found = parse(named(serialize(bare))).subgraphs[0].tensors
    assert [tensor.name.decode() for tensor in found] == expected
    assert read_graph(serialize(bare)).tensors[first].name == "conv_2d_0_"


def test_an_old_file_keeps_no_operator_in_float(model, images, tmp_path):
    (tmp_path / "old.tflite").write_bytes(old(float_file(model)))
    file = dw.export(dw.load(tmp_path / "old.tflite"), tmp_path / "int8.tflite", scheme="int8", data=images)
    assert file.size_bytes < 0.4 * len(float_file(model))
    assert not [note for note in file.notes if "stays float32" in note]


def test_a_widened_file_holds_each_weight_once(model):
    plain = float_file(model)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations, converter.target_spec.supported_types = [tf.lite.Optimize.DEFAULT], [tf.float16]
    half = bytes(converter.convert())
    assert len(half) < 0.7 * len(plain)
    wide, notes = as_float(half)
    assert notes == ["float16 weights widened to float32"]
    assert len(wide) < 1.05 * len(plain)
    graph = read_graph(wide)
    used = {t.index for op in graph.operations for t in (*op.inputs, *op.outputs) if t is not None}
    assert {tensor.index for tensor in graph.tensors} == used | {tensor.index for tensor in graph.inputs}


def test_a_residual_block_that_adds_channels_is_predicted_in_batches(model, images):
    # TensorFlow's graph optimizer crashes on a convolution plus a `Pad`; `predict` runs it, a plain call does not.
    lifted = dw.lift(model)
    expected = LiteRTRunner(lifted.float_file).predict([images])[0]
    np.testing.assert_allclose(lifted.predict(images, batch_size=8, verbose=0), expected, rtol=1e-4, atol=1e-5)
