"""Smaller twins: shapes, what they start from, and that they learn from their teacher."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import small_cnn
from zoo import ZOO, outputs, samples, settle

import dwindle as dw

L = keras.layers
# No channel of these can go: layers shared by tensors of their own width, or heads of one channel.
FIXED = {"shared_layer", "shared_convolution", "attention_pooling", "subclassed"}


def test_shrinking_keeps_inputs_outputs_and_halves_widths():
    twin = dw.shrink(small_cnn(), width=0.5)
    assert twin.get_layer("conv").filters == 4
    assert twin.get_layer("hidden").units == 16
    assert twin.get_layer("digit").units == 10
    assert twin.output_shape == (None, 10)
    again = dw.shrink(small_cnn(), width=0.5)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(twin.variables, again.variables, strict=True))


def test_shrinking_a_residual_network_fits_together():
    model = ZOO["residual"]()
    twin = dw.shrink(model, width=0.5)
    assert twin.count_params() < model.count_params() / 2
    assert twin.output_shape == model.output_shape


@pytest.mark.parametrize("name", [name for name in ZOO if name not in FIXED])
def test_every_model_has_a_smaller_twin(name):
    model = ZOO[name]()
    before = [v.numpy().copy() for v in model.variables]
    twin = dw.shrink(model, width=0.5)
    assert twin.count_params() < model.count_params()
    assert [t.shape for t in twin.outputs] == [t.shape for t in model.outputs]
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.variables, strict=True))
    outputs(twin, samples(model, 2))


@pytest.mark.parametrize("name", sorted(FIXED - {"subclassed"}))
def test_what_can_not_be_narrower_says_why(name):
    with pytest.raises(dw.UnsupportedModelError, match=r"0\.5 as wide"):
        dw.shrink(ZOO[name](), width=0.5)


@pytest.mark.parametrize("name", ["conv_bn_relu", "residual", "transformer", "lstm", "inverted_residual"])
def test_a_start_from_the_teacher_is_its_channels_that_matter_most(name):
    model = settle(ZOO[name]())
    twin = dw.shrink(model, width=0.5, start="teacher")
    cut = dw.prune(model, 0.5, structure="channel", criterion="l2")
    x = samples(model, 3)
    for a, b in zip(outputs(twin, x), outputs(cut, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_width_1_with_a_random_start_is_an_untrained_twin(trained):
    twin = dw.shrink(trained, width=1, seed=5)
    assert [v.shape for v in twin.variables] == [v.shape for v in trained.variables]
    kernels = [model.get_layer("hidden").kernel.numpy() for model in (trained, twin)]
    assert np.abs(np.corrcoef(kernels[0].ravel(), kernels[1].ravel())[0, 1]) < 0.1


def test_shallower():
    inputs = keras.Input((5,))
    x = L.Dense(8, name="stem")(inputs)
    for number in range(4):
        x = L.Add()([x, L.Dense(8, activation="relu", name=f"block{number}")(x)])
    model = keras.Model(inputs, L.Dense(3, name="top")(x))
    for number in range(4):
        model.get_layer(f"block{number}").kernel.assign(np.eye(8) * (1 + number))
    twin = dw.shrink(model, width=1, depth=0.5, start="teacher")
    assert [layer.name for layer in twin.layers if isinstance(layer, L.Dense)] == ["stem", "block2", "block3", "top"]
    np.testing.assert_array_equal(twin.get_layer("top").kernel.numpy(), model.get_layer("top").kernel.numpy())
    both = dw.shrink(model, width=0.5, depth=0.5)
    assert both.count_params() < twin.count_params()


def test_smaller_images(trained, digits):
    twin = dw.shrink(trained, width=1, input_size=14, start="teacher")
    assert twin.input_shape == (None, 14, 14, 1)
    np.testing.assert_array_equal(twin.get_layer("conv").kernel.numpy(), trained.get_layer("conv").kernel.numpy())
    assert twin.notes == ("hidden starts from new weights: its shape depends on the size of the input",)
    (x, y), (x_test, y_test) = digits
    coach = dw.distill(twin, trained, alpha=0.5)
    coach.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    coach.fit(x[:1500], y[:1500], epochs=3, verbose=0)
    big = coach.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    small = np.asarray(keras.ops.image.resize(x_test, (14, 14), "bilinear", antialias=True))
    assert (twin.predict(small, verbose=0).argmax(1) == y_test).mean() == pytest.approx(big)
    assert big > 0.7


def test_statistics_of_preprocessing_stay():
    model = keras.Sequential([keras.Input((4,)), L.Normalization(name="scale"), L.Dense(8), L.Dense(2)])
    model.get_layer("scale").adapt(np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32))
    twin = dw.shrink(model, width=0.5)
    x = samples(model, 5)[0]
    np.testing.assert_array_equal(model.get_layer("scale")(x), twin.get_layer("scale")(x))


def test_masks_of_the_model_do_not_bind_its_twin(trained):
    twin = dw.shrink(dw.prune(trained, 0.9), width=0.5)
    assert all((kernel != 0).all() for kernel in (twin.get_layer("hidden").kernel.numpy(),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 2}, "`width` is 2"),
        ({"depth": 0}, "`depth` is 0"),
        ({"start": "techer"}, "did you mean `teacher`"),
        ({"input_size": (0, 3)}, r"`input_size` is \(0, 3\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(dw.ConfigError, match=message):
        dw.shrink(small_cnn(), **arguments)


def test_what_does_not_fit():
    with pytest.raises(dw.ConfigError, match="`input_size` is for a model of one image input"):
        dw.shrink(ZOO["mlp"](), input_size=8)
    with pytest.raises(dw.UnsupportedModelError, match="no residual block to leave out"):
        dw.shrink(small_cnn(), depth=0.5)
