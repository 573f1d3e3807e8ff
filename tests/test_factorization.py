"""Low rank against singular values from NumPy, exactness at full rank, targets, and the whole zoo."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from zoo import ZOO, outputs, samples, settle

import dwindle as dw
from dwindle.weights import walk_layers

L = keras.layers


def assert_same(found, expected):
    """Within 1e-5 of the largest output."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


def of_rank(rows, columns, rank, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, rank)) @ generator.normal(size=(rank, columns)) / rank).astype(np.float32)


def dense(rows=40, columns=30, rank=None, **options):
    model = keras.Sequential([keras.Input((rows,)), L.Dense(columns, name="d", **options)])
    kernel = of_rank(rows, columns, rank or min(rows, columns))
    model.layers[0].kernel.assign(kernel)
    if model.layers[0].use_bias:
        model.layers[0].bias.assign(np.random.default_rng(1).normal(size=columns))
    return model


def rows_of(model):
    return {row.layer: row for row in model.factorization.layers}


def product(low, name="d"):
    first, second = (np.asarray(low.get_layer(n).kernel) for n in (f"{name}_in", name))
    return first @ second


@pytest.mark.parametrize(("shape", "rank"), [((40, 30), 5), ((30, 40), 5), ((64, 64), 20), ((7, 50), 1)])
def test_the_error_is_what_the_discarded_singular_values_say(shape, rank):
    model = dense(*shape)
    kernel = np.asarray(model.layers[0].kernel, np.float64)
    values = np.linalg.svd(kernel, compute_uv=False)
    low = dw.factorize(model, rank=rank)
    error = np.linalg.norm(kernel - product(low))
    assert error == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-5)
    assert rows_of(low)["d"].error == pytest.approx(error / np.linalg.norm(kernel), rel=1e-5)
    assert low.count_params() == rank * sum(shape) + shape[1]
    assert low.factorization.parameters_before == model.count_params()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_rank_is_the_least_that_keeps_the_energy(energy):
    kernel = np.diag(np.sqrt(0.8 ** np.arange(60))).astype(np.float32)
    model = dense(60, 60, use_bias=False)
    model.layers[0].kernel.assign(kernel)
    share = np.cumsum(0.8 ** np.arange(60)) / (0.8 ** np.arange(60)).sum()
    assert rows_of(dw.factorize(model, energy=energy))["d"].rank == int(np.argmax(share >= energy)) + 1


def test_all_energy_of_a_kernel_of_low_rank_is_exact():
    model = dense(rank=6, activation="tanh")
    low = dw.factorize(model, energy=1.0)
    assert rows_of(low)["d"].rank == 6
    assert [layer.name for layer in low.layers] == ["d_in", "d"]
    assert low.get_layer("d_in").activation is keras.activations.linear
    x = samples(model, 20)
    assert_same(outputs(low, x), outputs(model, x))


def convolution(kernel, **options):
    *window, channels, filters = kernel.shape
    options = {"padding": "same", "activation": "relu", "name": "c", **options}
    kind = {1: L.Conv1D, 2: L.Conv2D, 3: L.Conv3D}[len(window)]
    shape = [13, 14, 9][: len(window)]
    first = options.get("data_format") == "channels_first"
    inputs = keras.Input((channels, *shape) if first else (*shape, channels))
    layer = kind(filters, window, **options)
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign(kernel)
    layer.bias.assign(np.random.default_rng(5).normal(size=filters))
    return model


def spatial(window, channels, filters, rank, axis):
    generator = np.random.default_rng(3)
    along = generator.normal(size=(window[axis], channels, rank))
    other = generator.normal(size=(rank, window[1 - axis], filters))
    kernel = np.einsum("icr,rjn->ijcn" if axis == 0 else "icr,rjn->jicn", along, other)
    return (kernel / rank / 4).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        (of_rank(3 * 3 * 8, 24, 3).reshape(3, 3, 8, 24), "3x3, then 1x1"),
        (of_rank(24, 3 * 3 * 8, 3).reshape(24, 3, 3, 8).transpose(1, 2, 0, 3), "1x1, then 3x3"),
        (spatial((3, 5), 10, 12, 4, 0), "3x1, then 1x5"),
        (spatial((3, 5), 10, 12, 4, 1), "1x5, then 3x1"),
        (of_rank(32, 40, 4).reshape(1, 1, 32, 40), "1x1, then 1x1"),
        (of_rank(5 * 8, 24, 3).reshape(5, 8, 24), "5, then 1"),
        (of_rank(2 * 2 * 3 * 8, 24, 3).reshape(2, 2, 3, 8, 24), "2x2x3, then 1x1x1"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"strides": 2}, {"dilation_rate": 2}, {"padding": "valid"}])
