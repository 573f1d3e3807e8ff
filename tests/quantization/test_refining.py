"""After-training methods against NumPy references, brute force, and what the written file holds."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.exporting.convert import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.measuring.litert import LiteRTRunner
from dwindle.quantization.assignment import assign, display_names, fitted
from dwindle.quantization.calibration import activations
from dwindle.quantization.equalizing import equalize, with_own_biases
from dwindle.quantization.refining import (
    LARGEST_KERNEL,
    ROUNDINGS,
    _patches,
    adaround,
    as_rows,
    clipped_bounds,
    correct_biases,
    from_rows,
    gptq,
    input_statistics,
    not_refined,
    round_weights,
    weighted,
)
from dwindle.quantization.schemes import SCHEMES, Scheme, resolve_scheme
from dwindle.quantization.writing import write_quantized

L = keras.layers
KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def moment_of(inputs, samples=400, seed=0, rank=None):
    """Return the second moment of correlated inputs."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(rank or inputs, inputs))
    x = np.maximum(generator.normal(size=(samples, rank or inputs)) @ mixing + 0.3, 0)
    return x.T @ x / samples


def kernel_of(outputs, inputs, bits=4, seed=1):
    """Return a kernel and the step of each output."""
    rows = np.random.default_rng(seed).normal(size=(outputs, inputs))
    return rows, np.abs(rows).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)


def error(integers, rows, scale, moment):
    """Return the mean squared error of each output, in steps."""
    apart = integers - rows / scale
    return np.einsum("oi,ij,oj->o", apart, moment, apart)


# ---------------------------------------------------------------- kernels as rows


def models():
    def one(layer, shape):
        inputs = keras.Input(shape)
        return settle(keras.Model(inputs, layer(inputs)))

    return {
        "valid": one(L.Conv2D(5, 3), (7, 8, 3)),
        "same, strides": one(L.Conv2D(4, 3, strides=2, padding="same"), (7, 8, 3)),
        "dilated": one(L.Conv2D(4, 3, dilation_rate=2, padding="same"), (7, 8, 2)),
        "grouped": one(L.Conv2D(6, 3, groups=2, strides=2), (7, 8, 4)),
        "depthwise": one(L.DepthwiseConv2D(3, padding="same"), (6, 7, 4)),
        "depthwise, multiplier": one(L.DepthwiseConv2D((2, 3), depth_multiplier=3, strides=2), (6, 6, 2)),
        "pointwise": one(L.Conv2D(5, 1), (4, 4, 3)),
        "dense": one(L.Dense(5), (6,)),
        "dense on a sequence": one(L.Dense(5), (3, 6)),
    }


@pytest.fixture(scope="module", params=list(models()))
def layer_file(request):
    keras.utils.set_random_seed(0)
    model = models()[request.param]
    return float_file(model), samples(model, 3)


def test_rows_times_patches_is_what_the_interpreter_computes(layer_file):
    content, x = layer_file
    (operation,) = weighted(read_graph(content))
    kernel, bias = operation.inputs[1].value, operation.inputs[2].value
    found = {tensor.name: value for _, value, tensor in activations(content, x)}
    rows = as_rows(operation, kernel)
    patches = _patches(operation, found[operation.inputs[0].name])
    output = np.einsum("goi,gni->ngo", rows, patches).reshape(patches.shape[1], -1) + bias
    expected = found[operation.outputs[0].name]
    np.testing.assert_allclose(output.reshape(expected.shape), expected, atol=1e-4)


def test_from_rows_is_the_inverse_of_as_rows(layer_file):
    (operation,) = weighted(read_graph(layer_file[0]))
    kernel = operation.inputs[1].value
    numbered = np.arange(kernel.size, dtype=np.float32).reshape(kernel.shape)
    rows = as_rows(operation, numbered)
    assert rows.ndim == 3
    np.testing.assert_array_equal(from_rows(operation, rows, kernel.shape), numbered)


def test_statistics_are_means_over_samples_and_positions(layer_file):
    content, x = layer_file
    (operation,) = weighted(read_graph(content))
    given = next(v for _, v, t in activations(content, x) if t.name == operation.inputs[0].name)
    patches = _patches(operation, given)
    found = input_statistics(content, x)[operation.index]
    np.testing.assert_allclose(found.mean, [group.mean(axis=0) for group in patches], atol=1e-5)
    np.testing.assert_allclose(found.moment, [np.mean([np.outer(p, p) for p in g], axis=0) for g in patches], atol=1e-4)
    assert input_statistics(content, x, moments=False)[operation.index].moment is None


