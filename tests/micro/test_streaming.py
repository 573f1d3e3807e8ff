"""Models with states, frame by frame, against the Keras model of the whole sequence."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from dwindle.errors import ConfigError, DataError
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring.litert import LiteRTRunner, dequantize, quiet_stderr
from dwindle.micro import export_micro
from dwindle.micro.running import run_micro
from dwindle.micro.streaming import quantized_frames, resolve_states

layers, ops = keras.layers, keras.ops


def whole_model() -> keras.Model:
    x = keras.Input((None, 28))
    y = layers.Conv1D(24, 5, padding="causal", activation="relu")(x)
    y = layers.GRU(24, return_sequences=True)(y)
    return keras.Model(x, layers.Dense(10, activation="softmax")(y), name="whole")


def step_model(whole: keras.Model) -> keras.Model:
    """The same weights, for one frame: the convolution's last four frames and the cell's memory come in and go out."""
    frame, past, memory = (
        keras.Input((28,), name="frame"), keras.Input((4, 28), name="past"), keras.Input((24,), name="memory")
    )  # fmt: skip
    window = ops.concatenate([past, ops.expand_dims(frame, 1)], axis=1)
    y = ops.squeeze(layers.Conv1D(24, 5, activation="relu", name="convolution")(window), 1)
    y, state = layers.GRUCell(24, name="cell")(y, [memory])
    score = layers.Dense(10, activation="softmax", name="score")(y)
    model = keras.Model([frame, past, memory], [score, window[:, 1:], state[0]], name="step")
    model.set_weights(whole.get_weights())
    return model


def file_with_variables() -> tuple[bytes, object]:
    """A convolution over the last five frames, which keeps four of them in a variable."""
    import tensorflow as tf

    class Listener(tf.Module):
        def __init__(self):
            self.past = tf.Variable(tf.zeros((1, 4, 28)))
            self.kernel = tf.constant(np.random.default_rng(1).normal(size=(5, 28, 3)).astype(np.float32))

        @tf.function(input_signature=[tf.TensorSpec((1, 1, 28))])
        def listen(self, frame):
            window = tf.concat([self.past.read_value(), frame], 1)
            self.past.assign(window[:, 1:])
            return tf.nn.conv1d(window, self.kernel, 1, "VALID")

    module = Listener()
    with quiet_stderr():
        function = module.listen.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
        converter.experimental_enable_resource_variables = True
        return converter.convert(), module


def stream(made, x: np.ndarray, states: dict[int, int]) -> np.ndarray:
    content = made.file.read_bytes()
    runner = LiteRTRunner(content)
    frames = quantized_frames([x], runner.inputs[:1])
    return dequantize(run_micro(content, frames, states=states).outputs[0], runner.outputs[0])


def test_float_frame_by_frame_is_the_whole_sequence(rows, tmp_path):
    whole, x = rows
    made = export_micro(
        step_model(whole), tmp_path / "out", data=x[:20], scheme="float32", states={"past": 1, "memory": 2}
    )
    assert made.agreements[0].samples == 20 * 28
    np.testing.assert_allclose(stream(made, x[:20], {1: 1, 2: 2}), whole.predict(x[:20], verbose=0), atol=1e-5)


def test_integers_frame_by_frame_predict_what_the_whole_sequence_does(rows, tmp_path):
    whole, x = rows
    made = export_micro(step_model(whole), tmp_path / "out", data=x[:64], states={1: 1, 2: 2}, verify_samples=16)
    assert made.agreements[0].within >= 0.99
    graph = read_graph(made.file.read_bytes())
    for number in (1, 2):
        given, result = graph.inputs[number], graph.outputs[number]
        assert given.dtype == result.dtype == np.int8
        assert (given.scale == result.scale).all()
        assert (given.zero_point == result.zero_point).all()
    found, expected = stream(made, x[100:200], {1: 1, 2: 2}), whole.predict(x[100:200], verbose=0)
    assert (found[:, -1].argmax(-1) == expected[:, -1].argmax(-1)).mean() >= 0.95
    assert np.abs(found - expected).mean() < 0.01
    main = (made.folder / "main.cc").read_text()
    assert "memcpy(state1, interpreter->output(1)->data.raw, kInput1Bytes);" in main
    assert "memcpy(interpreter->input(2)->data.raw, state2, kInput2Bytes);" in main


def test_a_file_with_variables_keeps_them_from_call_to_call(digits, tmp_path):
    content, module = file_with_variables()
    (tmp_path / "listener.tflite").write_bytes(content)
    frames = digits[1][0][0, :, None, :, 0]
    made = export_micro(tmp_path / "listener.tflite", tmp_path / "out", data=frames)
    assert {"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"} <= set(made.operators)
    expected = [module.listen(frame[None]).numpy()[0] for frame in frames]
    found = run_micro(made.file.read_bytes(), [frames]).outputs[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    main = (made.folder / "main.cc").read_text()
    assert "MicroResourceVariables::Create(allocator, 1)" in main


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"memry": 2}, r"input 'memry', and the model has `frame`, `past`, `memory`; did you mean `memory`\?"),
        ({1: 2}, r"input `1` has shape \(1, 4, 28\) of float32 and output `2` \(1, 24\)"),
        ({2: 9}, "output 9"),
    ],
)
def test_states_that_do_not_fit_are_named(rows, states, message):
    with pytest.raises(ConfigError, match=message):
        resolve_states(states, float_file(step_model(rows[0])))


def test_sequences_are_asked_for(rows, tmp_path):
    model = step_model(rows[0])
    with pytest.raises(DataError, match="needs sequences to run, and `data` is None"):
        export_micro(model, tmp_path / "out", states={1: 1, 2: 2})
    with pytest.raises(DataError, match="shape"):
        export_micro(model, tmp_path / "out", data=rows[1][0], states={1: 1, 2: 2})
    assert not list(tmp_path.iterdir())