def test_each_form_of_a_convolution_is_found_and_exact(kernel, form, options):
    model = convolution(kernel, **options)
    low = dw.factorize(model, energy=1.0)
    row = rows_of(low)["c"]
    if form == "1x1, then 3x3" and options.get("strides"):
        # The first convolution runs on four times as many positions.
        assert row.reason == "" or "saves no multiplications" in row.reason
        form = row.form
    assert row.form == form
    assert sum(np.asarray(layer.kernel).size for layer in low.layers[1:]) == row.parameters_after
    x = samples(model, 3)
    assert_same(outputs(low, x), outputs(model, x))


def test_a_causal_convolution_stays_causal():
    model = convolution(of_rank(16, 5 * 12, 3).reshape(16, 5, 12).transpose(1, 0, 2), padding="causal")
    low = dw.factorize(model, energy=1.0)
    assert rows_of(low)["c"].form == "1, then 5"
    x = samples(model, 3)
    assert_same(outputs(low, x), outputs(model, x))


@pytest.mark.parametrize(
    ("equation", "shape", "given", "bias", "sizes"),
    [
        ("abc,cd->abd", (5, 24), (5, 20), "d", ((20,), (24,))),
        ("...x,xy->...y", (24,), (3, 5, 20), "y", ((20,), (24,))),
        ("abcd,cde->abe", (5, 24), (5, 4, 6), "e", ((4, 6), (24,))),
        ("abc,cde->abde", (5, 4, 6), (5, 24), "de", ((24,), (4, 6))),
        ("abc,dc->adb", (24, 5), (5, 20), "d", ((20,), (24,))),
        ("ab...,bc->ac...", (24,), (20, 3), None, ((20,), (24,))),
    ],
)
def test_einsum_layers_are_exact_at_full_rank(equation, shape, given, bias, sizes):
    inputs = keras.Input(given)
    layer = L.EinsumDense(equation, output_shape=shape, bias_axes=bias, activation="tanh", name="e")
    model = keras.Model(inputs, layer(inputs))
    left, right = sizes
    matrix = of_rank(int(np.prod(left)), int(np.prod(right)), 4)
    weight = equation.split(",")[1].split("->")[0]
    kernel = matrix.reshape(*left, *right)
    layer.kernel.assign(kernel.T if weight == "dc" else kernel)
    if bias is not None:
        layer.bias.assign(np.random.default_rng(4).normal(size=layer.bias.shape))
    low = dw.factorize(model, energy=1.0)
    assert rows_of(low)["e"].rank == 4
    x = samples(model, 6)
    assert_same(outputs(low, x), outputs(model, x))
    again = dw.factorize(model, rank=2, data=x[0])
    kernels = [np.asarray(again.get_layer(name).kernel) for name in ("e_in", "e")]
    assert kernels[0].size + kernels[1].size == 2 * sum(matrix.shape)


def test_an_einsum_with_an_axis_in_both_is_left():
    inputs = keras.Input((4, 6))
    model = keras.Model(inputs, L.EinsumDense("abc,bcd->abd", output_shape=(4, 8), name="e")(inputs))
    assert "in both input and output" in rows_of(dw.factorize(model))["e"].reason


def correlated(rows, count=300):
    generator = np.random.default_rng(8)
    return (generator.normal(size=(count, rows)) @ np.diag(0.75 ** np.arange(rows)) @ np.linalg.qr(
        generator.normal(size=(rows, rows)))[0]).astype(np.float32)  # fmt: skip


def test_with_data_the_output_error_is_the_least_that_the_rank_allows():
    model = dense(use_bias=False)
    x = correlated(40)
    kernel = np.asarray(model.layers[0].kernel, np.float64)
    y = x.astype(np.float64) @ kernel
    values = np.linalg.svd(y, compute_uv=False)
    with_data, without = dw.factorize(model, rank=5, data=x, samples=300), dw.factorize(model, rank=5)
    errors = [np.linalg.norm(y - x @ product(low)) for low in (with_data, without)]
    assert errors[0] == pytest.approx(np.sqrt((values[5:] ** 2).sum()), rel=1e-4)
    assert errors[0] < 0.5 * errors[1]
    assert rows_of(with_data)["d"].error == pytest.approx(errors[0] / np.linalg.norm(y), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"strides": 2}, {"padding": "valid", "dilation_rate": 2}])
def test_with_data_a_convolutions_outputs_are_closer(options):
    generator = np.random.default_rng(2)
    model = convolution(generator.normal(size=(3, 3, 16, 16)).astype(np.float32) / 12, activation=None, **options)
    x = correlated(16, 6 * 13 * 14).reshape(6, 13, 14, 16)
    expected = outputs(model, [x])[0]
    errors = [np.linalg.norm(outputs(dw.factorize(model, energy=0.9, **given), [x])[0] - expected)
              for given in ({"data": x}, {})]  # fmt: skip
    ranks = [rows_of(dw.factorize(model, energy=0.9, **given))["c"].parameters_after for given in ({"data": x}, {})]
    assert ranks[0] < ranks[1]
    assert errors[0] <= 1.3 * np.sqrt(0.1) * np.linalg.norm(expected)


