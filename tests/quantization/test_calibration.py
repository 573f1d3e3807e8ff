"""Calibration: ranges against NumPy, and every way to choose one against brute force on histograms made by hand."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from zoo import ZOO, samples, settle

import dwindle as dw
from dwindle.exporting.convert import float_file
from dwindle.lifting.flatbuffer import read_graph
from dwindle.quantization.calibration import METHODS, _histogram, activations, calibrate
from dwindle.quantization.training import calibration_samples

BINS = 2048


def dense(units=3, *, kernel=None, activation=None):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation=activation, name="dense")])
    if kernel is not None:
        model.layers[0].set_weights([np.asarray(kernel, np.float32), np.zeros(units, np.float32)])
    return model


@pytest.fixture(scope="module")
def plain():
    keras.utils.set_random_seed(0)
    return float_file(dense())


@pytest.fixture(scope="module", params=["conv_bn_relu", "several_inputs_and_outputs"])
def larger(request):
    keras.utils.set_random_seed(0)
    model = settle(ZOO[request.param]())
    return float_file(model), samples(model, 45)


def normal(count, width=4, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def of_input(content, ranges):
    return ranges[read_graph(content).inputs[0].name]


def of_output(content, ranges):
    return ranges[read_graph(content).outputs[0].name]


def test_min_max_is_the_smallest_and_largest_value():
    x = normal(100)
    kernel = np.float32([[1, 0, 0], [0, 2, 0], [0, 0, -4], [0, 0, 0]])
    content = float_file(dense(kernel=kernel))
    found = calibrate(content, [x])
    assert of_input(content, found) == (x.min(), x.max())
    y = x @ kernel
    assert of_output(content, found) == (y.min(), y.max())
    assert set(found) == {t.name for t in read_graph(content).tensors if t.value is None}


@pytest.mark.parametrize("method", METHODS)
def test_ranges_do_not_depend_on_the_batch_size(larger, method):
    content, x = larger
    one, seven, all_at_once = (calibrate(content, x, method=method, batch_size=size) for size in (1, 7, 64))
    for tensor, ends in one.items():
        np.testing.assert_allclose(seven[tensor], ends, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(all_at_once[tensor], ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_all_samples_in_any_order(method, plain):
    content, x = plain, normal(300)
    x[-1] *= 3  # the last batch has the largest value
    np.testing.assert_allclose(
        of_input(content, calibrate(content, [x], method=method)),
        of_input(content, calibrate(content, [x[::-1].copy()], method=method)),
    )


def test_a_histogram_is_numpys_also_where_numpys_fails():
    x = normal(1000).ravel()
    low, high = float(x.min()), float(x.max())
    expected = np.histogram(x.astype(np.float64), bins=BINS, range=(low, high))[0]
    found = _histogram(x, low, high)
    assert found.sum() == x.size
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() <= 1  # a value on an edge may go to either side
    narrow = np.float32([1.0, np.nextafter(np.float32(1), np.float32(2))])
    counts = _histogram(narrow, float(narrow[0]), float(narrow[1]))
    assert (counts[0], counts[-1], counts.sum()) == (1, 1, 2)


def skewed(seed=0):
    """Return the histogram of a bell with a few far values above."""
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.normal(size=20000), generator.uniform(8, 20, 6), [-5.0]])
    return np.histogram(values, bins=BINS)


def rectified():
    """Return the histogram of a ReLU's output: mostly zeros, and a long tail."""
    generator = np.random.default_rng(1)
    return np.histogram(np.concatenate([np.zeros(30000), generator.exponential(size=20000)]), bins=BINS)


def even():
    return np.full(BINS, 7), np.linspace(-1.0, 2.0, BINS + 1)


def tailed():
    """Return the histogram of ten million values near 0 and one that is far."""
    edges = np.linspace(-1.0, 20.0, BINS + 1)
    counts = np.rint(3e5 * np.exp(-(((edges[:-1] + edges[1:]) / 2 / 0.2) ** 2) / 2)).astype(np.int64)
    counts[-1] = 1
    return counts, edges


def positive():
    """Return a histogram far from 0, which every grid has to hold nonetheless."""
    counts = np.zeros(BINS, np.int64)
    counts[100:200] = 50
    counts[-1] = 1
    return counts, np.linspace(3.0, 9.0, BINS + 1)


HISTOGRAMS = [skewed, rectified, even, positive]


