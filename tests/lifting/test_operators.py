"""Each operator's entry against the LiteRT interpreter, on random shapes and parameters."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from zoo import ZOO, outputs, samples, settle

import dwindle as dw
from dwindle.lifting import operators
from dwindle.lifting.building import refuse_states
from dwindle.lifting.flatbuffer import Graph, Operation, read_graph
from dwindle.measuring import LiteRTRunner

SHAPE = (1, 9, 11, 6)


def convert(function, *shapes, dtype=tf.float32):
    """Return the LiteRT file of a TensorFlow function of inputs of the given shapes."""
    specs = [tf.TensorSpec(shape, dtype) for shape in (shapes or (SHAPE,))]
    concrete = tf.function(function, input_signature=specs, autograph=False).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    return bytes(converter.convert())


def constant(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def convolve(strides, padding, dilations=(1, 1), groups=1):
    kernel = constant(3, 3, 6 // groups, 4 * groups)
    return lambda x: tf.nn.conv2d(x, kernel, strides, padding, dilations=dilations) + constant(4 * groups, seed=1)


def depthwise(strides, padding, multiplier=1):
    kernel = constant(3, 3, 6, multiplier)
    return lambda x: tf.nn.depthwise_conv2d(x, kernel, (1, *strides, 1), padding) + constant(6 * multiplier, seed=1)


def transposed(strides, padding, size):
    kernel = constant(3, 3, 4, 6)
    return lambda x: tf.nn.conv2d_transpose(x, kernel, (1, *size, 4), strides, padding) + constant(4, seed=1)


def layer_norm(x):
    mean, variance = tf.nn.moments(x, 3, keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-3) * constant(6) + constant(6, seed=1)


CASES = {
    "conv same": (convolve((1, 1), "SAME"), "CONV_2D"),
    "conv valid strided": (convolve((2, 3), "VALID"), "CONV_2D"),
    "conv same strided": (convolve((2, 2), "SAME"), "CONV_2D"),
    "conv dilated": (convolve((1, 1), "SAME", dilations=(2, 2)), "CONV_2D"),
    "conv grouped": (convolve((1, 1), "VALID", groups=2), "CONV_2D"),
    "conv relu": (lambda x: tf.nn.relu(convolve((1, 1), "SAME")(x)), "CONV_2D"),
    "conv relu6": (lambda x: tf.nn.relu6(3 * convolve((1, 1), "SAME")(x)), "CONV_2D"),
    "depthwise": (depthwise((1, 1), "SAME"), "DEPTHWISE_CONV_2D"),
    "depthwise strided": (depthwise((2, 2), "SAME"), "DEPTHWISE_CONV_2D"),
    "depthwise multiplied": (depthwise((1, 1), "VALID", 3), "DEPTHWISE_CONV_2D"),
    "max pool": (lambda x: tf.nn.max_pool2d(x, (3, 2), (2, 1), "SAME"), "MAX_POOL_2D"),
    "average pool": (lambda x: tf.nn.avg_pool2d(x, (2, 3), (2, 2), "SAME"), "AVERAGE_POOL_2D"),
    "dense": (lambda x: tf.matmul(tf.reshape(x, (1, 594)), constant(594, 5)) + constant(5, seed=1), "FULLY_CONNECTED"),
    "dense kept dims": (lambda x: tf.tensordot(x, constant(6, 5), 1), "FULLY_CONNECTED"),
    "softmax": (lambda x: tf.nn.softmax(x), "SOFTMAX"),
    "log softmax": (lambda x: tf.nn.log_softmax(x), "LOG_SOFTMAX"),
    "sigmoid": (lambda x: tf.sigmoid(x), "LOGISTIC"),
    "tanh": (lambda x: tf.tanh(x), "TANH"),
    "relu": (lambda x: tf.nn.relu(x), "RELU"),
    "relu6": (lambda x: tf.nn.relu6(x), "RELU6"),
    "elu": (lambda x: tf.nn.elu(x), "ELU"),
    "leaky relu": (lambda x: tf.nn.leaky_relu(x, 0.2), "LEAKY_RELU"),
    "gelu": (lambda x: tf.nn.gelu(x), "GELU"),
    "hard swish": (lambda x: x * tf.nn.relu6(x + 3) * (1 / 6), "HARD_SWISH"),
    "relu of the negative": (lambda x: tf.nn.relu(x) + constant(1, 1, 6) * -tf.nn.relu(-x), "RELU"),
    "add constant": (lambda x: x + constant(6), "ADD"),
    "constant minus": (lambda x: constant(6) - x, "SUB"),
    "times constant": (lambda x: x * constant(11, 1), "MUL"),
    "constant over": (lambda x: constant(6) / (tf.abs(x) + 1), "DIV"),
    "maximum": (lambda x: tf.maximum(x, constant(6)), "MAXIMUM"),
    "minimum": (lambda x: tf.minimum(x, 0.1 * x + 0.5), "MINIMUM"),
    "add": (lambda x: tf.nn.relu(x + tf.tanh(x)), "ADD"),
    "subtract": (lambda x: x - tf.tanh(x), "SUB"),
    "multiply": (lambda x: x * tf.tanh(x), "MUL"),
    "squared difference": (lambda x: tf.math.squared_difference(x, tf.tanh(x)), "SQUARED_DIFFERENCE"),
    "concat": (lambda x: tf.concat([x, tf.tanh(x)], 3), "CONCATENATION"),
    "concat rows": (lambda x: tf.concat([x, tf.tanh(x)], -3), "CONCATENATION"),
    "pad": (lambda x: tf.pad(x, [[0, 0], [1, 2], [3, 0], [0, 0]]), "PAD"),
    "pad with one": (lambda x: tf.pad(x, [[0, 0], [1, 0], [0, 1], [0, 0]], constant_values=1.0), "PADV2"),
    "mean over space": (lambda x: tf.reduce_mean(x, (1, 2)), "MEAN"),
    "mean kept": (lambda x: tf.reduce_mean(x, (1, 2), keepdims=True), "MEAN"),
    "mean over channels": (lambda x: tf.reduce_mean(x, 3), "MEAN"),
    "sum": (lambda x: tf.reduce_sum(x, (1, 3)), "SUM"),
    "max over space": (lambda x: tf.reduce_max(x, (1, 2)), "REDUCE_MAX"),
    "min": (lambda x: tf.reduce_min(x, 2), "REDUCE_MIN"),
    "transpose": (lambda x: tf.transpose(x, (0, 3, 1, 2)), "TRANSPOSE"),
    "reshape": (lambda x: tf.reshape(x, (1, 99, 6)), "RESHAPE"),
    "split": (lambda x: tf.concat([tf.tanh(a) for a in tf.split(x, 3, 3)][::-1], 3), "SPLIT"),
    "strided slice": (lambda x: x[:, 1:-1, ::2, 2:5], "STRIDED_SLICE"),
    "slice away an axis": (lambda x: x[:, 3], "STRIDED_SLICE"),
    "exp": (lambda x: tf.exp(0.3 * x), "EXP"),
    "square root": (lambda x: tf.sqrt(tf.abs(x) + 0.1), "SQRT"),
    "reciprocal root": (lambda x: tf.math.rsqrt(tf.abs(x) + 0.5), "RSQRT"),
    "absolute": (lambda x: tf.abs(x), "ABS"),
    "transposed conv": (transposed((2, 2), "SAME", (18, 22)), "TRANSPOSE_CONV"),
    "transposed conv odd": (transposed((2, 2), "SAME", (17, 21)), "TRANSPOSE_CONV"),
    "transposed conv valid": (transposed((2, 3), "VALID", (19, 33)), "TRANSPOSE_CONV"),
    "conv 3d": (lambda x: tf.nn.conv3d(x[..., None], constant(2, 3, 2, 1, 4), (1, 1, 2, 1, 1), "SAME"), "CONV_3D"),
    "product of two": (lambda x: tf.matmul(x, tf.tanh(x), transpose_b=True), "BATCH_MATMUL"),
    "product of two plain": (lambda x: tf.matmul(x[:, :, :6], tf.tanh(x[:, :, 5:])), "BATCH_MATMUL"),
    "attention": (lambda x: tf.matmul(tf.nn.softmax(tf.matmul(x, x, transpose_b=True) * 0.4), x), "BATCH_MATMUL"),
    "layer norm": (layer_norm, "SQUARED_DIFFERENCE"),
    "pack": (lambda x: tf.stack([x, tf.tanh(x)], 3), "PACK"),
    "unpack": (lambda x: tf.tanh(tf.unstack(x, axis=2)[3]) + tf.unstack(x, axis=2)[1], "UNPACK"),
    "slice": (lambda x: tf.slice(x, (0, 2, 0, 1), (-1, 4, 5, -1)), "SLICE"),
    "cumulative sum": (lambda x: tf.cumsum(x, axis=2), "CUMSUM"),
    "product over an axis": (lambda x: tf.reduce_prod(x, 3), "REDUCE_PROD"),
    "any": (lambda x: tf.cast(tf.reduce_any(x > 2, 3), tf.float32), "REDUCE_ANY"),
    "all": (lambda x: tf.cast(tf.reduce_all(x > -1, 3), tf.float32), "REDUCE_ALL"),
    "arg max": (lambda x: tf.cast(tf.argmax(x, 3), tf.float32), "ARG_MAX"),
    "arg min": (lambda x: tf.cast(tf.argmin(x, 1), tf.float32), "ARG_MIN"),
    "select": (lambda x: tf.where(x > 0.1, x, tf.tanh(x)), "SELECT"),
    "select a constant": (lambda x: tf.where(x > 0.1, x, 0.5), "SELECT_V2"),
    "equal": (lambda x: tf.cast(tf.equal(tf.round(x), 1.0), tf.float32), "EQUAL"),
    "not equal": (lambda x: tf.cast(tf.not_equal(tf.round(x), 1.0), tf.float32), "NOT_EQUAL"),
    "less": (lambda x: tf.cast(x < tf.tanh(2 * x), tf.float32), "LESS"),
    "less equal": (lambda x: tf.cast(x <= constant(6), tf.float32), "LESS_EQUAL"),
    "greater equal": (lambda x: tf.cast(x >= constant(6), tf.float32), "GREATER_EQUAL"),
    "logic": (lambda x: tf.cast((x > 0) & ~(x > 1) | (x < -1), tf.float32), "LOGICAL_OR"),
    "floor divide": (lambda x: tf.math.floordiv(x, 0.3), "FLOOR_DIV"),
    "floor modulo": (lambda x: tf.math.floormod(x, tf.abs(x) + 0.7), "FLOOR_MOD"),
    "round": (lambda x: tf.round(3 * x), "ROUND"),
    "mirror pad": (lambda x: tf.pad(x, [[0, 0], [1, 2], [3, 0], [0, 0]], mode="REFLECT"), "MIRROR_PAD"),
    "symmetric pad": (lambda x: tf.pad(x, [[0, 0], [1, 2], [3, 0], [0, 0]], mode="SYMMETRIC"), "MIRROR_PAD"),
    "broadcast": (lambda x: tf.broadcast_to(tf.reduce_mean(x, 2, keepdims=True), SHAPE), "BROADCAST_TO"),
    "tile": (lambda x: tf.tile(x, (1, 2, 1, 3)), "TILE"),
    "reverse": (lambda x: tf.reverse(x, (1, 2)), "REVERSE_V2"),
    "depth to space": (lambda x: tf.nn.depth_to_space(tf.concat([x, x], 3), 2), "DEPTH_TO_SPACE"),
    "space to depth": (lambda x: tf.nn.space_to_depth(x[:, :8, :10], 2), "SPACE_TO_DEPTH"),
    "l2 normalize": (lambda x: tf.nn.l2_normalize(x, 3), "L2_NORMALIZATION"),
    "gather channels": (lambda x: tf.gather(x, (5, 0, 2), axis=3), "GATHER"),
    "bounded relu": (lambda x: tf.maximum(tf.minimum(x, 1.0), -1.0), "RELU_N1_TO_1"),
    "power": (lambda x: tf.pow(tf.abs(x), 1.5), "POW"),
    "logarithm": (lambda x: tf.math.log(tf.abs(x) + 0.1), "LOG"),
    "negative": (lambda x: -tf.tanh(x), "NEG"),
    "square": (lambda x: tf.square(x), "SQUARE"),
    "sine": (lambda x: tf.sin(x), "SIN"),
    "cosine": (lambda x: tf.cos(x), "COS"),
    "floor": (lambda x: tf.floor(x), "FLOOR"),
    "ceiling": (lambda x: tf.math.ceil(x), "CEIL"),
    "sign": (lambda x: tf.sign(x), "SIGN"),
    "sum of three": (lambda x: tf.add_n([x, tf.tanh(x), tf.sin(x)]), "ADD_N"),
    "expand": (lambda x: tf.expand_dims(x, 2), "RESHAPE"),
    "split unevenly": (lambda x: tf.concat([tf.tanh(a) for a in tf.split(x, [1, 2, 3], 3)][::-1], 3), "SPLIT_V"),
    "samples as rows": (
        lambda x: tf.reshape(tf.matmul(tf.reshape(x, (99, 6)), constant(6, 5)), (1, 9, 55)),
        "FULLY_CONNECTED",
    ),
    "batch moved and back": (
        lambda x: tf.transpose(tf.nn.softmax(tf.transpose(x, (3, 0, 1, 2))), (1, 2, 3, 0)),
        "TRANSPOSE",
    ),
    "batch dropped": (lambda x: tf.reduce_sum(x[0], 0)[None] * constant(11, 6), "SUM"),
    "resize bilinear": (lambda x: tf.image.resize(x, (18, 15)), "RESIZE_BILINEAR"),
    "resize nearest": (lambda x: tf.image.resize(x, (18, 22), method="nearest"), "RESIZE_NEAREST_NEIGHBOR"),
}


@pytest.mark.parametrize("case", CASES)
def test_entry_computes_what_the_interpreter_computes(case):
    function, name = CASES[case]
    content = convert(function)
    assert name in {operation.name for operation in read_graph(content).operations}
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    (expected,) = LiteRTRunner(content).run(x)
    found = dw.lift(content).predict(x, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_prelu_has_a_trained_slope_per_channel():
    inputs = keras.Input(SHAPE[1:])
    model = keras.Model(inputs, keras.layers.PReLU(shared_axes=[1, 2])(inputs))
    model.layers[1].alpha.assign(np.random.default_rng(0).normal(size=(1, 1, 6)))
    x = samples(model, 8)
    lifted = dw.lift(model)
    assert "PRELU" in {operation.name for operation in read_graph(lifted.float_file).operations}
    np.testing.assert_allclose(outputs(lifted, x)[0], outputs(model, x)[0], rtol=1e-5, atol=1e-6)


def test_embedding_is_a_look_up():
    table = constant(20, 7)
    content = convert(lambda ids: tf.gather(table, ids), (1, 5), dtype=tf.int32)
    ids = np.array([[3, 0, 19, 3, 7]], np.int32)
    np.testing.assert_array_equal(dw.lift(content).predict(ids, verbose=0), table.numpy()[ids])


@pytest.mark.parametrize(("on", "off"), [(1.0, 0.0), (0.5, -2.0)])
def test_one_hot(on, off):
    content = convert(lambda ids: tf.one_hot(ids, 6, on, off), (1, 5), dtype=tf.int32)
    ids = np.array([[3, 0, 5, 3, 1]], np.int32)
    lifted = dw.lift(content)
    assert not lifted.notes
    np.testing.assert_array_equal(lifted.predict(ids, verbose=0), np.where(np.eye(6)[ids] == 1, on, off))


def test_every_entry_has_a_case():
    tested = {name for _, name in CASES.values()} | {"GATHER", "ONE_HOT", "PRELU"}
    untested = set(operators.OPERATORS) - tested
    # Relatives of tested ones, through the same function, which the converter does not emit.
    assert untested <= {"SQUEEZE", "EXPAND_DIMS", "SELECT_V2", "CAST", "GREATER", "RELU_0_TO_1", "LOGICAL_AND", "LOGICAL_NOT",
                        "EMBEDDING_LOOKUP"}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: tf.tanh(tf.raw_ops.MatrixDiag(diagonal=tf.nn.relu(x))), "MATRIX_DIAG"),
        (lambda x: tf.cumsum(tf.nn.relu(x), axis=1, reverse=True) + constant(6), "CUMSUM"),
        (lambda x: tf.math.top_k(x, 3)[0] * 2.0, "TOPK_V2"),
    ],
)
def test_an_operator_without_an_entry_runs_as_a_frozen_island(function, name, tmp_path):
    content = convert(function)
    lifted = dw.lift(content)
    assert len(lifted.notes) == 1
    assert name in lifted.notes[0]
    x = np.random.default_rng(1).normal(size=(3, *SHAPE[1:])).astype(np.float32)
    runner = LiteRTRunner(content)
    expected = np.concatenate([runner.run(x[i : i + 1])[0] for i in range(3)])
    np.testing.assert_allclose(lifted.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    lifted.save(tmp_path / "island.keras")
    loaded = dw.load(tmp_path / "island.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), lifted.predict(x, verbose=0))
    if lifted.trainable_weights:
        lifted.compile("sgd", "mse")
        lifted.fit(x, expected, verbose=0)


@pytest.mark.parametrize("name", ZOO)
def test_a_lifted_model_computes_what_the_model_computes(name):
    model = settle(ZOO[name]())
    try:
        lifted = dw.lift(model)
    except dw.UnsupportedModelError as error:
        pytest.skip(str(error))
    inputs = samples(model, 8)
    for found, expected in zip(outputs(lifted, inputs), outputs(model, inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_lifted_model_writes_its_own_file_back_bit_for_bit():
    from dwindle.exporting import float_file

    content = float_file(settle(ZOO["depthwise"]()))
    assert dw.lift(content).to_float_file() == content


def test_a_lifted_model_trains_and_its_file_gets_the_weights():
    lifted = dw.lift(settle(ZOO["residual"]()))
    x = samples(lifted, 16)[0]
    lifted.compile("adam", "mse")
    lifted.fit(x, np.zeros((16, 4)), epochs=2, verbose=0)
    found = LiteRTRunner(lifted.to_float_file()).predict([x])[0]
    np.testing.assert_allclose(found, lifted.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


def test_saving_and_loading_a_lifted_model(tmp_path):
    lifted = dw.lift(settle(ZOO["conv_bn_relu"]()))
    lifted.save(tmp_path / "lifted.keras")
    loaded = dw.load(tmp_path / "lifted.keras")
    assert isinstance(loaded, keras.Model)
    assert loaded.to_float_file() == lifted.to_float_file()


@pytest.mark.parametrize("half", [False, True])
def test_a_state_that_a_file_keeps_is_an_input_and_an_output(half):
    """Step by step against LiteRT, which keeps the state itself."""

    class Listener(tf.Module):
        def __init__(self):
            self.past = tf.Variable(tf.fill((1, 4, 6), 0.25))
            self.kernel = constant(5, 6, 3)

        @tf.function(input_signature=[tf.TensorSpec((1, 1, 6))])
        def listen(self, frame):
            window = tf.concat([self.past.read_value(), frame], 1)
            self.past.assign(window[:, 1:])
            return tf.nn.conv1d(window, self.kernel, 1, "VALID")

    module = Listener()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.listen.get_concrete_function()], module)
    converter.experimental_enable_resource_variables = True
    if half:  # operators without inputs in a file that has to be widened
        converter.optimizations, converter.target_spec.supported_types = [tf.lite.Optimize.DEFAULT], [tf.float16]
    content = bytes(converter.convert())
    model = dw.lift(content)
    assert [tuple(tensor.shape) for tensor in model.inputs] == [(None, 1, 6), (None, 4, 6)]
    assert any("begins with 0.25" in note and "given back from output" in note for note in model.notes)
    streaming = Interpreter(model_content=content)
    streaming.allocate_tensors()
    given, made = streaming.get_input_details()[0]["index"], streaming.get_output_details()[0]["index"]
    state = np.full((1, 4, 6), 0.25, np.float32)
    for frame in np.random.default_rng(0).normal(size=(12, 1, 1, 6)).astype(np.float32):
        streaming.set_tensor(given, frame)
        streaming.invoke()
        score, state = (keras.ops.convert_to_numpy(value) for value in keras.tree.flatten(model([frame, state])))
        np.testing.assert_allclose(score, streaming.get_tensor(made), rtol=1e-4, atol=1e-5)
    written = LiteRTRunner(model.to_float_file())
    found = written.predict([frame, np.full((1, 4, 6), 0.5, np.float32)])
    expected = keras.tree.flatten(model([frame, np.full((1, 4, 6), 0.5, np.float32)]))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, keras.ops.convert_to_numpy(other), rtol=1e-4, atol=1e-5)


def test_a_state_that_is_no_variable_is_refused():
    kept = Operation(index=0, name="SVDF", inputs=(), outputs=(), options={})
    graph = Graph(tensors=(), operations=(kept,), inputs=(), outputs=(), input_names=(), output_names=())
    with pytest.raises(dw.UnsupportedModelError, match=r"keeps a state between runs \(SVDF\), which can't be made"):
        refuse_states(graph)


@pytest.mark.parametrize(("function", "at_zero"), [
    (keras.ops.log, -np.inf), (keras.ops.sqrt, 0.0),
])  # fmt: skip
def test_rounding_to_zero_leaves_gradients_finite(function, at_zero):
    """What is added before the function rounds away where the grid is coarse: there its gradient has no value."""
    x = keras.Input((4,))
    hidden = keras.layers.Dense(4, use_bias=False, name="hidden")(x)
    bounded = keras.ops.clip(function(keras.ops.relu(hidden) + 1e-6), -3.0, 3.0)
    model = keras.Model(x, keras.layers.Dense(1)(bounded))
    samples = np.random.default_rng(0).random((64, 4), dtype=np.float32)
    model.get_layer("hidden").kernel.assign(5 * np.eye(4, dtype=np.float32) - 1)
    twin = dw.quantize(model, "int8", data=samples)
    probe = keras.Model(twin.inputs, [op.output for op in twin.operations if type(op).__name__ == "Where"])
    assert any((np.asarray(value) == at_zero).any() for value in keras.tree.flatten(probe([samples])))
    twin.compile(keras.optimizers.SGD(1e-3), "mse")
    twin.fit(samples, np.ones((64, 1)), epochs=2, verbose=0)
    assert all(np.isfinite(np.asarray(value)).all() for value in twin.get_weights())


def test_a_reciprocal_root_has_no_gradient_at_zero():
    from dwindle.lifting.operators.arithmetic import _ELEMENTWISE

    x = tf.constant([0.0, 4.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = _ELEMENTWISE["RSQRT"](x)
    np.testing.assert_array_equal(found, [np.inf, 0.5])
    np.testing.assert_allclose(tape.gradient(found, x), [0.0, -0.5 * 4.0**-1.5])