def deep():
    model = keras.Sequential([keras.Input((16, 16, 8))])
    for number, filters in enumerate((24, 32, 48)):
        model.add(L.Conv2D(filters, 3, padding="same", activation="relu", name=f"c{number}"))
    model.add(L.Flatten())
    model.add(L.Dense(40, activation="relu", name="wide"))
    model.add(L.Dense(10, name="out"))
    return model


@pytest.mark.parametrize("share", [0.6, 0.3, 0.1])
def test_a_number_of_parameters_is_met_within_three_percent(share):
    model = deep()
    wanted = int(share * model.count_params())
    for target in (wanted, share):
        low = dw.factorize(model, parameters=target)
        assert 0.97 * wanted <= low.count_params() <= wanted
        assert low.count_params() == low.factorization.parameters_after
    assert low.output_shape == model.output_shape


def test_ranks_are_allotted_where_they_are_needed():
    model = keras.Sequential([keras.Input((64,)), L.Dense(64, name="easy"), L.Dense(64, name="hard")])
    model.get_layer("easy").kernel.assign(of_rank(64, 64, 4))
    model.get_layer("hard").kernel.assign(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0])
    low = dw.factorize(model, parameters=6000)
    rows = rows_of(low)
    assert rows["easy"].rank == 4
    assert "suffice" in rows["hard"].reason or rows["hard"].rank >= 20
    best = min(
        (easy + hard, (e, h))
        for e, easy in enumerate(_errors(model.get_layer("easy").kernel))
        for h, hard in enumerate(_errors(model.get_layer("hard").kernel))
        if (128 * e if 0 < e < 32 else 4096) + (128 * h if 0 < h < 32 else 4096) + 128 <= 6000 and e and h
    )
    found = rows["easy"].error ** 2 + rows["hard"].error ** 2
    assert found <= best[0] + 1 / 64 + 1e-6  # one rank of the harder one


def _errors(kernel):
    values = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False) ** 2
    return [values[rank:].sum() / values.sum() if rank < 32 else 0.0 for rank in range(65)]


@pytest.mark.parametrize("name", [name for name in ZOO if name != "subclassed"])
def test_the_zoo_keeps_inputs_outputs_and_what_was_not_chosen(name):
    model = settle(ZOO[name]())
    x = samples(model, 4)
    before = [np.asarray(w) for w in model.weights]
    low = dw.factorize(model, energy=0.7)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))
    assert [t.shape for t in low.outputs] == [t.shape for t in model.outputs]
    done = [row for row in low.factorization.layers if not row.reason]
    assert low.count_params() == model.count_params() - sum(r.parameters_before - r.parameters_after for r in done)
    assert all(row.parameters_after < row.parameters_before for row in done)
    assert all(row.reason or row.rank for row in low.factorization.layers)
    expected, found = outputs(model, x), outputs(low, x)
    if not done:
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
    # The same model with each kernel replaced by its approximation computes the same.
    twin = keras.models.clone_model(model) if not done else _approximated(model, low)
    if done and twin is not None:
        assert_same(found, outputs(twin, x))


def _approximated(model, low):
    """Return the old model with the product of the two kernels in the old place, computed the slow way."""
    twin = type(model).from_config(model.get_config())
    if not twin.built:
        twin.build(model.input_shape)
    for old, new in zip(model.weights, twin.weights, strict=True):
        new.assign(old)
    layers, olds = dict(walk_layers(twin)), dict(walk_layers(low))
    for row in low.factorization.layers:
        if row.reason:
            continue
        first, second = np.asarray(olds[f"{row.layer}_in"].kernel), np.asarray(olds[row.layer].kernel)
        if first.ndim == 2:
            full = first @ second
        else:
            rank = first.ndim - 2
            letters = "ijk"[:rank]
            full = np.zeros(layers[row.layer].kernel.shape, np.float32)
            for a in np.ndindex(*first.shape[:rank]):
                for b in np.ndindex(*second.shape[:rank]):
                    # Windows of which one is a single place: their composition is their outer sum.
                    full[tuple(i + j for i, j in zip(a, b, strict=True))] += first[a] @ second[b]
            assert letters
        layers[row.layer].kernel.assign(full)
    return twin


