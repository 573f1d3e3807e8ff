"""Each operator's entry: the ONNX file in ONNX Runtime against the LiteRT file, for several samples and both layouts."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from lifting.test_operators import CASES, SHAPE, constant, convert, convolve, depthwise
from zoo import samples, settle

import dwindle as dw
from dwindle.errors import UnsupportedModelError
from dwindle.exporting.convert import float_file
from dwindle.exporting.onnx import onnx_file
from dwindle.exporting.onnx.operators import OPERATORS
from dwindle.lifting import operators as lifted
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring import LiteRTRunner
from dwindle.measuring.onnx_runtime import OnnxRunner

legacy = tf.compat.v1.image


def whole(x):
    return tf.cast(tf.round(5 * x), tf.int32)


MORE = {
    "conv strided and dilated": (convolve((2, 2), "SAME"), "CONV_2D"),
    "conv valid dilated": (convolve((1, 1), "VALID", dilations=(2, 3)), "CONV_2D"),
    "depthwise multiplied and strided": (depthwise((2, 2), "SAME", 2), "DEPTHWISE_CONV_2D"),
    "conv of a pool": (lambda x: convolve((1, 1), "SAME")(tf.nn.avg_pool2d(x, 3, 1, "SAME")), "AVERAGE_POOL_2D"),
    "greater": (lambda x: tf.cast(x > tf.tanh(2 * x), tf.float32), "GREATER"),
    "running sum backwards": (lambda x: tf.cumsum(x, axis=1, reverse=True, exclusive=True), "CUMSUM"),
    "floor divide whole": (lambda x: tf.cast(tf.math.floordiv(whole(x), -3), tf.float32), "FLOOR_DIV"),
    "floor modulo whole": (lambda x: tf.cast(tf.math.floormod(whole(x), -3), tf.float32), "FLOOR_MOD"),
    "divide by a negative": (lambda x: tf.math.floormod(x, -0.7), "FLOOR_MOD"),
    "resize corners": (lambda x: legacy.resize_bilinear(x, (5, 16), align_corners=True), "RESIZE_BILINEAR"),
    "resize old": (lambda x: legacy.resize_bilinear(x, (4, 15)), "RESIZE_BILINEAR"),
    "resize nearest corners": (
        lambda x: legacy.resize_nearest_neighbor(x, (17, 5), align_corners=True),
        "RESIZE_NEAREST_NEIGHBOR",
    ),
    "resize nearest old": (lambda x: legacy.resize_nearest_neighbor(x, (14, 7)), "RESIZE_NEAREST_NEIGHBOR"),
    "channels and a vector": (lambda x: tf.nn.relu(convolve((1, 1), "SAME")(x)) * constant(11, 4), "MUL"),
    "image and its rows": (lambda x: convolve((1, 1), "SAME")(x) + tf.reduce_mean(x, 3)[:, :, :, None], "ADD"),
    "channels chosen": (lambda x: tf.gather(convolve((1, 1), "SAME")(x), (3, 0), axis=3), "GATHER"),
    "one channel": (lambda x: tf.tanh(convolve((1, 1), "SAME")(x)[..., 2]), "STRIDED_SLICE"),
    "every second from behind": (lambda x: x[:, ::-2, 7:2:-3], "STRIDED_SLICE"),
    "softmax over channels": (lambda x: tf.nn.softmax(convolve((1, 1), "SAME")(x)), "SOFTMAX"),
    "stack of convolutions": (lambda x: tf.stack([convolve((1, 1), "SAME")(x)] * 2, 1), "PACK"),
    "rows of an image": (
        lambda x: tf.matmul(tf.reshape(convolve((1, 1), "SAME")(x), (1, 396)), constant(396, 5)),
        "FULLY_CONNECTED",
    ),
    "flattened and changed": (
        lambda x: tf.matmul(tf.sin(tf.reshape(convolve((1, 1), "SAME")(x), (1, 396))), constant(396, 5)),
        "FULLY_CONNECTED",
    ),
    "transposed pads": (
        lambda x: tf.pad(tf.transpose(convolve((1, 1), "SAME")(x), (0, 2, 3, 1)), [[0, 0], [1, 2], [3, 0], [0, 4]]),
        "PAD",
    ),
}
ALL = {**CASES, **MORE}


@pytest.mark.parametrize("case", ALL)
def test_entry_computes_what_litert_computes(case):
    function, name = ALL[case]
    content = convert(function)
    assert name in {operation.name for operation in read_graph(content).operations}
    x = np.random.default_rng(1).normal(size=(5, *SHAPE[1:])).astype(np.float32)
    runner = LiteRTRunner(content)
    expected = np.concatenate([runner.run(x[i : i + 1])[0] for i in range(5)])
    for layout in ("NHWC", "NCHW"):
        file = onnx_file(content, [x], layout=layout)
        assert bool(file.notes) == (
            case == "batch dropped"
        )  # which mixes no samples, but can't be told from one that does
        given = OnnxRunner(file.content)
        fed = x if layout == "NHWC" else x.transpose(0, 3, 1, 2)
        assert given.inputs[0].shape[1:] == fed.shape[1:]
        (found,) = given.predict([fed])
        if layout == "NCHW" and found.ndim > 3:
            found = np.moveaxis(found, 1, -1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * max(1, np.abs(expected).max()))


def test_embedding_is_a_look_up():
    table = constant(20, 7)
    content = convert(lambda ids: tf.gather(table, ids), (1, 5), dtype=tf.int32)
    ids = np.array([[3, 0, 19, 3, 7], [1, 1, 2, 0, 0]], np.int32)
    file = onnx_file(content, [ids])
    np.testing.assert_array_equal(OnnxRunner(file.content).run(ids)[0], table.numpy()[ids])


def test_slopes_of_prelu_lie_on_the_channels():
    inputs = keras.Input(SHAPE[1:])
    x = keras.layers.PReLU(shared_axes=[1, 2])(keras.layers.Conv2D(6, 1)(inputs))
    model = settle(keras.Model(inputs, x))
    model.layers[2].alpha.assign(np.random.default_rng(0).normal(size=(1, 1, 6)))
    (given,) = samples(model, 4)
    file = onnx_file(float_file(model), [given])
    np.testing.assert_allclose(
        OnnxRunner(file.content).run(given)[0], model.predict(given, verbose=0), rtol=1e-4, atol=1e-5
    )


def test_one_hot():
    content = convert(lambda ids: tf.one_hot(ids, 6, 0.5, -2.0), (1, 5), dtype=tf.int32)
    assert "ONE_HOT" in {operation.name for operation in read_graph(content).operations}
    ids = np.array([[3, 0, 5, 3, 1]], np.int32)
    found = OnnxRunner(onnx_file(content, [ids]).content).run(ids)[0]
    np.testing.assert_array_equal(found, np.where(np.eye(6)[ids] == 1, np.float32(0.5), np.float32(-2)))


def test_every_operator_that_is_lifted_is_written_and_tested():
    assert set(lifted.OPERATORS) <= set(OPERATORS)
    assert set(OPERATORS) - set(lifted.OPERATORS) == {"QUANTIZE", "DEQUANTIZE", "DENSIFY"}
    untested = set(OPERATORS) - {name for _, name in ALL.values()} - {"ONE_HOT", "PRELU", "QUANTIZE", "DEQUANTIZE"}
    # Relatives of tested ones, through the same function, which the converter does not emit.
    assert untested <= {"SQUEEZE", "EXPAND_DIMS", "SELECT_V2", "CAST", "RELU_0_TO_1", "LOGICAL_AND", "LOGICAL_NOT",
                        "EMBEDDING_LOOKUP", "DENSIFY"}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: tf.math.top_k(tf.tanh(x), 3)[0] * 2.0,
            r"TOPK_V2 `.*` \(layer `.*`\) has no entry .* export a \.tflite",
        ),
        (lambda x: tf.nn.relu(x)[:, 1:, ..., tf.newaxis], None),
        (lambda x: tf.gather(x, tf.argmax(x, 3, output_type=tf.int32), axis=3, batch_dims=3), "gathers within batches"),
    ],
)
def test_what_has_no_entry_is_refused_by_name(function, message, tmp_path):
    content = convert(function)
    (tmp_path / "model.tflite").write_bytes(content)
    (tmp_path / "model.onnx").write_text("precious")
    if message is None:  # the converter writes a new axis as a reshape
        dw.export(tmp_path / "model.tflite", tmp_path / "model.onnx")
        return
    with pytest.raises(UnsupportedModelError, match=message):
        dw.export(tmp_path / "model.tflite", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.tflite"]
