"""Sparse files: exact, smaller, run by LiteRT; dense where that is not so."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.exporting.sparse import decode, encode, sparse_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.lifting.float_files import as_float
from dwindle.measuring.litert import LiteRTRunner


def thinned(shape, zeros, seed=0, block=1):
    generator = np.random.default_rng(seed)
    kept = generator.random((*shape[:-1], shape[-1] // block)) >= zeros
    return (generator.normal(size=shape) * np.repeat(kept, block, axis=-1)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((8, 8, 32))
    x = keras.layers.Conv2D(32, 3, padding="same", activation="relu", name="wide")(inputs)
    x = keras.layers.DepthwiseConv2D(3, name="deep")(x)
    x = keras.layers.Conv2D(48, 1, activation="relu", name="point")(x)
    made = keras.Model(inputs, keras.layers.Dense(20, name="head")(keras.layers.Flatten()(x)))
    for layer in ("wide", "point", "head"):
        kernel = made.get_layer(layer).kernel
        kernel.assign(thinned(tuple(kernel.shape), 0.9, seed=len(layer)) * 0.2)
    return made


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(1).normal(size=(70, 8, 8, 32)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize(
    "weight",
    [thinned((64, 48), 0.9), thinned((7, 300), 0.95), thinned((8, 3, 3, 20), 0.8), thinned((40, 64), 0.9, block=4),
     thinned((4, 1, 1, 96), 0.7, block=16), np.zeros((5, 4)), np.ones((5, 4))],
)  # fmt: skip
def test_an_encoding_reads_back_as_what_it_was(weight, dtype):
    weight = (weight * 50).astype(dtype)
    found = encode(weight)
    np.testing.assert_array_equal(decode(found, weight.shape), weight)


def test_the_encoding_is_as_small_as_counted_by_hand():
    weight = thinned((512, 200), 0.9)
    kept = int((weight != 0).sum())
    # 4 bytes a value and 1 an index of 200 places, 2 for each of 513 beginnings of rows.
    assert encode(weight).size_bytes == kept * 5 + 2 * 513
    blocks = thinned((512, 256), 0.9, block=16)
    assert encode(blocks).block == 16
    assert encode(blocks).size_bytes == int((blocks != 0).sum()) * 4 + int((blocks != 0).sum()) // 16 + 2 * 513


@pytest.mark.parametrize("scheme", ["float32", "float16", "int8", "int8-weights", "int16x8"])
def test_a_sparse_file_is_smaller_and_predicts_the_same_to_the_bit(model, samples, tmp_path, scheme):
    dense = dw.export(model, tmp_path / "dense.tflite", scheme=scheme, data=samples)
    sparse = dw.export(model, tmp_path / "sparse.tflite", scheme=scheme, data=samples, sparse=True)
    assert sparse.size_bytes < (0.9 if scheme == "int8" else 0.6) * dense.size_bytes
    assert any(note.startswith("sparse: ") for note in sparse.notes)
    expected = LiteRTRunner(dense.path).predict([samples])[0]
    np.testing.assert_array_equal(LiteRTRunner(sparse.path).predict([samples])[0], expected)


def test_what_litert_refuses_stays_dense_and_says_so(model, samples, tmp_path):
    made = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=samples, sparse=True)
    assert any("`head` (90% zeros): LiteRT does not run FULLY_CONNECTED" in note for note in made.notes)
    assert any("`deep`" in note and "the sparse encoding is not smaller" in note for note in made.notes)
    dense = dw.export(model, tmp_path / "d.tflite", scheme="int8-dynamic", data=samples)
    content, weights = sparse_file(dense.path.read_bytes())
    assert content == dense.path.read_bytes()
    assert len(weights) == 4
    assert all(weight.reason for weight in weights)


def test_a_dense_model_gives_the_file_back(samples, tmp_path, model):
    twin = keras.models.clone_model(model)
    dense = dw.export(twin, tmp_path / "dense.tflite", data=samples)
    same = dw.export(twin, tmp_path / "same.tflite", data=samples, sparse=True)
    assert same.sha256 == dense.sha256
    assert same.notes[0] == "sparse: 0 of 4 weights, 0 bytes as 0"


def test_a_sparse_file_is_read_inspected_and_lifted_as_a_dense_one(model, samples, tmp_path):
    dense = dw.export(model, tmp_path / "dense.tflite", data=samples)
    sparse = dw.export(model, tmp_path / "sparse.tflite", data=samples, sparse=True)
    rows = {row.op: row for row in dw.inspect_file(sparse.path).rows}
    expected = {row.op: row for row in dw.inspect_file(dense.path).rows}
    for op in ("FULLY_CONNECTED", "DEPTHWISE_CONV_2D"):
        assert (rows[op].parameters, rows[op].sparsity) == (expected[op].parameters, expected[op].sparsity)
    assert dw.inspect_file(sparse.path).weights_bytes < sparse.size_bytes
    widened, notes = as_float(sparse.path.read_bytes())
    assert notes == ["sparse weights made dense"]
    weights = {tensor.name: tensor.value for tensor in read_graph(widened).tensors if tensor.value is not None}
    for tensor in read_graph(dense.path.read_bytes()).tensors:
        if tensor.value is not None and tensor.dtype == np.float32:
            np.testing.assert_array_equal(weights[tensor.name], tensor.value)
    lifted = dw.load(sparse.path)
    np.testing.assert_allclose(lifted.predict(samples, verbose=0), model.predict(samples, verbose=0), atol=1e-4)


def test_a_saved_model_has_no_sparse_weights(model, tmp_path):
    with pytest.raises(dw.ConfigError, match=r"`sparse` is True, but a SavedModel"):
        dw.export(model, tmp_path / "folder", sparse=True)