def test_shared_layers_and_nested_models_are_wired_at_every_call():
    shared = L.Dense(32, activation="relu", name="shared")
    block = keras.Sequential([keras.Input((32,)), L.Dense(32, name="a"), L.Dense(32, name="b")], name="block")
    inputs = keras.Input((32,))
    x = block(shared(shared(inputs)))
    model = keras.Model(inputs, [block(x), shared(x)])
    for layer in (shared, block.get_layer("a")):
        layer.kernel.assign(of_rank(32, 32, 5))
    low = dw.factorize(model, energy=1.0, layers=["shared", "block/a"])
    assert {path for path, _ in walk_layers(low)} >= {"shared_in", "shared", "block/a_in", "block/a", "block/b"}
    x = samples(model, 5)
    assert_same(outputs(low, x), outputs(model, x))
    # Data reaches them in both calls, and inside of the nested model.
    again = dw.factorize(model, energy=0.9999, data=x[0])
    assert {row.layer for row in again.factorization.layers} == {"shared", "block/a", "block/b"}
    assert not rows_of(again)["block/b"].reason  # five samples span few directions
    for a, b in zip(outputs(model, x), outputs(again, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05 * np.abs(a).max())


def test_what_is_left_says_why():
    inputs = keras.Input((6, 16))
    x = L.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    x = L.Dense(16, kernel_constraint=keras.constraints.MaxNorm(), name="bounded")(x)
    x = L.TimeDistributed(L.Dense(16), name="each")(x)
    model = keras.Model(inputs, L.Dense(16, name="free")(x))
    rows = rows_of(dw.factorize(model))
    assert "inside a MultiHeadAttention" in rows["attention"].reason
    assert "constraint" in rows["bounded"].reason
    assert "inside a TimeDistributed" in rows["each"].reason
    assert "saves no parameters" in rows["free"].reason
    masked = dw.prune(keras.Sequential([keras.Input((16,)), L.Dense(16, name="d")]), 0.5)
    assert "a technique hangs" in rows_of(dw.factorize(masked))["d"].reason
    text = str(dw.factorize(dense(rank=3)).factorization)
    assert "d: 1,200 to 210, two dense layers, rank 3 of 30, error 0.000" in text


def test_the_result_trains_saves_and_exports(tmp_path, trained, digits):
    (x, y), (x_test, y_test) = digits
    low = dw.factorize(trained, parameters=0.4, data=x)
    low.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    low.fit(x, y, epochs=2, batch_size=32, verbose=0)
    assert low.evaluate(x_test, y_test, verbose=0)[1] > 0.9
    low.save(tmp_path / "low.keras")
    again = dw.load(tmp_path / "low.keras")
    np.testing.assert_array_equal(again.predict(x_test, verbose=0), low.predict(x_test, verbose=0))
    before, after = dw.export(trained, tmp_path / "a.tflite"), dw.export(low, tmp_path / "b.tflite")
    assert after.size_bytes < 0.5 * before.size_bytes


def test_a_lifted_model_is_factorized_as_the_model_that_it_came_from(trained, digits):
    low, lifted = dw.factorize(trained, energy=0.9), dw.factorize(dw.lift(trained), energy=0.9)
    assert lifted.count_params() == low.count_params() < trained.count_params()
    x = digits[1][0][:100]
    np.testing.assert_allclose(lifted.predict(x, verbose=0), low.predict(x, verbose=0), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 0.0}, r"`energy` is 0.0; .*\(0, 1\]"),
        ({"energy": 1.5}, r"`energy` is 1.5"),
        ({"energy": "95%"}, r"`energy` is '95%'"),
        ({"rank": 0}, r"`rank` is 0; .*at least 1"),
        ({"rank": 2.5}, r"`rank` is 2.5"),
        ({"parameters": -4}, r"`parameters` is -4"),
        ({"parameters": 10.5}, r"`parameters` is 10.5"),
        ({"parameters": 50}, r"`parameters` is 50; with rank 1 .* still has 100"),
        ({"parameters": 10**6}, r"the model has 1,230; pass fewer"),
        ({"energy": 0.9, "rank": 4}, r"`energy` and `rank` are both given"),
        ({"layers": "e*"}, r"'e\*', which matches none"),
        ({"samples": 0}, r"`samples` is 0"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.factorize(dense(), **arguments)


def test_models_that_cannot_be_factorized_say_why():
    with pytest.raises(dw.UnsupportedModelError, match="no Dense"):
        dw.factorize(keras.Sequential([keras.Input((3,)), L.ReLU()]))
    with pytest.raises(dw.UnsupportedModelError, match="subclassed"):
        dw.factorize(ZOO["subclassed"]())
    with pytest.raises(dw.DataError, match="x_test"):
        dw.factorize(dense(), data=np.zeros((4, 3), np.float32))


def test_the_code_of_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "factorization.md").read_text(encoding="utf8")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M):
        exec(compile(block, "factorization.md", "exec"), names)
    assert names["low"].count_params() <= 0.25 * names["model"].count_params()
