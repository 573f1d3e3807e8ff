"""Channels: removal against masking for the whole zoo, targets, rounding, reasons, and bad input."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from pruning_reference import difference
from zoo import ZOO, samples, settle
from zoo import outputs as zoo_outputs

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.measuring.latency import compare_latency
from dwindle.pruning import ChannelOptions, groups, plan_channels, prune_channels
from dwindle.pruning.channel_latency import _bisected

L = keras.layers
#: Models in which every channel is needed, and the reason that is given.
PINNED = {
    "custom_layer": "layer `doubling` (Doubling) is not known",
    "shared_layer": "`shared` is shared by tensors that can't be cut alike",
    "shared_convolution": "is shared by tensors that can't be cut alike",
    "attention_pooling": "output",
}
SUBCLASSED = {"subclassed"}


def planned(model, **options):
    return plan_channels(model, ChannelOptions(**options))


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(PINNED) - SUBCLASSED))
def test_removing_is_masking_for_the_whole_zoo(name):
    model = settle(ZOO[name]())
    before = [variable.numpy() for variable in model.variables]
    for sparsity in (0.3, 0.6):
        plan = planned(model, sparsity=sparsity, criterion="random")
        assert plan.parameters[1] < plan.parameters[0]
        assert difference(plan, samples(model, 4)) < 1e-5
        small = plan.apply()
        assert small.count_params() == plan.parameters[1]
        assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]
        assert type(small) is type(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_models_in_which_every_channel_is_needed_say_why(name):
    keras.backend.clear_session()
    with pytest.raises(dw.UnsupportedModelError, match="no channels that can be cut") as error:
        prune_channels(ZOO[name](), 0.5)
    assert PINNED[name] in str(error.value)


@pytest.mark.parametrize("name", ["residual", "unet", "attention", "gru", "squeeze_excite"])
def test_lifted_models_are_cut_and_can_be_exported(name, tmp_path):
    model = dw.lift(settle(ZOO[name]()))
    plan = planned(model, sparsity=0.4, criterion="random")
    assert plan.parameters[1] < plan.parameters[0]
    assert difference(plan, samples(model, 4)) < 1e-5
    small = plan.apply()
    assert type(small) is not type(model)
    values = [zoo_outputs(twin, samples(model, 4)) for twin in (plan.model, model)]
    np.testing.assert_allclose(values[0][0], values[1][0], atol=1e-6)
    dw.export(small, tmp_path / "small.tflite")


def test_frozen_layers_and_settings_stay_as_they_were():
    model = ZOO["residual"]()
    model.layers[1].trainable = False
    small = prune_channels(model, 0.5)
    assert [layer.trainable for layer in small.layers] == [layer.trainable for layer in model.layers]
    assert [str(layer.dtype_policy) for layer in small.layers] == [str(layer.dtype_policy) for layer in model.layers]
    assert len(small.trainable_variables) == len(model.trainable_variables)


def test_a_cut_model_trains_saves_and_loads(tmp_path):
    model = settle(ZOO["residual"]())
    small = dw.prune(model, 0.5, structure="channel")
    small.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    x, y = samples(model, 32)[0], np.arange(32) % 4
    losses = small.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    small.save(tmp_path / "small.keras")
    np.testing.assert_allclose(
        dw.load(tmp_path / "small.keras").predict(x, verbose=0), small.predict(x, verbose=0), atol=1e-6
    )


def test_the_smallest_filters_go_and_what_is_kept_is_kept():
    model = keras.Sequential([keras.Input((5, 5, 2)), L.Conv2D(4, 3, name="a"), L.Flatten(), L.Dense(3, name="b")])
    conv, dense = model.layers[0], model.layers[2]
    scale = np.array([1.0, 0.1, 2.0, 0.2])
    conv.kernel.assign(np.ones((3, 3, 2, 4)) * scale)
    conv.bias.assign([1, 2, 3, 4])
    dense.kernel.assign(np.tile(scale, 9)[:, None] * np.ones((36, 3)))
    small = prune_channels(model, 0.5)
    np.testing.assert_array_equal(small.layers[0].bias.numpy(), [1, 3])
    np.testing.assert_array_equal(small.layers[0].kernel.numpy(), conv.kernel.numpy()[..., [0, 2]])
    np.testing.assert_array_equal(
        small.layers[2].kernel.numpy(), dense.kernel.numpy().reshape(9, 4, 3)[:, [0, 2]].reshape(18, 3)
    )
    assert small.notes == ("b stays: output `b` of the model",)


def test_groups_of_a_residual_block_by_hand():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(6, 3, padding="same", name="first")(inputs)
    y = L.BatchNormalization(name="norm")(L.Conv2D(6, 3, padding="same", name="inner")(x))
    out = L.Dense(2, name="head")(L.GlobalAveragePooling2D()(L.Add()([x, y])))
    found = groups(keras.Model(inputs, out))
    stream = next(group for group in found if "first" in group.producers)
    assert set(stream.producers) == {"first", "inner"}
    assert set(stream.consumers) == {"inner", "head"}
    assert stream.size == 6
    assert {(m.layer, m.weight, m.axis) for m in stream.members} >= {
        ("first", "kernel", 3), ("first", "bias", 0), ("inner", "kernel", 2), ("inner", "kernel", 3), ("norm", "gamma", 0),
        ("norm", "moving_variance", 0), ("head", "kernel", 0),
    }  # fmt: skip
    # 3x3x3 + bias; 3x3x6 twice for what comes in and goes out; bias and four of the norm; two outputs
    assert stream.parameters == 6 * (27 + 1) + 9 * 36 + 6 + 24 + 12
    assert found.macs == 64 * 9 * 3 * 6 + 64 * 9 * 36 + 12
    assert "first + inner -> inner + head" in str(found)
    assert found.pinned == {"output `head` of the model": ["head"]}


def test_flattened_shuffled_and_split_channels_are_followed():
    inputs = keras.Input((4, 4, 3))
    x = L.Conv2D(8, 1, name="made")(inputs)
    a, b = keras.ops.split(x, 2, axis=-1)
    x = L.Concatenate()([b * 2.0, a[..., ::1]])
    x = keras.ops.transpose(keras.ops.reshape(x, (-1, 16, 8)), (0, 2, 1))
    model = keras.Model(inputs, L.Dense(2, name="head")(L.Flatten()(x[:, 2:, :])))
    plan = planned(settle(model), sparsity=0.4, criterion="random")
    made = [group for group in plan.groups if "made" in group.producers]
    assert sum(group.size for group in made) == 8
    assert all(group.pinned is None for group in made)
    assert difference(plan, samples(model, 4)) < 1e-5


def test_embedding_width_heads_and_hidden_units_of_a_transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = L.Embedding(20, 16, name="table")(tokens)
    for number in range(2):
        y = L.LayerNormalization(name=f"norm{number}")(x)
        x = L.Add()([x, L.MultiHeadAttention(4, 4, name=f"attention{number}")(y, y)])
        y = L.LayerNormalization(name=f"other{number}")(x)
        x = L.Add()([x, L.Dense(16, name=f"down{number}")(L.Dense(32, activation="gelu", name=f"up{number}")(y))])
    model = settle(keras.Model(tokens, L.Dense(3, name="head")(L.GlobalAveragePooling1D()(x))))
    plan = planned(model, sparsity=0.5, criterion="random")
    small = plan.apply()
    assert small.get_layer("table").output_dim == 8
    assert small.get_layer("attention1").num_heads == 2
    assert small.get_layer("attention1").key_dim == 4
    assert small.get_layer("up0").units == 16
    assert small.output_shape == (None, 3)
    assert difference(plan, samples(model, 4)) < 1e-5


def test_grouped_and_gated_layers_stay_regular():
    inputs = keras.Input((8, 8, 4))
    x = L.Conv2D(12, 1, name="wide")(inputs)
    x = L.Conv2D(12, 3, groups=12, padding="same", name="each")(x)
    x = L.Conv2D(12, 3, groups=3, padding="same", name="thirds")(x)
    model = settle(keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling2D()(x))))
    plan = planned(model, sparsity=0.5, criterion="random")
    small = plan.apply()
    assert (small.get_layer("thirds").filters, small.get_layer("thirds").groups) == (6, 3)
    assert small.get_layer("each").groups == small.get_layer("each").filters == small.get_layer("wide").filters == 6
    assert difference(plan, samples(model, 4)) < 1e-5


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("target", ["parameters", "macs"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_targets_are_met_within_three_percent(scope, target, sparsity):
    inputs = keras.Input((16, 16, 3))
    x = inputs
    for width in (24, 32, 48):
        x = L.ReLU()(L.BatchNormalization()(L.Conv2D(width, 3, padding="same", strides=2)(x)))
    model = keras.Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))
    plan = planned(model, sparsity=sparsity, scope=scope, target=target)
    before, after = getattr(plan, target)
    assert abs(after / before - (1 - sparsity)) < 0.03
    assert plan.apply().count_params() == plan.parameters[1]


def test_counts_are_rounded_to_a_multiple_and_never_below_the_minimum():
    model = keras.Sequential(
        [keras.Input((9,)), L.Dense(30, name="a"), L.Dense(7, name="b"), L.Dense(12, name="c"), L.Dense(2, name="d")]
    )
    small = prune_channels(model, 0.6, multiple=8)
    assert [layer.units for layer in small.layers] == [16, 7, 8, 2]
    small = prune_channels(model, 0.9, minimum=5)
    assert [layer.units for layer in small.layers] == [5, 5, 5, 2]
    small = prune_channels(model, 0.99)
    assert [layer.units for layer in small.layers] == [1, 1, 1, 2]


def test_layers_are_chosen_and_excluded_by_pattern():
    model = keras.Sequential(
        [keras.Input((9,)), L.Dense(8, name="a1"), L.Dense(8, name="a2"), L.Dense(8, name="b"), L.Dense(2, name="d")]
    )
    units = lambda **options: [layer.units for layer in prune_channels(model, 0.5, **options).layers]  # noqa: E731
    assert units(layers="a*") == [4, 4, 8, 2]
    assert units(exclude=["a1", "b"]) == [8, 4, 8, 2]
    assert "a1 stays: `exclude` has a1" in prune_channels(model, 0.5, exclude="a1").notes
    with pytest.raises(dw.ConfigError, match=r"`layers` has 'c\*', which matches none"):
        prune_channels(model, 0.5, layers="c*")
    with pytest.raises(dw.ConfigError, match=r"`exclude` has 'c', which matches none"):
        prune_channels(model, 0.5, exclude="c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` is 1.0; .*\[0, 1\)"),
        ({"sparsity": -0.1}, r"`sparsity` is -0.1"),
        ({"criterion": "fischer"}, r"`criterion` is 'fischer'.*did you mean `fisher`"),
        ({"scope": "model"}, r"`scope` is 'model'"),
        ({"target": "mac"}, r"`target` is 'mac'.*did you mean `macs`"),
        ({"multiple": 0}, r"`multiple` is 0"),
        ({"minimum": 1.5}, r"`minimum` is 1.5"),
        ({"max_latency_ms": 0}, r"`max_latency_ms` is 0"),
        ({"multiples": 8}, r"`option` is 'multiples'.*did you mean `multiple`"),
        ({"criterion": "taylor"}, r"`data` is None, and `criterion` 'taylor' needs labelled samples"),
        ({"schedule": dw.Constant()}, r"`schedule` and `l1` act on single weights"),
        ({"sparsity": 0.95, "target": "parameters", "exclude": "dense"}, r"at most 3\d\.\d% can go: .*dense"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    keras.backend.clear_session()
    with pytest.raises(dw.ConfigError, match=message):
        dw.prune(ZOO["mlp"](), structure="channel", **{"sparsity": 0.5, **arguments})


def test_models_that_cannot_be_pruned_say_why():
    with pytest.raises(dw.ConfigError, match="not built"):
        prune_channels(keras.Sequential([L.Dense(3)]), 0.5)
    with pytest.raises(dw.UnsupportedModelError, match="subclassed"):
        prune_channels(ZOO["subclassed"](), 0.5)
    with pytest.raises(dw.UnsupportedModelError, match=r"dw\.finalize"):
        prune_channels(dw.prune(ZOO["mlp"](), 0.5), 0.5)
    with pytest.raises(dw.ConfigError, match="`multiple` is an option of `structure` 'channel'"):
        dw.prune(ZOO["mlp"](), 0.5, multiple=8)


def test_the_file_takes_the_time_that_was_asked_for():
    inputs = keras.Input((32, 32, 3))
    x = inputs
    for width in (32, 64, 64):
        x = L.Conv2D(width, 3, padding="same", activation="relu")(x)
    model = keras.Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))
    plan = planned(model, sparsity=0.5, target="latency")
    before, after = plan.latency_ms
    assert after <= 0.5 * before
    # Measured once more, both files in turns; wide, because what else the machine does comes in too.
    base, now = compare_latency([float_file(model), float_file(plan.apply())], seconds=1.0)
    assert now.p50_ms / base.p50_ms == pytest.approx(0.5, rel=0.4)
    with pytest.raises(dw.ConfigError, match="`max_latency_ms` is 1e-05; the smallest model"):
        planned(model, max_latency_ms=1e-5)


@pytest.mark.parametrize("limit", [100.0, 63.2, 20.0, 1.0])
def test_the_bisection_ends_near_the_time_allowed(limit):
    """Against times that are known: 100 channels at 1 ms each above 1 ms."""
    measured = []

    def taken(count):
        measured.append(count)
        return 101.0 - count

    count, time = _bisected(taken, 100, limit)
    assert time == taken(count) <= limit
    assert time >= 0.95 * limit or taken(count - 1) > limit
    assert len(measured) <= 14
    assert _bisected(taken, 50, 40.0) == (None, 51.0)


def test_balanced_widths_are_near_the_best_that_there_are():
    """Against all widths of a small network whose channels matter alike: the sum of inverse widths is minimal."""
    sizes = (12, 16, 40)
    layers = [L.Dense(size, name=f"d{size}", kernel_initializer="ones") for size in sizes]
    model = keras.Sequential([keras.Input((3,)), *layers, L.Dense(2, kernel_initializer="ones")])

    def parameters(a, b, c):
        return 4 * a + (a + 1) * b + (b + 1) * c + 2 * (c + 1)

    def penalty(widths):
        return sum(size / width for size, width in zip(sizes, widths, strict=True))

    allowed = parameters(*sizes) // 4
    every = [w for w in itertools.product(*(range(1, size + 1) for size in sizes)) if parameters(*w) <= allowed]
    best = min(map(penalty, every))
    evenly = max((w for w in every if w == tuple(round(s * w[0] / 12) for s in sizes)), key=lambda w: w[0])
    options = {"sparsity": 1 - allowed / parameters(*sizes), "structure": "channel", "target": "parameters"}
    small = dw.prune(model, **options, scope="balanced")
    found = tuple(small.get_layer(f"d{size}").units for size in sizes)
    assert small.count_params() == parameters(*found) == pytest.approx(allowed, rel=0.05)
    assert penalty(found) < 1.05 * best < 0.95 * penalty(evenly)


def test_balanced_by_work_keeps_the_channels_of_small_maps():
    inputs = keras.Input((32, 32, 3))
    x = L.Conv2D(32, 3, name="large_maps")(inputs)
    x = L.Conv2D(32, 3, strides=4, name="middle")(x)
    x = L.Flatten()(x)
    model = keras.Model(inputs, L.Dense(3)(L.Dense(64, name="dense")(x)))
    left = {}
    for target in ("macs", "parameters"):
        plan = planned(model, sparsity=0.7, scope="balanced", target=target)
        small = plan.apply()
        left[target] = (small.get_layer("large_maps").filters, small.get_layer("dense").units)
        before, after = getattr(plan, target)
        assert after == pytest.approx(0.3 * before, rel=0.05)
    assert left["macs"][0] < left["parameters"][0]
    assert left["macs"][1] > left["parameters"][1]
