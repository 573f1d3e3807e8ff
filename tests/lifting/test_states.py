"""Variables of streaming files as inputs and outputs, against what TensorFlow computes step by step."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

import dwindle as dw
from dwindle.lifting.flatbuffer import operator_name, parse, read_graph, serialize
from dwindle.lifting.states import with_states_outside
from dwindle.measuring.litert import LiteRTRunner, quiet_stderr


def add_and_read(variable, x):
    variable.assign_add(x)
    return variable.read_value()


def write_and_read(variable, x):
    variable.assign(x)
    return variable.read_value()


def read_and_write(variable, x):
    before = variable.read_value()
    variable.assign(x)
    return before


def add_and_read_twice(variable, x):
    variable.assign_add(x)
    return variable.read_value(), variable.read_value() * 2


def streaming(step):
    """Return the file of a step with a variable of three numbers, and the module."""

    class Listener(tf.Module):
        def __init__(self):
            self.variable = tf.Variable([[1.0, 2.0, 3.0]])

        @tf.function(input_signature=[tf.TensorSpec((1, 3), name="x")])
        def listen(self, x):
            return step(self.variable, x)

    module = Listener()
    with quiet_stderr():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([module.listen.get_concrete_function()], module)
        converter.experimental_enable_resource_variables = True
        return converter.convert(), module


@pytest.fixture(scope="module")
def content():
    return streaming(add_and_read)[0]


@pytest.mark.parametrize(
    ("step", "made"),
    [
        (add_and_read, "output_0"),
        (write_and_read, None),
        (read_and_write, "Variable_next"),
        (add_and_read_twice, "output_0"),
    ],
)
def test_steps_carry_their_states_as_the_module_does(step, made):
    content, module = streaming(step)
    outside, states = with_states_outside(content)
    assert [state.made for state in states] == ([made] if made else [])
    names = read_graph(outside).output_names
    assert len(set(names)) == len(names)
    results = sorted(name for name in names if name.startswith("output"))
    lifted, runner = dw.lift(content), LiteRTRunner(outside)
    held = [state.start for state in states]
    generator = np.random.default_rng(0)
    for _ in range(3):
        x = generator.normal(size=(1, 3)).astype(np.float32)
        expected = dict(zip(results, tf.nest.flatten(module.listen(x)), strict=True))
        inputs = [x, *held]
        for found in (runner.run(*inputs), tf.nest.flatten(lifted(inputs[0] if len(inputs) == 1 else inputs))):
            by_name = dict(zip(names, found, strict=True))
            for name, value in expected.items():
                np.testing.assert_allclose(by_name[name], value, rtol=1e-6)
            kept = [np.asarray(by_name[state.made]) for state in states]
        held = kept


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_a_state_of_integers_begins_with_the_floats_that_they_stand_for(dtype, content):
    model = parse(content)
    kind = getattr(schema.TensorType, np.dtype(dtype).name.upper())
    write = next(op for op in model.subgraphs[1].operators if operator_name(model, op) == "ASSIGN_VARIABLE")
    start = model.subgraphs[1].tensors[write.inputs[1]]
    start.type, model.buffers[start.buffer].data = kind, np.array([-4, 0, 100], dtype).view(np.uint8)
    read = next(op for op in model.subgraphs[0].operators if operator_name(model, op) == "READ_VARIABLE")
    tensor = model.subgraphs[0].tensors[read.outputs[0]]
    tensor.type, tensor.quantization = kind, schema.QuantizationParametersT()
    tensor.quantization.scale, tensor.quantization.zeroPoint = np.float32([0.5]), np.int64([2])
    _, (state,) = with_states_outside(serialize(model))
    np.testing.assert_array_equal(state.start, [[-3, -1, 49]])
    assert "begins with values from -3 to 49" in str(state)


def damage(model, how):
    named = {operator_name(model, op): op for op in model.subgraphs[0].operators}
    if how == "no options":
        named["VAR_HANDLE"].builtinOptions = None
    elif how == "no subgraph":
        named["CALL_ONCE"].builtinOptions.initSubgraphIndex = 9
    elif how == "below subgraphs":
        named["CALL_ONCE"].builtinOptions.initSubgraphIndex = -1
    elif how == "no inputs":
        named["ASSIGN_VARIABLE"].inputs = None
    elif how == "cut buffer":
        writes = next(op for op in model.subgraphs[1].operators if operator_name(model, op) == "ASSIGN_VARIABLE")
        buffer = model.buffers[model.subgraphs[1].tensors[writes.inputs[1]].buffer]
        buffer.data = np.asarray(buffer.data)[:-4]
    else:
        model.signatureDefs[0].outputs[0].tensorIndex = 100


@pytest.mark.parametrize(
    "how", ["no options", "no subgraph", "below subgraphs", "no inputs", "cut buffer", "no such tensor"]
)
def test_damage_is_said_in_a_sentence(how, content):
    model = parse(content)
    damage(model, how)
    with pytest.raises(dw.UnsupportedModelError, match=r"the LiteRT file is (truncated or )?damaged"):
        dw.lift(serialize(model))