def test_statistics_of_many_positions_are_those_of_a_sample(monkeypatch):
    import dwindle.quantization.refining as refining

    model = settle(keras.Sequential([keras.Input((20, 20, 2)), L.Conv2D(3, 3)]))
    content, x = float_file(model), samples(model, 30)
    whole = input_statistics(content, x)[0]
    monkeypatch.setattr(refining, "_ROWS", 1000)
    some = input_statistics(content, x)[0]
    again = input_statistics(content, x)[0]
    np.testing.assert_array_equal(some.moment, again.moment)  # seeded
    assert np.abs(some.mean - whole.mean).max() < 5 / np.sqrt(1000)  # five standard errors of normal inputs
    assert 0 < np.abs(some.moment - whole.moment).max() < 5 * np.sqrt(2 / 1000)


# ---------------------------------------------------------------- GPTQ and AdaRound


def obq_in_order(rows, scale, low, high, moment):
    """Round input by input as optimal brain quantization does, the inverse updated by elimination (GPTQ's equation 3)."""
    hessian = moment + 0.01 * np.diag(moment).mean() * np.eye(len(moment))
    inverse = np.linalg.inv(hessian)
    weight, found = rows.copy(), np.zeros_like(rows)
    for i in range(rows.shape[1]):
        found[:, i] = np.clip(np.rint(weight[:, i] / scale[:, 0]), low, high)
        off = (weight[:, i] - found[:, i] * scale[:, 0]) / inverse[i, i]
        weight -= np.outer(off, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return found


@pytest.mark.parametrize("inputs", [7, 128, 200])
def test_gptq_is_optimal_brain_quantization_in_order(inputs):
    rows, scale = kernel_of(6, inputs)
    moment = moment_of(inputs, samples=600)
    expected = obq_in_order(rows, scale, -8, 7, moment)
    assert (error(expected, rows, scale, moment) <= error(np.rint(rows / scale), rows, scale, moment)).all()
    np.testing.assert_array_equal(gptq(rows, scale, -8, 7, moment), expected)


@pytest.mark.parametrize("method", [gptq, adaround])
@pytest.mark.parametrize(("bits", "cut"), [(4, 1.0), (2, 1.0), (8, 1.0), (4, 0.5)])
def test_the_layers_output_changes_less_than_with_nearest_rounding(method, bits, cut):
    low, high = -(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1
    rows, scale = kernel_of(24, 40, bits)
    scale = scale * cut
    moment = moment_of(40, rank=20)
    found = method(rows, scale, low, high, moment)
    np.testing.assert_array_equal(found, np.rint(found))
    assert low <= found.min() <= found.max() <= high
    nearest = error(np.clip(np.rint(rows / scale), low, high), rows, scale, moment)
    assert (error(found, rows, scale, moment) <= nearest * (1 + 1e-9)).all()
    assert error(found, rows, scale, moment).sum() < (0.9 if cut < 1 else 0.6) * nearest.sum()


def test_adaround_rounds_up_or_down_and_is_close_to_the_best_of_all_ways():
    low, high = -8, 7
    rows, scale = kernel_of(60, 6)
    moment = moment_of(6, rank=4) + 0.01 * np.eye(6)
    found = adaround(rows, scale, low, high, moment)
    floor = np.floor(rows / scale)
    assert np.isin(found - floor, [0, 1]).all()
    ways = np.array(list(itertools.product([0, 1], repeat=6)))
    every = np.stack([error(np.clip(floor + way, low, high), rows, scale, moment) for way in ways])
    best, nearest = every.min(axis=0), error(np.clip(np.rint(rows / scale), low, high), rows, scale, moment)
    chosen = error(found, rows, scale, moment)
    assert (chosen >= best - 1e-12).all()
    # Learning is no search, but it makes up for most of what nearest rounding loses against the best.
    assert (chosen - best).sum() < 0.5 * (nearest - best).sum()
    assert np.isclose(chosen, best).mean() > np.isclose(nearest, best).mean()


@pytest.mark.parametrize("method", [gptq, adaround])
def test_without_correlation_nearest_rounding_is_the_best(method):
    rows, scale = kernel_of(5, 9)
    np.testing.assert_array_equal(method(rows, scale, -8, 7, np.eye(9)), np.clip(np.rint(rows / scale), -8, 7))


@pytest.mark.parametrize("method", [gptq, adaround])
def test_the_inputs_unit_and_inputs_that_are_always_zero_do_not_matter(method):
    rows, scale = kernel_of(12, 20)
    moment = moment_of(20)
    moment[:8] = moment[:, :8] = 0.0  # such as the borders of digits
    found = method(rows, scale, -8, 7, moment)
    np.testing.assert_array_equal(method(rows, scale, -8, 7, moment * 1e-16), found)
    live = method(rows[:, 8:], scale, -8, 7, moment[8:, 8:])
    np.testing.assert_array_equal(found[:, 8:], live)
    np.testing.assert_array_equal(found[:, :8], np.clip(np.rint(rows[:, :8] / scale), -8, 7))
    assert error(found, rows, scale, moment).sum() < 0.8 * error(np.rint(rows / scale), rows, scale, moment).sum()
    np.testing.assert_array_equal(method(rows, scale, -8, 7, np.zeros((20, 20))), np.clip(np.rint(rows / scale), -8, 7))


# ---------------------------------------------------------------- clipping


@pytest.fixture(scope="module")
def cnn(digits):
    """A small network, its weights of very different size, and some digits; a lifted file is exported at once."""
    keras.utils.set_random_seed(0)
    model = settle(
        keras.Sequential(
            [
                keras.Input((28, 28, 1)), L.Conv2D(6, 5, strides=3, activation="relu", name="conv"),
                L.DepthwiseConv2D(3, name="depth"), L.Flatten(), L.Dense(16, activation="relu", name="hidden"),
                L.Dense(10, name="digit"),
            ]
        )
    )  # fmt: skip
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            variable.assign(variable * np.exp(generator.normal(0, 0.7, variable.shape)))
    return float_file(model), [digits[0][0][:150]]


def lifted(content, folder):
    path = folder / "float.tflite"
    path.write_bytes(content)
    return dw.lift(path)


@pytest.mark.parametrize(
    "scheme", [Scheme(weights=4, activations=8), Scheme(weights=4, granularity="tensor"), SCHEMES["int8"],
               Scheme(weights=2, dynamic=True), Scheme(weights=4, power_of_two=True)], ids=lambda scheme: scheme.name,
)  # fmt: skip
def test_clipping_has_the_least_squared_error_of_all_candidates(cnn, scheme):
    graph = read_graph(cnn[0])
    choices = assign(graph, scheme)
    found = clipped_bounds(graph, choices)
    cut = 0
    for operation in weighted(graph):
        kernel, choice = operation.inputs[1].value.astype(np.float64), choices[operation.index]
        low, high = -(2 ** (choice.weights - 1)) + (choice.weights == 8), 2 ** (choice.weights - 1) - 1
        channels = kernel.reshape(1, -1)
        if choice.granularity == "channel":
            last = operation.name == "DEPTHWISE_CONV_2D"
            channels = kernel.reshape(-1, kernel.shape[-1]).T if last else kernel.reshape(len(kernel), -1)

        def loss(channel, bound, low=low, high=high):
            step = bound / high
            return ((np.clip(np.rint(channel / step), low, high) * step - channel) ** 2).sum()

        for channel, bound in zip(channels, np.ravel(found[operation.inputs[1].name]), strict=True):
            whole = np.abs(channel).max()
            tried = [whole * share / 100 for share in range(30, 101)]
            if scheme.power_of_two:
                finest = 2.0 ** np.ceil(np.log2(whole / high)) * high
                tried = [finest, finest / 2, finest / 4]
                assert np.log2(bound / high) % 1 == 0
            losses = [loss(channel, end) for end in tried]
            assert loss(channel, bound) <= min(losses) * (1 + 1e-4)
            cut += bound < 0.999 * max(tried)
    assert cut > 0 or choice.weights == 8


def test_an_empty_channel_is_clipped_to_nothing_and_stays_zero(tmp_path):
    model = settle(keras.Sequential([keras.Input((6,)), L.Dense(4, name="dense")]))
    kernel = model.layers[0].kernel.numpy()
    kernel[:, 1] = 0
    model.layers[0].kernel.assign(kernel)
    x = samples(model, 50)
    for options in ({"clipping": "mse"}, {"rounding": "gptq"}, {"rounding": "adaround"}):
        twin = dw.quantize(model, "int4-dynamic", x, **options)
        _, stored = stored_kernels(dw.export(twin, tmp_path / "m.tflite", data=x).path).popitem()
        assert (stored.value[1] == 0).all()
        assert (stored.value[[0, 2, 3]] != 0).any(axis=1).all()


# ---------------------------------------------------------------- in the file


def stored_kernels(path):
    graph = read_graph(path.read_bytes())
    found = {}
    for operation, name in zip(graph.operations, display_names(graph), strict=True):
        if operation.name in KERNELS:
            found[name] = operation.inputs[1]
    return found


FILES = {
    "int8": (SCHEMES["int8"], {}), "int4": (SCHEMES["int4"], {"clipping": "mse"}),
    "tensor": (Scheme(weights=4, dynamic=True, granularity="tensor"), {}),
    "pow2": (Scheme(weights=4, power_of_two=True, activations=8), {"clipping": "mse"}),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "options"), FILES.values(), ids=list(FILES))
def test_the_file_holds_the_integers_that_the_method_chose(cnn, scheme, options, tmp_path):
    content, x = cnn
    graph = read_graph(content)
    choices = assign(graph, scheme)
    bounds = clipped_bounds(graph, choices) if "clipping" in options else {}
    values, ends = round_weights(content, choices, bounds, input_statistics(content, x), ROUNDINGS["gptq"])
    chosen = {op.inputs[1].name: op for op in weighted(read_graph(values))}
    artefact = dw.export(
        dw.quantize(lifted(content, tmp_path), scheme, x, rounding="gptq", **options), tmp_path / "m.tflite", data=x
    )
    different = 0
    for name, stored in stored_kernels(artefact.path).items():
        operation = chosen[stored.name]
        high = 2 ** (choices[operation.index].weights - 1) - 1
        step = ends[stored.name] / high
        np.testing.assert_allclose(np.ravel(stored.scale), np.ravel(step), rtol=1e-6)
        expected = operation.inputs[1].value / step
        np.testing.assert_allclose(expected, np.rint(expected), atol=1e-3)
        np.testing.assert_array_equal(stored.value, np.rint(expected), err_msg=name)
        original = next(op.inputs[1].value for op in weighted(graph) if op.index == operation.index)
        different += int((np.clip(np.rint(original / step), -high - 1, high) != stored.value).sum())
    assert different > 0


def mean_error(content, file, x):
    """Return the mean squared difference of a file's outputs, as a share of their mean square."""
    expected, found = (LiteRTRunner(c).predict(x)[0] for c in (content, file))
    return float(np.mean((expected - found) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("method", ["adaround", "gptq"])
def test_outputs_on_other_samples_are_nearer_than_with_nearest_rounding(cnn, digits, method):
    content, x = cnn
    others = [digits[1][0][:200]]
    scheme = resolve_scheme("int4-dynamic")
    choices = assign(read_graph(content), scheme)
    values, ends = round_weights(content, choices, {}, input_statistics(content, x), ROUNDINGS[method])
    nearest = mean_error(content, write_quantized(content, scheme, None), others)
    assert mean_error(content, write_quantized(values, scheme, None, weight_bounds=ends), others) < 0.7 * nearest


def test_a_kernel_that_is_used_twice_is_rounded_for_both_uses():
    model = settle(ZOO["shared_layer"]())
    content, x = float_file(model), samples(model, 200)
    graph = read_graph(content)
    first, second = weighted(graph)[:2]
    assert first.inputs[1].index == second.inputs[1].index
    statistics = input_statistics(content, x)
    both = (statistics[0].moment[0] + statistics[1].moment[0]) / 2
    choices = assign(graph, resolve_scheme("int4-dynamic"))
    values, ends = round_weights(content, choices, {}, statistics, gptq)
    kernel = first.inputs[1].value
    step = np.abs(kernel).max(axis=1, keepdims=True) / np.float32(7)
    np.testing.assert_array_equal(np.ravel(ends[first.inputs[1].name]), np.abs(kernel).max(axis=1))
    expected = gptq(kernel, step, -8, 7, both)
    np.testing.assert_allclose(weighted(read_graph(values))[0].inputs[1].value, expected * step, rtol=1e-6)
    assert (expected != gptq(kernel, step, -8, 7, statistics[0].moment[0])).any()


def test_what_is_not_refined_is_said(tmp_path):
    inputs = keras.Input((8, 8, 16))
    x = L.Conv2DTranspose(4, 3, strides=2, padding="same", name="up")(inputs)
    x = L.Dense(4, name="wide")(L.Flatten()(L.Conv2D(16, 1, name="mix")(x)))
    model = settle(keras.Model(inputs, x))
    content = float_file(model)
    graph = read_graph(content)
    width = 16 * 16 * 16
    assert width > LARGEST_KERNEL
    choices = assign(graph, resolve_scheme("int4-dynamic"))
    found = not_refined(graph, choices, rounding="gptq", clipping="none")
    assert found == [
        "`up` is without gptq: it is a TRANSPOSE_CONV",
        f"`wide` is without gptq: it has {width:,} inputs an output, more than 2,048",
    ]
    assert not_refined(graph, choices, rounding="nearest", clipping="mse") == []
    blocks = assign(graph, Scheme(weights=4, dynamic=True, granularity=32))
    assert "`wide` is without gptq and mse: it has blocks of 32 inputs" in not_refined(
        graph, blocks, rounding="gptq", clipping="mse"
    )
    small = settle(keras.Sequential([keras.Input((32,)), L.Dense(4, name="dense")]))
    twin = dw.quantize(small, Scheme(weights=4, dynamic=True, granularity=32), samples(small, 50), rounding="gptq")
    assert twin.notes == ("`dense` is without gptq: it has blocks of 32 inputs",)


# ---------------------------------------------------------------- bias correction


def only(graph, number, scheme):
    return [fitted(scheme, op) if op.index == number else SCHEMES["float32"] for op in graph.operations]


def means(file, x):
    """Return the mean of each channel of every activation, by its name."""
    values: dict[str, list[np.ndarray]] = {}
    for _, value, tensor in activations(file, x):
        values.setdefault(tensor.name, []).append(value)
    # Weights that the delegate reads as integers leave their float tensors unwritten: any bits, not looked at.
    with np.errstate(all="ignore"):
        return {name: np.concatenate(v).reshape(-1, v[0].shape[-1]).mean(axis=0) for name, v in values.items()}


def linear(*, bias):
    """Return convolutions and dense layers without activation functions; all biases are zero, or there are none."""
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, use_bias=bias, name="a")(inputs)
    x = L.DepthwiseConv2D(3, use_bias=bias, name="b")(x)
    x = L.Conv2D(4, 3, groups=2, use_bias=bias, name="c")(x)
    x = L.Dense(4, use_bias=bias, name="e")(L.Dense(4, use_bias=bias, name="d")(L.Flatten()(x)))
    return keras.Model(inputs, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_bias_correction_restores_the_mean_of_every_operators_output(bias, bits):
    content = float_file(linear(bias=bias))
    x = [np.abs(samples(linear(bias=bias), 100)[0])]
    graph, scheme = read_graph(content), Scheme(weights=bits)
    statistics = input_statistics(content, x, moments=False)
    expected = means(content, x)
    for operation in weighted(graph):
        choices, name = only(graph, operation.index, scheme), operation.outputs[0].name
        plain = write_quantized(content, scheme, None, choices=choices)
        corrected = correct_biases(content, content, choices, {}, statistics)
        written = write_quantized(corrected, scheme, None, choices=choices)
        before = np.abs(means(plain, x)[name] - expected[name]).max()
        after = np.abs(means(written, x)[name] - expected[name]).max()
        assert after < 0.01 * before
        for other in weighted(read_graph(corrected)):
            if other.index != operation.index and len(other.inputs) > 2:
                assert not other.inputs[2].value.any()  # the converter merges zeros; the others keep theirs


def test_bias_correction_after_rounding_takes_up_what_the_file_really_holds(cnn):
    content, x = cnn
    graph, scheme = read_graph(content), Scheme(weights=4)
    statistics = input_statistics(content, x)
    operation = weighted(graph)[-1]
    choices = only(graph, operation.index, scheme)
    bounds = clipped_bounds(graph, choices)
    values, ends = round_weights(content, choices, bounds, statistics, gptq)
    corrected = correct_biases(values, content, choices, ends, statistics)
    name, kernel = operation.outputs[0].name, operation.inputs[1].value
    plain, written = (
        means(write_quantized(file, scheme, None, choices=choices, weight_bounds=ends), x)[name]
        for file in (values, corrected)
    )
    expected = means(content, x)[name]
    assert np.abs(written - expected).max() < 0.01 * np.abs(plain - expected).max()
    shift = (weighted(read_graph(values))[-1].inputs[1].value - kernel) @ statistics[operation.index].mean[0]
    found = weighted(read_graph(corrected))[-1].inputs[2].value
    np.testing.assert_allclose(found, operation.inputs[2].value - shift, atol=1e-5)


def test_a_bias_of_a_kernel_that_is_used_twice_takes_up_the_mean_of_the_shifts():
    model = settle(ZOO["shared_layer"]())
    content, x = float_file(model), samples(model, 200)
    graph, scheme = read_graph(content), resolve_scheme("int4-dynamic")
    statistics = input_statistics(content, x)
    corrected = correct_biases(content, content, assign(graph, scheme), {}, statistics)
    kernel, bias = (tensor.value for tensor in weighted(graph)[0].inputs[1:3])
    step = np.abs(kernel).max(axis=1, keepdims=True) / 7
    apart = np.clip(np.rint(kernel / step), -8, 7) * step - kernel
    shift = apart @ (statistics[0].mean[0] + statistics[1].mean[0]) / 2
    first, second = weighted(read_graph(corrected))[:2]
    np.testing.assert_allclose(first.inputs[2].value, bias - shift, atol=1e-5)
    assert first.inputs[2].index == second.inputs[2].index


# ---------------------------------------------------------------- equalization


def uneven(model, seed=0):
    """Make channels of very different size, without a change of what the model computes where nothing is in between."""
    generator = np.random.default_rng(seed)
    for layer in model.layers:
        for variable in layer.trainable_variables:
            if variable.name == "kernel" and len(variable.shape) > 1:
                variable.assign(variable * np.exp(generator.normal(0, 1.5, variable.shape[-1:])))
    return settle(model, seed)


def chain():
    return uneven(
        keras.Sequential(
            [
                keras.Input((10, 10, 3)), L.Conv2D(8, 3, activation="relu", name="a"), L.MaxPooling2D(name="pool"),
                L.DepthwiseConv2D(3, activation="relu", name="b"), L.Conv2D(6, 1, activation="relu", name="c"),
                L.GlobalAveragePooling2D(), L.Dense(12, activation="relu", name="d"), L.Dense(5, name="e"),
            ]
        )
    )  # fmt: skip


def ranges(content):
    """Return, for each kernel, the largest weight that makes each output channel, and that reads each input channel."""
    found = {}
    graph = read_graph(content)
    for operation, name in zip(graph.operations, display_names(graph), strict=True):
        if operation.name in KERNELS:
            kernel = np.abs(operation.inputs[1].value)
            reads = kernel.reshape(-1, kernel.shape[-1]).max(axis=0)
            made = reads if operation.name == "DEPTHWISE_CONV_2D" else kernel.reshape(len(kernel), -1).max(axis=1)
            found[name] = (made, reads)
    return found


def test_equalization_evens_the_ranges_of_a_whole_chain_and_changes_no_output():
    model = chain()
    content = float_file(model)
    equal = equalize(content)
    x = samples(model, 40)
    expected, found = (LiteRTRunner(c).predict(x)[0] for c in (content, equal))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    before, after = ranges(content), ranges(equal)
    for first, second in itertools.pairwise("abcde"):
        np.testing.assert_allclose(after[first][0], after[second][1], rtol=0.02, err_msg=first + second)
        assert np.abs(np.log(before[first][0] / before[second][1])).max() > 0.5
    np.testing.assert_array_equal(before["e"][0].shape, after["e"][0].shape)


def test_a_pair_is_scaled_by_the_root_of_the_ranges():
    model = uneven(keras.Sequential([keras.Input((4,)), L.Dense(6, activation="relu", name="a"), L.Dense(3, name="b")]))
    (first, bias), (second, last) = (layer.get_weights() for layer in model.layers)
    factor = np.sqrt(np.abs(first).max(axis=0) / np.abs(second).max(axis=1))
    a, b = weighted(read_graph(equalize(float_file(model))))
    np.testing.assert_allclose(a.inputs[1].value, (first / factor).T, rtol=1e-5)
    np.testing.assert_allclose(a.inputs[2].value, bias / factor, rtol=1e-5)
    np.testing.assert_allclose(b.inputs[1].value, (second * factor[:, None]).T, rtol=1e-5)
    np.testing.assert_array_equal(b.inputs[2].value, last)


def apart(make):
    """Return a model of two dense or convolutional layers with something between them that no factor passes."""
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3, name="a")(inputs)  # 4 x 4 positions of 4 channels
    return uneven(keras.Model(inputs, make(x)))


def second(x):
    return L.Conv2D(4, 3, name="b")(x)


def shared(x):
    layer = L.Conv2D(4, 3, padding="same", activation="relu", name="b")
    return layer(layer(x))


BLOCKED = {
    "ReLU6": lambda x: second(L.ReLU(6.0)(x)),
    "sigmoid": lambda x: second(L.Activation("sigmoid")(x)),
    "two readers": lambda x: L.Concatenate()([second(x), L.Conv2D(4, 3, name="c")(x)]),
    "is an output": lambda x: [x, second(x)],
    "skip": lambda x: L.Add()([x, L.Conv2D(4, 3, padding="same", name="b")(x)]),
    "flattened": lambda x: L.Dense(4, name="b")(L.Flatten()(x)),
    "used twice": shared,
    "mean of channels": lambda x: L.Dense(4, name="b")(keras.ops.mean(x, axis=-1)),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_where_a_factor_does_not_pass_nothing_is_changed(name):
    model = apart(BLOCKED[name])
    content = float_file(model)
    equal = equalize(content)
    for before, after in zip(weighted(read_graph(content)), weighted(read_graph(equal)), strict=True):
        for old, new in zip(before.inputs[1:3], after.inputs[1:3], strict=True):
            assert old is None or (old.value == new.value).all()


GRAPHS = ["inverted_residual", "channel_shuffle", "keyword_spotting", "residual", "prelu", "grouped", "depthwise",
          "two_towers", "attention"]  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_equalization_changes_no_output_of_any_graph(name):
    model = settle(ZOO[name]())
    content = float_file(model)
    x = samples(model, 8)
    for expected, found in zip(*(LiteRTRunner(c).predict(x) for c in (content, equalize(content))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_equalization_is_what_a_scale_per_tensor_needs():
    model = chain()
    content, x = float_file(model), samples(model, 40)
    scheme = Scheme(weights=8, granularity="tensor")
    plain, equal = (mean_error(content, write_quantized(c, scheme, None), x) for c in (content, equalize(content)))
    assert equal < 0.5 * plain


def test_own_biases_change_nothing_but_who_reads_which():
    content = float_file(linear(bias=False))
    x = samples(linear(bias=False), 8)
    own = with_own_biases(content, missing=True)
    operations = weighted(read_graph(own))
    assert len({op.inputs[2].index for op in operations}) == len(operations) == 5
    assert len({op.inputs[2].name for op in operations}) == 5
    np.testing.assert_array_equal(LiteRTRunner(own).predict(x)[0], LiteRTRunner(content).predict(x)[0])
    assert with_own_biases(own, missing=True) == own
    alone = float_file(settle(ZOO["mlp"]()))
    assert with_own_biases(alone, missing=True) == alone


# ---------------------------------------------------------------- together


@pytest.mark.parametrize(
    "options",
    [{"equalize": True}, {"correct_bias": True}, {"clipping": "mse", "rounding": "gptq", "equalize": True, "correct_bias": True}],
    ids=["equalize", "correct", "all"],
)  # fmt: skip
def test_the_file_computes_what_the_twin_computes_and_the_input_model_is_unchanged(cnn, options, tmp_path):
    content, x = cnn
    model = lifted(content, tmp_path)
    before = [v.numpy() for v in model.variables]
    artefact = dw.export(dw.quantize(model, "int4", x, **options), tmp_path / "m.tflite", data=x)
    assert artefact.verification.passed
    assert artefact.verification.quanta <= 1.0
    assert all((old == new.numpy()).all() for old, new in zip(before, model.variables, strict=True))


@pytest.mark.parametrize(
    "options", [{"rounding": "gptq"}, {"correct_bias": True}, {"budget": "1KB"}, {"max_drop": 0.0}]
)
def test_a_method_that_looks_at_data_says_so(cnn, options, tmp_path):
    with pytest.raises(dw.DataError, match=f"`{next(iter(options))}` looks at `data`, which is None; pass"):
        dw.quantize(lifted(cnn[0], tmp_path), "int4-dynamic", **options)
