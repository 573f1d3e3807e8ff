"""Graphs beside the zoo: operations that nothing knows, contractions, sharing; each cut exactly or pinned with a reason."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from pruning_reference import difference
from zoo import samples, settle

from dwindle.pruning import ChannelOptions, groups, plan_channels

L, ops = keras.layers, keras.ops
GRAPHS = {}


def graph(function):
    GRAPHS[function.__name__] = function
    return function


def head(inputs, x):
    return keras.Model(inputs, L.Dense(3, name="head")(L.Flatten()(x)))


@graph
def fixed_batch():
    inputs = keras.Input(batch_shape=(4, 8, 8, 3))
    return head(inputs, L.Dense(6)(ops.reshape(L.Conv2D(8, 3, padding="same")(inputs), (4, 64, 8))))


@graph
def constants_in_operations():
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(8, 3)(inputs) * np.arange(1, 9).astype(np.float32) + 1.0
    return head(inputs, L.Conv2D(6, 3)(x) / 2.0)


@graph
def attention_of_operations():
    inputs = keras.Input((6, 8))
    q, k, v = (ops.transpose(ops.reshape(L.Dense(12)(inputs), (-1, 6, 3, 4)), (0, 2, 1, 3)) for _ in range(3))
    scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / 2.0)
    return head(inputs, L.Dense(8)(ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, 6, 12))))


@graph
def grouped_query_attention():
    inputs = keras.Input((6, 8))
    x = L.Dense(16)(inputs)
    return head(inputs, L.RMSNormalization()(x + L.GroupQueryAttention(4, 4, 2)(x, x)))


@graph
def attention_without_weights():
    inputs = keras.Input((5, 6))
    return head(inputs, L.Attention()([L.Dense(8)(inputs), L.Dense(7)(inputs), L.Dense(8)(inputs)]))


@graph
def dot_product():
    left, right = keras.Input((6,)), keras.Input((7,))
    return keras.Model([left, right], L.Dot(1)([L.Dense(8)(left), L.Dense(8)(right)]))


@graph
def pixel_shuffle():
    inputs = keras.Input((4, 4, 3))
    x = ops.reshape(L.Conv2D(16, 3, padding="same")(inputs), (-1, 4, 4, 2, 2, 4))
    return head(inputs, ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 8, 8, 4)))


@graph
def shuffle_net():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 1)(inputs)
    a, b = x[..., :4], x[..., 4:]
    b = L.Conv2D(4, 1)(L.DepthwiseConv2D(3, padding="same")(L.Conv2D(4, 1, activation="relu")(b)))
    x = L.Permute((1, 2, 4, 3))(L.Reshape((8, 8, 2, 4))(L.Concatenate()([a, b])))
    return head(inputs, L.Conv2D(6, 3)(L.Reshape((8, 8, 8))(x)))


@graph
def maxout():
    inputs = keras.Input((6,))
    return head(inputs, ops.max(ops.reshape(L.Dense(12)(inputs), (-1, 4, 3)), axis=-1))


@graph
def gated_halves():
    inputs = keras.Input((6,))
    a, b = ops.split(L.Dense(12)(inputs), 2, axis=-1)
    return head(inputs, a * ops.sigmoid(b))


@graph
def padded_shortcut():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, padding="same")(inputs)
    return head(inputs, L.Conv2D(8, 3, padding="same", name="wide")(x) + ops.pad(x, ((0, 0), (0, 0), (0, 0), (2, 2))))


@graph
def stacked():
    inputs = keras.Input((6,))
    return head(inputs, L.LSTM(4)(ops.stack([L.Dense(8)(inputs), L.Dense(8)(inputs)], axis=1)))


@graph
def states_handed_on():
    first, second = keras.Input((5, 6)), keras.Input((4, 6))
    _, *state = L.LSTM(8, return_sequences=True, return_state=True)(first)
    return head([first, second], L.LSTM(8, return_sequences=True)(second, initial_state=state))


@graph
def nested_twice_with_a_reshape():
    inner = keras.Input((4, 4, 6))
    block = keras.Model(inner, L.Reshape((16, 6))(inner), name="block")
    inputs = keras.Input((4, 4, 3))
    return head(inputs, L.Concatenate()([block(L.Conv2D(6, 1)(inputs)), block(L.Conv2D(6, 1)(inputs))]))


@graph
def nested_residual_shared():
    inner = keras.Input((8, 8, 6))
    block = keras.Model(inner, L.Add()([inner, L.Conv2D(6, 3, padding="same", activation="relu")(inner)]), name="block")
    inputs = keras.Input((8, 8, 3))
    tail = keras.Sequential([L.Flatten(), L.Dense(5)], name="tail")
    return head(inputs, tail(block(block(L.Conv2D(6, 1)(inputs)))))


@graph
def normalization_shared():
    inputs = keras.Input((6,))
    norm = L.BatchNormalization()
    return head(inputs, L.Concatenate()([norm(L.Dense(8)(inputs)), norm(L.Dense(8)(inputs))]))


@graph
def convolution_at_every_step():
    inputs = keras.Input((3, 8, 8, 3))
    x = L.TimeDistributed(L.BatchNormalization())(L.TimeDistributed(L.Conv2D(4, 3))(inputs))
    return head(inputs, L.TimeDistributed(L.GlobalAveragePooling2D())(x))


@graph
def channels_first():
    inputs = keras.Input((3, 8, 8))
    x = L.Dense(8)(L.Flatten()(L.Permute((3, 1, 2))(L.Conv2D(6, 3)(L.Permute((2, 3, 1))(inputs)))))
    return head(inputs, x)


@graph
def masked_tokens():
    tokens = keras.Input((5,), dtype="int32")
    return head(tokens, L.GRU(6)(L.Embedding(20, 8, mask_zero=True)(tokens)))


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_removing_is_masking(name):
    model = settle(GRAPHS[name]())
    found = groups(model)
    assert {name for names in found.pinned.values() for name in names} <= {"head", "wide"}
    for sparsity in (0.3, 0.6):
        plan = plan_channels(model, ChannelOptions(sparsity=sparsity, criterion="random"))
        assert plan.parameters[1] < plan.parameters[0]
        assert difference(plan, samples(model, 4)) < 1e-5


def test_heads_of_an_attention_made_of_operations_go_as_wholes_or_as_widths_but_regularly():
    keras.backend.clear_session()
    found = groups(attention_of_operations())
    sizes = sorted((group.size, group.width) for group in found if group.pinned is None)
    assert sizes in ([(3, 4), (8, 1)], [(4, 3), (4, 3), (8, 1)])


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: ops.cumsum(x, axis=-1), "`cumsum` (Cumsum) mixes them"),
        (lambda x: x * ops.one_hot(ops.argmax(x, axis=-1), 8), "`argmax` (Argmax) mixes them"),
        (lambda x: ops.mean(x, axis=-1, keepdims=True), "`mean` (Mean) mixes them"),
        (lambda x: L.Softmax()(x), "(Softmax) mixes them"),
        (lambda x: ops.roll(x, 1, axis=-1)[..., ::3], "(GetItem) mixes them"),
        (lambda x: L.SpectralNormalization(L.Dense(4), name="s")(x), "layer `s` (SpectralNormalization) is not known"),
        (lambda x: L.Lambda(lambda y: y * 2, name="l")(x), "`l` (Lambda) can't be tried"),
    ],
)
def test_what_mixes_channels_pins_them_and_says_so(operation, reason):
    keras.backend.clear_session()
    inputs = keras.Input((6,))
    pinned = groups(head(inputs, operation(L.Dense(8, name="made")(inputs)))).pinned
    assert any(reason in text and "made" in names for text, names in pinned.items())


def test_open_image_sizes_are_analysed():
    inputs = keras.Input((None, None, 3))
    x = L.UpSampling2D()(L.MaxPooling2D()(L.Conv2D(8, 3, padding="same")(inputs)))
    model = keras.Model(inputs, L.Dense(3, name="head")(L.GlobalAveragePooling2D()(L.Conv2D(6, 3)(x))))
    plan = plan_channels(model, ChannelOptions(sparsity=0.5))
    assert [group.size for group in plan.groups if group.pinned is None] == [8, 6]
    assert difference(plan, [np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)]) < 1e-5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_lower_precision_is_analysed_like_full(policy):
    def build(dtype):
        inputs = keras.Input((8, 8, 3))
        x = L.Conv2D(8, 3, padding="same", activation="relu", dtype=dtype)(inputs)
        x = L.Add(dtype=dtype)(
            [x, L.AveragePooling2D(3, 1, padding="same", dtype=dtype)(L.Conv2D(8, 1, dtype=dtype)(x))]
        )
        x = L.Activation("softplus", dtype=dtype)(L.Concatenate(dtype=dtype)([x, L.Conv2D(5, 1, dtype=dtype)(x)]))
        return keras.Model(inputs, L.Dense(3, name="head")(L.GlobalAveragePooling2D(dtype=dtype)(x)))

    low, full = groups(build(policy)), groups(build("float32"))
    assert [(group.size, group.pinned) for group in low] == [(group.size, group.pinned) for group in full]
    assert [group.size for group in low if group.pinned is None] == [8, 5]
    small = plan_channels(build(policy), ChannelOptions(sparsity=0.5)).apply()
    assert small.layers[1].compute_dtype == policy.removeprefix("mixed_")


def test_samples_on_another_axis_pin_what_would_have_to_be_tried():
    inputs = keras.Input((5, 6))
    x = ops.transpose(L.Dense(8, name="first")(inputs), (1, 0, 2))
    x = L.Add()([x, L.Dense(8, name="second")(L.Dense(12, activation="gelu", name="hidden")(x))])
    model = settle(head(inputs, ops.transpose(ops.reshape(x, (5, -1, 2, 4)), (1, 0, 2, 3))))
    plan = plan_channels(model, ChannelOptions(sparsity=0.5, criterion="random"))
    reasons = " ".join(plan.groups.pinned)
    assert "has samples on another axis than the first" in reasons
    pinned = {name for names in plan.groups.pinned.values() for name in names}
    assert {"first", "second"} <= pinned
    assert "hidden" not in pinned
    assert plan.parameters[1] < plan.parameters[0]
    assert difference(plan, [np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)]) < 1e-5