def test_percentile_leaves_out_one_in_ten_thousand_at_either_end():
    counts = np.zeros(BINS, np.int64)
    counts[[0, 10, 1000, 1500, 1900]] = 1, 5, 19989, 4, 1  # of 20,000, two are one in ten thousand
    edges = np.linspace(-1.0, 1.0, BINS + 1)
    assert METHODS["percentile"](counts, edges, 8) == (edges[10], edges[1501])


@pytest.mark.parametrize("make", HISTOGRAMS)
def test_percentile_is_the_quantile_to_a_bin(make):
    counts, edges = make()
    low, high = METHODS["percentile"](counts, edges, 8)
    assert counts[edges[1:] <= low].sum() <= 1e-4 * counts.sum()
    assert counts[edges[:-1] >= high].sum() <= 1e-4 * counts.sum()
    below, above = np.searchsorted(edges, low), np.searchsorted(edges, high)
    assert counts[: below + 1].sum() >= 1e-4 * counts.sum()
    assert counts[above - 1 :].sum() > 1e-4 * counts.sum() * (1 - 1e-9)


def candidates(edges):
    """Return the whole range, and 40 that are cut at both ends in proportion, with 0 in each."""
    return [(min(edges[0], 0) * share, max(edges[-1], 0) * share) for share in np.linspace(1, 0.2, 41)]


def levels(low, high):
    """Return the 256 values that an 8-bit grid of a range holds."""
    scale = (high - low) / 255
    return (np.arange(256) - np.rint(-low / scale)) * scale


def squared_error(counts, centres, grid):
    return sum(n * np.abs(grid - c).min() ** 2 for n, c in zip(counts, centres, strict=True) if n)


def divergence(counts, centres, grid):
    """Return KL(P || Q): P the histogram without the bin of 0, Q what is left of it on the grid."""
    total, members, masses = sum(counts), {}, {}
    for number, (n, centre) in enumerate(zip(counts, centres, strict=True)):
        if n:
            level = int(np.abs(grid - centre).argmin())
            masses[level] = masses.get(level, 0) + n
            if grid[0] - 1e-12 <= centre <= grid[-1] + 1e-12:
                members.setdefault(level, []).append(number)
    guess = np.full(len(counts), 1e-12)
    for level, mass in masses.items():
        for number in members.get(level, []):
            guess[number] = mass / len(members[level]) / total
    assert guess.sum() <= 1 + 1e-6  # a distribution, but for levels none of whose own bins holds anything
    return sum(n / total * np.log(n / total / q) for n, q in zip(counts, guess, strict=True) if n)


def brute_force(counts, edges, loss):
    centres = (edges[:-1] + edges[1:]) / 2
    losses = [loss(counts, centres, levels(low, high)) for low, high in candidates(edges)]
    return candidates(edges)[int(np.argmin(losses))], losses


@pytest.mark.parametrize("make", HISTOGRAMS)
def test_mse_is_the_candidate_with_the_least_squared_error(make):
    counts, edges = make()
    expected, losses = brute_force(counts, edges, squared_error)
    np.testing.assert_allclose(METHODS["mse"](counts, edges, 8), expected, atol=1e-12)
    assert min(losses) <= losses[0]


@pytest.mark.parametrize("make", HISTOGRAMS)
def test_entropy_is_the_candidate_with_the_least_divergence(make):
    counts, edges = make()
    without_zero = np.where((edges[:-1] <= 0) & (edges[1:] > 0), 0, counts)
    # The grid's ends are rounded to its steps; what lies outside of a candidate is what the range says.
    centres = (edges[:-1] + edges[1:]) / 2
    found = METHODS["entropy"](counts, edges, 8)
    expected, losses = brute_force(without_zero, edges, divergence)
    chosen = divergence(without_zero, centres, levels(*found))
    assert found in [pytest.approx(ends) for ends in candidates(edges)]
    assert chosen <= min(losses) * 1.05 + 1e-6, (found, expected)


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_a_long_tail_is_cut_and_an_even_spread_is_not(method):
    counts, edges = even()
    assert METHODS[method](counts, edges, 8) == (edges[0], edges[-1])
    counts, edges = tailed()
    assert METHODS[method](counts, edges, 8)[1] <= 0.8 * edges[-1]
    assert METHODS[method](counts, edges, 16) == (edges[0], edges[-1])  # 16 bits have steps enough for all of it


def test_entropy_of_nothing_but_zeros_is_the_whole_range():
    counts = np.zeros(BINS, np.int64)
    counts[0] = 5
    edges = np.linspace(0.0, 1.0, BINS + 1)
    assert METHODS["entropy"](counts, edges, 8) == (0.0, 1.0)


