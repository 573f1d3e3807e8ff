"""What the simulation computes, the file computes: every model of the zoo in every scheme, and the parts it is made of."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.lifting.constants import integer_sum
from dwindle.lifting.flatbuffer import read_graph
from dwindle.lifting.grids import Grid
from dwindle.lifting.kernel_tables import ByTable, KernelTables
from dwindle.measuring.litert import LiteRTRunner
from dwindle.quantization import SCHEMES, calibrate, resolve_scheme, simulate, write_quantized
from dwindle.quantization.writing import read_grids
from dwindle.weights import quotient

STATIC = ("int8", "int4", "pow2-8")
OTHERS = tuple(name for name, scheme in SCHEMES.items() if not scheme.is_float and name not in STATIC)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", STATIC)
@pytest.mark.parametrize("name", ZOO)
def test_a_static_file_is_within_one_quantum_and_of_the_same_class(name, scheme, tmp_path):
    model = settle(ZOO[name]())
    found = dw.export(model, tmp_path / "m.tflite", scheme=scheme, data=samples(model, 256)).verification
    assert found.samples == 256
    if found.quanta is None:  # its outputs stay float
        assert found.passed
    else:
        assert found.quanta <= 1.0001, found  # a quantum, and what float32 errs by
        if found.same_class is not None:
            assert found.same_class + found.ties == found.samples, found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", OTHERS)
@pytest.mark.parametrize("name", ZOO)
def test_the_other_schemes_are_within_their_stated_bounds(name, scheme, tmp_path):
    model = settle(ZOO[name]())
    found = dw.export(model, tmp_path / "m.tflite", scheme=scheme, data=samples(model, 256)).verification
    assert found.passed, found


def test_a_convolution_sums_integers_exactly_where_float_sums_would_not(tmp_path):
    layers = keras.layers
    model = settle(keras.Sequential([keras.Input((6, 6, 64)), layers.Conv2D(64, 3, activation="relu6"),
                                     layers.DepthwiseConv2D(3), layers.Flatten(), layers.Dense(50)]))  # fmt: skip
    x = samples(model, 300)[0]
    found = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=x).verification
    assert found.quanta == 0.0, found
    assert found.within == 1.0


def test_a_sum_is_the_kernels_own_fixed_point_sum():
    generator = np.random.default_rng(0)
    for _ in range(50):
        scales = np.exp(generator.uniform(-4, 1, 3)).astype(np.float32)
        a, b = generator.integers(-255, 256, (2, 1000))
        ratios = scales[:2] / scales[2]
        shift = 20 - int(np.floor(np.log2(ratios.max())))
        factors = np.rint(ratios.astype(np.float64) * 2.0**shift).astype(np.int64)
        expected = (a * factors[0] - b * factors[1] + (1 << (shift - 1))) >> shift
        got = integer_sum(
            (a.astype(np.float32), b.astype(np.float32)), scales[:2].tolist(), float(scales[2]), signs=(1, -1)
        )
        np.testing.assert_array_equal(np.rint(np.asarray(got) / scales[2]), expected)


@pytest.mark.parametrize("centred", [False, True])  # with a zero point of 0 XNNPACK runs it, else LiteRT's own kernel
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_two_tensors_is_the_kernels_own(centred, transposed, tmp_path):
    generator = np.random.default_rng(0)
    a = generator.normal(0.3, 1, (200, 8, 32)).astype(np.float32)
    b = generator.uniform(-1, 3, (200, *((16, 32) if transposed else (32, 16)))).astype(np.float32)
    b = np.concatenate([b, -b])[:200] - 1 if centred else b
    if centred:
        b[:2] = [np.full_like(b[0], b.min()), np.full_like(b[0], -b.min())]
    inputs = [keras.Input(x.shape[1:]) for x in (a, b)]
    right = keras.ops.swapaxes(inputs[1], 1, 2) if transposed else inputs[1]
    model = keras.Model(inputs, keras.ops.matmul(inputs[0], right))
    found = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=[a, b])
    grid = read_grids(float_file(model), found.path.read_bytes()).operands[0, 1]
    assert (grid.zero_point == 0) == centred
    assert found.verification.quanta == 0.0, found.verification


@pytest.mark.parametrize(("before", "after"), [((7, 5), (16, 9)), ((8, 8), (5, 5)), ((4, 4), (8, 8))])
def test_bilinear_resizing_is_the_kernels_own(before, after, tmp_path):
    x = np.random.default_rng(0).normal(0.3, 1, (100, *before, 3)).astype(np.float32)
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, keras.layers.Resizing(*after)(inputs))
    found = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=x).verification
    assert found.quanta == 0.0, found


@pytest.mark.parametrize(("shape", "axes"), [((7, 7, 96), (1, 2)), ((11, 13, 96), (1, 2)), ((8, 8, 96), 3)])
def test_means_are_the_kernels_own_where_a_half_is_near(shape, axes):
    generator = np.random.default_rng(0)
    x = generator.gamma(2, 1.5, (500, *shape)).astype(np.float32) - 0.28
    inputs = keras.Input(shape)
    content = float_file(keras.Model(inputs, keras.ops.mean(inputs, axis=axes)))
    scheme = resolve_scheme("int8")
    ranges = calibrate(content, [x])
    written = write_quantized(content, scheme, ranges)
    got = simulate(content, scheme, ranges, name="m").predict(x, verbose=0)
    np.testing.assert_array_equal(got, LiteRTRunner(written).predict([x])[0])


def test_a_transposed_convolution_sums_integers(tmp_path):
    model = settle(ZOO["transposed"]())
    found = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=samples(model, 256)).verification
    assert found.quanta == 0.0, found


@pytest.mark.parametrize("name", ["attention", "residual", "gru"])
def test_every_scale_of_a_power_of_two_file_is_one(name, tmp_path):
    model = settle(ZOO[name]())
    file = dw.export(model, tmp_path / "m.tflite", scheme="pow2-8", data=samples(model, 64))
    details = Interpreter(str(file.path)).get_tensor_details()
    scales = np.concatenate([tensor["quantization_parameters"]["scales"] for tensor in details])
    assert len(scales) > 5
    np.testing.assert_array_equal(np.log2(scales) % 1, 0)
    assert file.verification.quanta == 0.0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_quotient_is_the_correctly_rounded_one_in_a_compiled_graph_too(compiled):
    import tensorflow as tf

    x = np.random.default_rng(0).random(10_000).astype(np.float32)
    divide = tf.function(lambda v: quotient(v, 127)) if compiled else lambda v: quotient(v, 127)
    np.testing.assert_array_equal(np.asarray(divide(tf.constant(x))), x / np.float32(127))


def test_a_table_is_what_the_kernel_gives(tmp_path):
    inputs = keras.Input((300,))
    model = keras.Model(inputs, keras.layers.Activation("hard_swish")(inputs))
    x = np.random.default_rng(0).normal(0, 3, (50, 300)).astype(np.float32)
    file = dw.export(model, tmp_path / "m.tflite", scheme="int8", data=x)
    assert file.verification.quanta == 0.0
    graph = read_graph(dw.export(model, tmp_path / "f.tflite").path.read_bytes())
    tables = KernelTables((tmp_path / "f.tflite").read_bytes())
    grid = Grid(scale=0.05, zero_point=3, bits=8)
    table = tables.table(graph.operations[0], [grid], grid)
    values = (np.arange(-128, 128) - 3) * 0.05
    expected = values * np.clip(values + 3, 0, 6) / 6
    assert np.abs((table - 3.0) * 0.05 - np.clip(expected, values[0], values[-1])).max() <= 0.05  # a quantum
    layer = ByTable.of(table, [grid], grid)
    assert layer.get_config() == ByTable.from_config(layer.get_config()).get_config()
    result = np.zeros((1, 256), np.float32)
    np.testing.assert_allclose(layer([values[None], result], training=False)[0], (table - 3.0) * 0.05, atol=1e-6)
    np.testing.assert_array_equal(layer([values[None], result], training=True), result)


def test_layers_named_as_operations_are_lifted():
    inputs = keras.Input((4, 6))
    x = keras.layers.Reshape((24,), name="reshape")(inputs)
    x = keras.layers.Dense(24, name="multiply")(x)
    x = keras.layers.Activation("hard_swish", name="add")(x)
    model = keras.Model(inputs, keras.layers.Reshape((2, 12), name="reshape_1")(x))
    for _ in range(2):
        assert dw.lift(model).output_shape == (None, 2, 12)
