"""Structures and global scope against NumPy references, at once and over schedules."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import dwindle as dw
from dwindle.attaching import effective_weights
from dwindle.pruning.single_weights import output_axes
from dwindle.pruning.structures import Blocks, Pattern, structure_from_dict, structure_of
from dwindle.weights import layer_slots

L = keras.layers


def model_of(*layers, shape):
    return keras.Sequential([keras.Input(shape), *layers])


def conv():
    return model_of(L.Conv2D(6, 3, name="c"), shape=(5, 5, 7))


def dense(rows=20, columns=10):
    return model_of(L.Dense(columns, name="d"), shape=(rows,))


def blocks_reference(kernel, rows, columns, sparsity):
    matrix = kernel.reshape(-1, kernel.shape[-1]).copy()
    tiles = [(i, j) for i in range(0, matrix.shape[0], rows) for j in range(0, matrix.shape[1], columns)]
    rated = np.array([np.abs(matrix[i : i + rows, j : j + columns]).mean(dtype=np.float32) for i, j in tiles])
    for number in np.argsort(rated, kind="stable")[: min(round(len(tiles) * sparsity), len(tiles) - 1)]:
        i, j = tiles[number]
        matrix[i : i + rows, j : j + columns] = 0
    return matrix.reshape(kernel.shape)


def pattern_reference(kernel, zeros, group):
    kernel = kernel.copy()
    for place in np.ndindex(kernel.shape[:-2]):
        for column in range(kernel.shape[-1]):
            for begin in range(0, kernel.shape[-2], group):
                part = kernel[place][begin : begin + group, column]
                padded = group - len(part)
                part[np.argsort(np.abs(part), kind="stable")[: max(0, zeros - padded)]] = 0
    return kernel


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (1, 4), (2, 5), (3, 3), (16, 4)])
@pytest.mark.parametrize("sparsity", [0.0001, 0.5, 0.8, 0.999])
def test_blocks_tile_inputs_by_outputs(size, sparsity):
    for model, key in ((dense(), ("d", "kernel")), (conv(), ("c", "kernel"))):
        kernel = model.layers[0].kernel.numpy()
        found = effective_weights(dw.prune(model, sparsity, structure=size))[key]
        np.testing.assert_array_equal(found, blocks_reference(kernel, *size, sparsity))
        assert (found != 0).any()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (3, 4), (2, 8), (5, 6)])
def test_patterns_run_along_input_channels(pattern):
    for model, key in ((dense(), ("d", "kernel")), (conv(), ("c", "kernel"))):
        kernel = model.layers[0].kernel.numpy()
        found = effective_weights(dw.prune(model, structure=f"{pattern[0]}:{pattern[1]}"))[key]
        np.testing.assert_array_equal(found, pattern_reference(kernel, *pattern))


def test_equal_weights_get_every_structure():
    model = dense(16, 8)
    model.layers[0].kernel.assign(np.full((16, 8), 0.5))
    for structure, zeros in (("2:4", 64), ((4, 4), 64), ("element", 64)):
        pruned = dw.prune(model, 0.5, structure=structure)
        assert (effective_weights(pruned)["d", "kernel"] == 0).sum() == zeros


def test_transposed_convolutions_have_their_outputs_before_their_inputs():
    model = model_of(L.Conv2DTranspose(5, 2, name="t"), shape=(4, 4, 8))
    kernel = model.layers[0].kernel.numpy()  # (2, 2, out, in)
    found = effective_weights(dw.prune(model, structure="2:4"))["t", "kernel"]
    expected = pattern_reference(kernel.swapaxes(-1, -2), 2, 4).swapaxes(-1, -2)
    np.testing.assert_array_equal(found, expected)
    blocks = effective_weights(dw.prune(model, 0.5, structure=(4, 5)))["t", "kernel"]
    np.testing.assert_array_equal(blocks, blocks_reference(kernel.swapaxes(-1, -2), 4, 5, 0.5).swapaxes(-1, -2))


def test_outputs_of_attention_kernels_are_those_of_their_equation():
    attention = L.MultiHeadAttention(2, 8, name="m")
    inputs = keras.Input((5, 12))
    model = keras.Model(inputs, attention(inputs, inputs))
    slots = {slot.key: slot for slot in layer_slots(attention)}
    assert output_axes(attention, slots["_query_dense/kernel"]) == (1, 2)  # (in, heads, size)
    assert output_axes(attention, slots["_output_dense/kernel"]) == (2,)  # (heads, size, out)
    found = effective_weights(dw.prune(model, structure="2:4"))["m", "_query_dense/kernel"]
    assert ((found.reshape(3, 4, -1) == 0).sum(axis=1) == 2).all()


def trained_counts(model, name, steps, x, y):
    counts, masks = [], []
    for _ in range(steps):
        model.fit(x, y, batch_size=len(x), verbose=0)
        found = effective_weights(model)[name, "kernel"]
        masks.append(found != 0)
        counts.append(int((found == 0).sum()))
    return counts, masks


@pytest.mark.parametrize("structure", ["element", (2, 5), "2:4"])
@pytest.mark.parametrize("schedule", [
    dw.Constant(begin=1), dw.PolynomialDecay(end=6, frequency=1), dw.PolynomialDecay(begin=1, end=6, frequency=4),
    dw.PolynomialDecay(end=5, frequency=2, initial_fraction=0.6, power=1.0),
])  # fmt: skip
def test_masks_over_a_schedule_are_those_of_a_numpy_reference(structure, schedule):
    model = dense()
    kernel = model.layers[0].kernel.numpy()
    model = dw.prune(model, 0.5, structure=structure, schedule=schedule)
    model.compile(keras.optimizers.SGD(0.0), "mse")  # weights stay, so that each step's mask can be told
    x, y = np.ones((4, 20), np.float32), np.zeros((4, 10), np.float32)
    counts, masks = trained_counts(model, "d", 9, x, y)
    rated = np.abs(kernel)
    if structure == "2:4":
        full = pattern_reference(kernel, 2, 4) == 0
        rated = np.where(full, rated, np.inf)
    final = {"element": 100, (2, 5): 10, "2:4": 100}[structure]
    expected = []
    removed = 0
    for step in range(9):
        if step in schedule.steps():
            removed = round(final * float(schedule.share(np.array([step]))[0]))
        expected.append(removed * (10 if structure == (2, 5) else 1))
        if structure == (2, 5):
            reference = blocks_reference(kernel, 2, 5, removed / 20) != 0
        else:
            reference = np.ones(kernel.size, bool)
            reference[np.argsort(rated, axis=None, kind="stable")[:removed]] = False
            reference = reference.reshape(kernel.shape)
        np.testing.assert_array_equal(masks[step], reference)
    assert counts == expected


def test_a_large_weight_is_ranked_once_a_window_and_its_counts_are_exact():
    model = model_of(L.Dense(160, name="d"), shape=(100,))
    pruned = dw.prune(model, 0.9, schedule=dw.PolynomialDecay(end=12, frequency=1))
    window = 8 + 16000 // 4096
    generator = np.random.default_rng(1)
    kernel, mask, removed, expected = model.layers[0].kernel.numpy(), np.ones(16000, bool), 0, 0
    x, y = generator.normal(size=(8, 100)).astype(np.float32), generator.normal(size=(8, 160)).astype(np.float32)
    pruned.compile(keras.optimizers.SGD(5.0), "mse")
    order, change = None, 0
    for step in range(14):
        kernel = pruned.layers[0].weights[0].numpy().ravel()
        expected = round(0.9 * 16000 * (1 - (1 - min(step / 12, 1)) ** 3))
        if expected > removed and step <= 12:
            if change % window == 0:
                order, gone_before = np.argsort(np.where(mask, np.abs(kernel), np.inf), kind="stable"), removed
            mask[order[: expected - gone_before]] = False
            change, removed = change + 1, expected
        pruned.fit(x, y, batch_size=8, verbose=0)
        found = effective_weights(pruned)["d", "kernel"].ravel() != 0
        np.testing.assert_array_equal(found, mask)
    assert removed == 14400


def test_global_scope_ranks_units_of_all_layers_and_is_exact():
    model = model_of(L.Dense(12, name="a"), L.Dense(8, name="b"), L.Dense(2, name="c"), shape=(16,))
    values = [layer.kernel.numpy() * scale for layer, scale in zip(model.layers, (1, 3, 0.01), strict=True)]
    for layer, value in zip(model.layers, values, strict=True):
        layer.kernel.assign(value)
    together = np.concatenate([np.abs(value).ravel() for value in values])
    best = np.cumsum([0, 192, 96])[:3] + [int(np.abs(value).argmax()) for value in values]
    together[best] = np.inf
    gone = np.zeros(together.size, bool)
    gone[np.argsort(together, kind="stable")[: round(0.7 * together.size)]] = True
    found = effective_weights(dw.prune(model, 0.7, scope="global"))
    flat = np.concatenate([found[name, "kernel"].ravel() == 0 for name in "abc"])
    np.testing.assert_array_equal(flat, gone)
    assert (found["c", "kernel"] != 0).sum() == 1
    everywhere = effective_weights(dw.prune(model, 0.5, structure=(4, 2), scope="global"))
    assert sum((value == 0).sum() for value in everywhere.values()) == 8 * round((24 + 12 + 2) * 0.5)


def test_a_pattern_on_top_of_pruned_weights_keeps_both():
    model = dense()
    once = dw.prune(model, 0.3)
    twice = effective_weights(dw.prune(once, structure="2:4"))["d", "kernel"]
    first = effective_weights(once)["d", "kernel"] == 0
    assert (twice[first] == 0).all()
    groups = (twice.reshape(5, 4, 10) == 0).sum(axis=1)
    assert (groups >= 2).all()
    assert (groups == np.maximum(2, first.reshape(5, 4, 10).sum(axis=1))).all()


def test_layers_that_a_structure_does_not_fit_are_left_unless_named():
    model = model_of(L.Conv2D(8, 3, name="gray"), L.Conv2D(8, 3, name="c"), shape=(9, 9, 1))
    assert set(effective_weights(dw.prune(model, structure="2:4"))) == {("c", "kernel")}
    with pytest.raises(dw.ConfigError, match=r"'2:4' does not fit `gray/kernel`: it has 1 input channels"):
        dw.prune(model, structure="2:4", layers="gray")
    with pytest.raises(dw.ConfigError, match=r"does not fit `d/kernel`: it is a matrix of 20 inputs by 10 outputs"):
        dw.prune(dense(), structure=(4, 16))


def test_structures_round_trip_and_are_parsed():
    for structure in (structure_of("element"), Blocks(2, 3), Pattern(2, 4)):
        assert structure_from_dict(structure.to_dict()) == structure
    assert structure_of("2:4") == Pattern(2, 4)
    assert structure_of([4, 1]) == Blocks(4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "4:4"}, r"'4:4'.*fewer than the group"),
        ({"structure": "0:4"}, r"at least 1 zero"),
        ({"structure": (4,)}, r"a block is \(rows, columns\)"),
        ({"structure": (0, 4)}, r"1 or more"),
        ({"structure": "block"}, r"`structure` is 'block'"),
        ({"structure": "2:4", "sparsity": 0.8}, r"`sparsity` is 0.8, but `structure` '2:4' .* is 0.5"),
        ({"schedule": 3}, r"`schedule` is 3"),
        ({"schedule": {"kind": "constant", "end": 5}}, r"ends only with `regrow`"),
        ({"schedule": {"kind": "constant", "regrow": 0.3}}, r"`regrow` needs `end`"),
        ({"schedule": {"kind": "polynomial", "end": 10, "regrow": 1.5}}, r"`regrow` of the schedule is 1.5"),
        ({"schedule": {"kind": "polynomial", "end": 2.5}}, r"`end` of the schedule is 2.5"),
        (
            {"schedule": {"kind": "polynomial", "end": 9, "regrow": 0.3}, "structure": "2:4"},
            r"single weights and blocks",
        ),
    ],
)
def test_bad_structures_and_schedules_are_one_clear_sentence(arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.prune(dense(), **arguments)
