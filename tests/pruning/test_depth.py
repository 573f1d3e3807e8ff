"""Blocks that are left out: the same as their branch times zero; importance against formulas; what pins a block."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from zoo import ZOO, outputs, samples, settle

import dwindle as dw
from dwindle.graph_editing import Taps
from dwindle.model_samples import output_change
from dwindle.pruning.depth import drop_blocks, rate_blocks, residual_blocks
from dwindle.weights import walk_layers

L = keras.layers


def chain(blocks=4, units=8):
    x = inputs = keras.Input((units,), name="x")
    for number in range(blocks):
        y = L.Dense(16, activation="relu", name=f"up{number}")(x)
        x = L.Add(name=f"add{number}")([x, L.Dense(units, name=f"down{number}")(y)])
    return settle(keras.Model(inputs, L.Dense(3, activation="softmax", name="head")(x)))


def encoder(inputs, heads=2, name="", add=None):
    x = L.LayerNormalization(name=f"{name}n1")(inputs)
    x = L.Add(name=f"{name}attended")([inputs, L.MultiHeadAttention(heads, 4, name=f"{name}mha")(x, x)])
    y = L.LayerNormalization(name=f"{name}n2")(x)
    y = L.Dense(8, name=f"{name}out")(L.Dense(16, activation="gelu", name=f"{name}mid")(y))
    return (add or L.Add(name=f"{name}passed"))([x, y])


def transformer(layers=3, add=None):
    x = inputs = keras.Input((6, 8), name="tokens")
    for number in range(layers):
        x = encoder(x, name=f"e{number}_", add=add)
    return settle(keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling1D()(x))))


def resnet():
    x = inputs = keras.Input((12, 12, 3))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    for stage, filters in enumerate((8, 16)):
        for number in range(2):
            strides = 2 if stage and not number else 1
            y = L.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
            y = L.ReLU()(L.BatchNormalization()(y))
            y = L.BatchNormalization()(L.Conv2D(filters, 3, padding="same", use_bias=False)(y))
            short = x if x.shape[-1] == filters else L.Conv2D(filters, 1, strides=strides)(x)
            x = L.ReLU()(L.Add(name=f"s{stage}b{number}")([short, y]))
    return settle(keras.Model(inputs, L.Dense(4, activation="softmax")(L.GlobalAveragePooling2D()(x))))


def times_zero(model, blocks):
    """Return the same graph in which the branch of each of these additions is multiplied by zero."""
    starts = {block.end[0]: block.start for block in blocks}
    layers = {layer.name: layer for layer in model.layers}
    operands = {}
    config = model.get_config()
    for entry in config["layers"]:
        if entry["config"]["name"] in starts:
            node = entry["inbound_nodes"][0]["args"]
            node = node[0] if isinstance(node[0], list | tuple) else node
            names = [tensor["config"]["keras_history"][0] for tensor in node]
            operands[entry["config"]["name"]] = names.index(starts[entry["config"]["name"]][0])

    def call(layer, *args, **kwargs):
        if layer.name in starts:
            tensors = args[0] if isinstance(args[0], list | tuple) else args
            trunk = tensors[operands[layer.name]]
            return trunk + sum(0.0 * other for other in tensors if other is not trunk)
        return layer(*args, **kwargs)

    assert set(starts) <= set(layers)
    return keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("build", [chain, transformer, resnet])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_dropped_block_is_its_branch_times_zero(build, count):
    model = build()
    x = samples(model, 8)
    before = [np.asarray(w) for w in model.weights]
    shallow = drop_blocks(model, count, data=x)
    assert len(shallow.depth.dropped) == count
    assert_same(
        outputs(shallow, x), outputs(times_zero(model, [b for r in shallow.depth.dropped for b in r.blocks]), x)
    )
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))
    saved = sum(each.parameters for each in shallow.depth.dropped)
    assert shallow.count_params() == model.count_params() - saved
    assert saved > 0
    gone = {layer for each in shallow.depth.dropped for block in each.blocks for layer in block.layers}
    assert not gone & {path for path, _ in walk_layers(shallow)}
    assert "dropped: " in str(shallow.depth)


def test_an_addition_that_is_an_operation_counts_as_one():
    plain, layered = transformer(add=lambda pair: pair[0] + pair[1]), transformer()
    layered.set_weights(plain.get_weights())
    x = samples(plain, 6)
    found = [drop_blocks(model, 4, data=x) for model in (plain, layered)]
    assert_same(outputs(found[0], x), outputs(found[1], x))
    assert found[0].count_params() == found[1].count_params()


def test_what_is_found_in_a_residual_network():
    found = {block.name: block for block in residual_blocks(resnet())}
    assert [name for name, block in found.items() if not block.pinned] == ["s0b0", "s0b1", "s1b1"]
    assert found["s1b0"].pinned == "both sides of the addition have layers of their own"
    assert sum("conv2d" in layer for layer in found["s0b0"].layers) == 2
    assert found["s0b0"].parameters == 2 * (8 * 8 * 9 + 4 * 8)


def test_attention_and_the_block_behind_it_are_a_layer():
    model = transformer()
    blocks = residual_blocks(model)
    assert [block.attention for block in blocks] == [True, False] * 3
    units = rate_blocks(model, unit="layer")
    assert len(units) == 3
    assert all(len(unit.blocks) == 2 and unit.name.startswith(unit.blocks[0].name + "+") for unit in units)
    shallow = drop_blocks(model, fraction=0.34, unit="layer")
    assert len(shallow.depth.dropped) == 1
    assert sum(isinstance(layer, L.MultiHeadAttention) for layer in shallow.layers) == 2


def test_a_normalization_between_the_two_does_not_part_them():
    x = inputs = keras.Input((6, 8))
    x = L.LayerNormalization()(L.Add()([x, L.MultiHeadAttention(2, 4)(x, x)]))
    x = L.LayerNormalization()(L.Add()([x, L.Dense(8)(L.Dense(16)(x))]))
    assert [len(unit.blocks) for unit in rate_blocks(keras.Model(inputs, x), unit="layer")] == [2]


def test_nested_and_shared_blocks():
    tokens = keras.Input((6, 8))
    layer = keras.Model(tokens, encoder(tokens), name="encoder")
    inputs = keras.Input((6, 8))
    model = settle(keras.Model(inputs, L.Dense(3)(layer(layer(inputs)))))
    names = [block.name for block in residual_blocks(model)]
    assert names[0] == "encoder/attended"
    assert len(names) == 2
    x = samples(model, 5)
    shallow = drop_blocks(model, layers="encoder/attended", data=x, criterion="similarity")
    # Computed by hand: the encoder without attention, twice.
    inner = layer.get_layer
    value = x[0]
    for _ in range(2):
        y = np.asarray(inner("out")(inner("mid")(inner("n2")(value))))
        value = value + y
    assert_same(outputs(shallow, x), [np.asarray(model.layers[-1](value))])
    assert not any("mha" in path for path, _ in walk_layers(shallow))


def test_a_layer_used_in_two_blocks_stays_while_one_does():
    shared = L.Dense(8, activation="tanh", name="shared")
    x = inputs = keras.Input((8,))
    for number in range(3):
        x = L.Add(name=f"add{number}")([x, shared(x)])
    model = settle(keras.Model(inputs, x))
    assert [block.parameters for block in residual_blocks(model)] == [0, 0, 0]
    x = samples(model, 5)
    shallow = drop_blocks(model, layers="add1")
    value = x[0]
    for _ in range(2):
        value = value + np.asarray(shared(value))
    assert_same(outputs(shallow, x), [value])


def test_similarity_is_one_minus_the_cosine():
    model = chain(3)
    x = samples(model, 50)
    values = Taps(model, {"": [("x", 0, 0), ("add0", 0, 0), ("add1", 0, 0), ("add2", 0, 0)]}).read(x)
    states = [values["", (name, 0, 0)][0].astype(np.float64) for name in ("x", "add0", "add1", "add2")]
    for rated in rate_blocks(model, data=x, criterion="similarity"):
        number = int(rated.name[-1])
        a, b = states[number], states[number + 1]
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert rated.importance == pytest.approx(1 - cosine.mean(), abs=1e-6)


def test_output_is_the_divergence_that_leaving_it_out_makes():
    model = chain(3)
    x = samples(model, 50)
    p = outputs(model, x)[0].astype(np.float64)
    for rated in rate_blocks(model, data=x):
        q = outputs(times_zero(model, rated.blocks), x)[0].astype(np.float64)
        assert rated.importance == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3)
    assert output_change([np.array([[1.0, -3.0]])], [np.array([[2.0, -3.0]])]) == pytest.approx(0.5 / 4.0)


def test_magnitude_is_that_of_the_last_weights():
    model = chain(3)
    for rated in rate_blocks(model):
        kernel = np.asarray(model.get_layer(f"down{rated.name[-1]}").kernel)
        assert rated.importance == pytest.approx(np.sqrt((kernel**2).sum() / 8), rel=1e-6)
    network = resnet()
    for rated in rate_blocks(network):
        gamma = np.asarray(network.get_layer(rated.blocks[0].layers[-1]).gamma)
        assert rated.importance == pytest.approx(np.sqrt((gamma**2).mean()), rel=1e-6)


@pytest.mark.parametrize("criterion", ["output", "similarity", "magnitude"])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_block_that_does_next_to_nothing_goes_first(criterion, greedy):
    model = chain(5)
    for number, factor in ((3, 1e-4), (1, 1e-2)):
        layer = model.get_layer(f"down{number}")
        layer.kernel.assign(np.asarray(layer.kernel) * factor)
        layer.bias.assign(np.zeros(8))
    data = None if criterion == "magnitude" else samples(model, 40)
    shallow = drop_blocks(model, 2, data=data, criterion=criterion, greedy=greedy)
    assert [each.name for each in shallow.depth.dropped] == ["add3", "add1"]
    assert [each.name for each in shallow.depth.kept] != []


def test_a_criterion_can_be_a_function():
    model = chain(3)
    largest = drop_blocks(model, 1, data=samples(model, 9), criterion=lambda p, q: -float(np.abs(p[0] - q[0]).max()))
    rated = rate_blocks(model, data=samples(model, 9), criterion=lambda p, q: float(np.abs(p[0] - q[0]).max()))
    assert largest.depth.dropped[0].name == rated[-1].name


def test_what_pins_a_block_is_said():
    inputs = keras.Input((8,))
    x = L.Dense(8, name="first")(inputs)
    y = L.Dense(8, name="inner")(x)
    z = L.Add(name="leaks")([x, y])
    w = L.Add(name="around")([z, L.Dense(8, name="late")(L.Concatenate()([z, x]))])
    model = keras.Model(inputs, [w, y])
    found = {block.name: block.pinned for block in residual_blocks(model)}
    assert found["leaks"] == "what `inner` makes inside of it is used outside of it as well"
    assert "also takes what `first` makes" in found["around"]
    with pytest.raises(
        dw.UnsupportedModelError, match=r"no residual block to leave out; `leaks` can't go: what `inner`"
    ):
        drop_blocks(model, 1)


def test_a_mask_may_enter_the_branch():
    inputs, mask = keras.Input((6, 8), name="tokens"), keras.Input((6,), name="mask", dtype="bool")
    x = L.Dense(8)(inputs)
    x = L.Add(name="attended")(
        [x, L.MultiHeadAttention(2, 4, name="mha")(x, x, attention_mask=L.Reshape((1, 6))(mask))]
    )
    model = keras.Model([inputs, mask], L.Dense(2)(x))
    assert [block.pinned for block in residual_blocks(model)] == [""]
    shallow = drop_blocks(model, 1)
    assert [t.name for t in shallow.inputs] == ["tokens", "mask"]


@pytest.mark.parametrize("name", [name for name in ZOO if name != "subclassed"])
def test_the_zoo_is_cut_exactly_or_says_that_it_has_no_block(name):
    model = settle(ZOO[name]())
    free = [block for block in residual_blocks(model) if not block.pinned]
    if not free:
        with pytest.raises(dw.UnsupportedModelError, match="no residual block"):
            drop_blocks(model, 1)
        return
    x = samples(model, 5)
    shallow = drop_blocks(model, len(free), data=x)
    assert_same(outputs(shallow, x), outputs(times_zero(model, free), x))


def test_the_zoo_has_blocks():
    counts = {
        name: len([b for b in residual_blocks(build()) if not b.pinned])
        for name, build in ZOO.items()
        if name != "subclassed"
    }
    assert {name for name, count in counts.items() if count} == {
        "residual", "attention", "inverted_residual", "transformer", "token_classifier"}  # fmt: skip


def test_lifted_models_lose_blocks_too():
    model = resnet()
    lifted = dw.lift(model)
    x = samples(model, 6)
    shallow = drop_blocks(lifted, 3, data=x)
    assert_same(outputs(shallow, x), outputs(drop_blocks(model, 3), x))


def test_the_result_trains_saves_and_exports(tmp_path):
    model = transformer()
    x, y = samples(model, 64), np.zeros((64, 4), np.float32)
    shallow = drop_blocks(model, 2, data=x, unit="layer")
    shallow.compile("adam", "mse")
    losses = shallow.fit(x[0], y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    shallow.save(tmp_path / "s.keras")
    assert_same(outputs(dw.load(tmp_path / "s.keras"), x), outputs(shallow, x))
    sizes = [dw.export(m, tmp_path / "m.tflite").size_bytes for m in (shallow, model)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, r"`count` is 0; .*at least 1"),
        ({"count": 1.5}, r"`count` is 1.5"),
        ({"count": 9}, r"`count` is 9, but there are 4 blocks"),
        ({"fraction": 0.0}, r"`fraction` is 0.0; .*\(0, 1\]"),
        ({"fraction": 0.5, "count": 1}, r"both given"),
        ({}, r"all left out"),
        ({"count": 1, "criterion": "output"}, r"'output', which needs data"),
        ({"count": 1, "criterion": "similarty"}, r"did you mean `similarity`"),
        ({"count": 1, "unit": "stage"}, r"`unit` is 'stage'"),
        ({"layers": "sub*"}, r"'sub\*', which matches none"),
        ({"count": 1, "samples": 0}, r"`samples` is 0"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        drop_blocks(chain(), **arguments)


def test_prune_takes_depth_as_a_structure():
    model = chain(4)
    x = samples(model, 20)
    for arguments in ({"sparsity": 0.5}, {"count": 2}, {}):
        made = dw.prune(model, structure="depth", criterion="output", data=x, **arguments)
        assert_same(outputs(made, x), outputs(drop_blocks(model, 2, data=x), x))
    assert len(dw.prune(model, structure="depth", layers="add1").depth.dropped) == 1
    for arguments, message in (
        ({"l1": 0.1}, "`l1` acts on weights"),
        ({"sparsity": 1.0}, r"`sparsity` is 1.0; .*share of the blocks"),
        ({"cuont": 1}, "`cuont` is no option .*did you mean `count`"),
        ({"sparsity": 0.5, "count": 1}, "both given"),
    ):
        with pytest.raises(dw.ConfigError, match=message):
            dw.prune(model, structure="depth", **arguments)