def test_a_tensor_that_is_constant_keeps_its_value_and_a_narrow_one_its_ends():
    kernel = np.zeros((4, 3), np.float32)
    model = dense(kernel=kernel)
    model.layers[0].set_weights([kernel, np.float32([0.5, 0.5, 0.5])])
    content = float_file(model)
    for method in METHODS:
        assert of_output(content, calibrate(content, [normal(40)], method=method)) == (0.5, 0.5)
    kernel[0, 0] = 3e-8  # with the bias of 1, the output has a few neighbouring floats
    model.layers[0].set_weights([kernel, np.float32([1.0, 1.0, 1.0])])
    content = float_file(model)
    for method in METHODS:
        low, high = of_output(content, calibrate(content, [normal(400)], method=method))
        assert low <= 1.0 <= high
        assert high - low < 1.1


def test_progress_counts_samples_once_and_ends_at_all(plain):
    content = plain
    for method, runs in (("min-max", 1), ("mse", 2)):
        told = []
        calibrate(
            content, [normal(150)], method=method, progress=lambda done, every, told=told: told.append((done, every))
        )
        assert told[-1] == (150 * runs, 150 * runs)
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert len(told) == 3 * runs  # batches of 64


def test_memory_does_not_grow_with_the_samples(plain):
    import tracemalloc

    content = plain
    peaks = []
    for count in (500, 5000):
        x = normal(count)
        tracemalloc.start()
        calibrate(content, [x], method="mse")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 20_000


def test_activations_of_a_file_of_fixed_batch_come_sample_by_sample():
    model = settle(ZOO["transposed"]())  # its file does not take several samples at once
    content, (x,) = float_file(model), samples(model, 3)
    last = read_graph(content).outputs[0].name
    found = [(done, value) for done, value, tensor in activations(content, [x]) if tensor.name == last]
    assert [done for done, _ in found] == [1, 2, 3]
    np.testing.assert_allclose(np.concatenate([v for _, v in found]), model.predict(x, verbose=0), atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([np.zeros((0, 4), np.float32)], "no samples"),
        ([], "no samples"),
        ([np.zeros((9, 4), np.float32)], "0 everywhere in all 9 samples"),
        ([np.full((9, 4), 2.5, np.float32)], r"constant, 2\.5 everywhere in all 9 samples"),
        ([np.full((9, 4), np.nan, np.float32)], "not finite"),
        ([np.array([[1, 2, 3, np.inf]], np.float32)], "not finite"),
        ([normal(9), normal(9)], "2 arrays and the file has 1 inputs"),
    ],
)
def test_bad_data_is_one_clear_sentence(data, message, plain):
    for method in METHODS:
        with pytest.raises(dw.DataError, match=message) as caught:
            calibrate(plain, data, method=method)
        assert "\n" not in str(caught.value)


def test_an_unknown_method_names_the_nearest(plain):
    with pytest.raises(dw.ConfigError, match=r"`method` is 'entropie'.*did you mean `entropy`"):
        calibrate(plain, [normal(9)], method="entropie")


@pytest.mark.parametrize("call", [dw.quantize, lambda model, *rest: dw.export(model, "never.tflite", *rest)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_data_is_refused_by_quantize_and_export(call, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dw.DataError, match=r"calibration data is .* no range to find"):
        call(dense(), "int8", np.full((20, 4), value, np.float32))
    assert not list(tmp_path.iterdir())


def test_one_constant_input_of_two_is_accepted_unless_it_is_zero():
    model = settle(ZOO["several_inputs_and_outputs"]())
    content, x = float_file(model), samples(model, 20)
    names = [tensor.name for tensor in read_graph(content).inputs]
    ones = [x[0], np.ones_like(x[1])]
    assert calibrate(content, ones)[names[1]] == (1.0, 1.0)
    with pytest.raises(dw.DataError, match=f"0 everywhere in all 20 samples of input `{names[1]}`"):
        calibrate(content, [x[0], np.zeros_like(x[1])])


def test_data_that_is_sorted_is_sampled_all_over():
    x = np.linspace(0, 1, 2000, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    (picked,) = calibration_samples([(4,)], x, limit=100)
    assert picked.shape == (100, 4)
    assert picked.min() == 0
    assert picked.max() == 1
    assert np.abs(np.diff(picked[:, 0]) - 1 / 99).max() < 1e-3
    (whole,) = calibration_samples([(4,)], x[:50], limit=100)
    np.testing.assert_array_equal(whole, x[:50])
