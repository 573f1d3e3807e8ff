"""Small models of every kind that users bring. Each function returns a built, untrained Keras model."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

L = keras.layers
ZOO: dict[str, Callable[[], keras.Model]] = {}


def entry(function: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    ZOO[function.__name__] = function
    return function


def _conv_bn(x, filters, *, strides=1, size=3, relu=True):
    x = L.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
    x = L.BatchNormalization()(x)
    return L.ReLU()(x) if relu else x


@entry
def mlp():
    return keras.Sequential(
        [
            keras.Input((12,)),
            L.Dense(16, activation="relu"),
            L.Dense(8, activation="tanh"),
            L.Dense(4, activation="softmax"),
        ]
    )


@entry
def conv_bn_relu():
    x = inputs = keras.Input((12, 12, 3))
    x = _conv_bn(x, 8)
    x = L.MaxPooling2D()(x)
    x = _conv_bn(x, 8, strides=2)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def residual():
    inputs = keras.Input((12, 12, 3))
    x = _conv_bn(inputs, 8)
    y = _conv_bn(_conv_bn(x, 8), 8, relu=False)
    x = L.ReLU()(L.Add()([x, y]))
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.GlobalAveragePooling2D()(x)))


@entry
def concat():
    inputs = keras.Input((12, 12, 3))
    x = L.Concatenate()([L.Conv2D(4, 3, padding="same", activation="relu")(inputs), L.Conv2D(4, 1)(inputs)])
    x = L.AveragePooling2D(2)(x)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def depthwise():
    inputs = keras.Input((12, 12, 3))
    x = L.ZeroPadding2D(1)(inputs)
    x = L.DepthwiseConv2D(3, depth_multiplier=2)(x)
    x = L.BatchNormalization()(x)
    x = L.ReLU(6.0)(x)
    x = L.SeparableConv2D(8, 3, strides=2)(x)
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.GlobalMaxPooling2D()(x)))


@entry
def grouped():
    inputs = keras.Input((12, 12, 4))
    x = L.Conv2D(8, 3, groups=2, activation="relu")(inputs)
    x = L.Conv2D(8, 3, dilation_rate=2, activation="sigmoid")(x)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def shared_layer():
    inputs = keras.Input((12,))
    shared = L.Dense(12, activation="relu", name="shared")
    return keras.Model(inputs, L.Dense(4)(shared(shared(inputs))))


@entry
def nested():
    block = keras.Sequential([keras.Input((12,)), L.Dense(10, activation="relu"), L.Dense(6)], name="block")
    inputs = keras.Input((12,))
    return keras.Model(inputs, L.Dense(4)(block(inputs)))


@entry
def several_inputs_and_outputs():
    image, vector = keras.Input((8, 8, 1), name="image"), keras.Input((6,), name="vector")
    x = L.Concatenate()([L.Flatten()(L.Conv2D(4, 3, activation="relu")(image)), L.Dense(8)(vector)])
    return keras.Model([image, vector], [L.Dense(4, name="a")(x), L.Dense(2, activation="sigmoid", name="b")(x)])


@entry
def inputs_by_name():
    inputs = {"second": keras.Input((6,), name="second"), "first": keras.Input((4,), name="first")}
    x = L.Concatenate()([L.Dense(8, activation="relu")(inputs["second"]), L.Dense(3)(inputs["first"])])
    return keras.Model(inputs, {"z": L.Dense(4, name="z")(x), "a": L.Dense(2, name="a")(x)})


@entry
def squeeze_excite():
    inputs = keras.Input((12, 12, 3))
    x = L.Conv2D(8, 3, activation="hard_swish" if hasattr(keras.activations, "hard_swish") else "relu")(inputs)
    gate = L.GlobalAveragePooling2D(keepdims=True)(x)
    gate = L.Conv2D(8, 1, activation="sigmoid")(L.Conv2D(4, 1, activation="relu")(gate))
    x = L.Multiply()([x, gate])
    return keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(x)))


@entry
def rescaled():
    inputs = keras.Input((8, 8, 1))
    x = L.Rescaling(1 / 127.5, offset=-1.0)(inputs)
    x = L.LeakyReLU(0.1)(L.Conv2D(4, 3)(x))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def attention():
    inputs = keras.Input((6, 8))
    x = L.MultiHeadAttention(2, 4)(inputs, inputs)
    x = L.LayerNormalization()(L.Add()([x, inputs]))
    return keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling1D()(x)))


@entry
def recurrent():
    return keras.Sequential([keras.Input((5, 6)), L.LSTM(7, unroll=True), L.Dense(4)])


@keras.saving.register_keras_serializable("zoo")
class Doubling(L.Layer):
    def call(self, inputs):
        return inputs * 2.0


@entry
def custom_layer():
    inputs = keras.Input((12,))
    return keras.Model(inputs, L.Dense(4)(Doubling()(L.Dense(8, activation="relu")(inputs))))


@entry
def conv1d():
    inputs = keras.Input((20, 6))
    x = L.Conv1D(8, 3, padding="causal", dilation_rate=2, activation="relu")(inputs)
    x = L.SeparableConv1D(8, 3, strides=2, activation="relu")(x)
    x = L.MaxPooling1D(2)(x)
    return keras.Model(inputs, L.Dense(4)(L.GlobalMaxPooling1D()(x)))


@entry
def conv3d():
    inputs = keras.Input((6, 8, 8, 2))
    x = L.Conv3D(4, 3, strides=(1, 2, 2), padding="same", activation="relu")(inputs)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def transposed():
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(6, 3, padding="same", activation="relu")(inputs)
    x = L.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu")(x)
    return keras.Model(inputs, L.Conv2D(2, 1)(x))


@entry
def unet():
    inputs = keras.Input((16, 16, 1))
    a = L.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    b = L.Conv2D(8, 3, padding="same", activation="relu")(L.MaxPooling2D()(a))
    c = L.Conv2D(8, 3, padding="same", activation="relu")(L.MaxPooling2D()(b))
    x = L.Concatenate()([L.UpSampling2D(2)(c), b])
    x = L.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = L.Concatenate()([L.UpSampling2D(2, interpolation="bilinear")(x), a])
    return keras.Model(inputs, L.Conv2D(2, 1)(x))


@entry
def prelu():
    inputs = keras.Input((8, 8, 3))
    x = L.PReLU(shared_axes=[1, 2], alpha_initializer=keras.initializers.Constant(0.2))(L.Conv2D(6, 3)(inputs))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def channel_shuffle():
    inputs = keras.Input((8, 8, 4))
    x = L.Conv2D(8, 1, groups=2, activation="relu")(inputs)
    x = L.Reshape((8, 8, 8))(L.Permute((1, 2, 4, 3))(L.Reshape((8, 8, 2, 4))(x)))
    return keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(L.DepthwiseConv2D(3)(x))))


@entry
def inverted_residual():
    inputs = keras.Input((12, 12, 4))
    x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(12, 1, use_bias=False)(inputs)))
    x = L.ReLU(6.0)(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    x = L.BatchNormalization()(L.Conv2D(4, 1, use_bias=False)(x))
    return keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(L.Add()([x, inputs]))))


@entry
def dense_connections():
    x = inputs = keras.Input((8, 8, 3))
    for _ in range(3):
        y = L.Conv2D(4, 3, padding="same")(L.ReLU()(L.BatchNormalization()(x)))
        x = L.Concatenate()([x, y])
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.GlobalAveragePooling2D()(x)))


@entry
def inception():
    inputs = keras.Input((10, 10, 3))
    a = L.Conv2D(4, 1, activation="relu")(inputs)
    b = L.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    c = L.Conv2D(4, 1, activation="relu")(L.AveragePooling2D(3, 1, padding="same")(inputs))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(L.MaxPooling2D()(L.Concatenate()([a, b, c])))))


@entry
def keyword_spotting():
    x = inputs = keras.Input((12, 10, 1))
    x = _conv_bn(x, 8, strides=2)
    for _ in range(2):
        x = L.ReLU()(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same")(x)))
        x = _conv_bn(x, 8, size=1)
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.Flatten()(L.AveragePooling2D((6, 5))(x))))


@entry
def autoencoder():
    x = inputs = keras.Input((24,))
    for units in (16, 4, 16):
        x = L.ReLU()(L.BatchNormalization()(L.Dense(units)(x)))
    return keras.Model(inputs, L.Dense(24)(x))


@entry
def transformer():
    inputs = keras.Input((6, 8))
    x = L.LayerNormalization()(inputs)
    x = L.Add()([inputs, L.MultiHeadAttention(2, 4)(x, x)])
    y = L.Dense(8)(L.Dense(16, activation="gelu")(L.LayerNormalization()(x)))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(L.Add()([x, y]))))


@entry
def token_classifier():
    inputs = keras.Input((7,), dtype="int32")
    x = L.Embedding(20, 8)(inputs)
    x = L.Add()([x, L.Conv1D(8, 3, padding="same", activation="relu")(x)])
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.GlobalAveragePooling1D()(x)))


@entry
def lstm():
    return keras.Sequential([keras.Input((5, 6)), L.LSTM(7, return_sequences=True), L.LSTM(5), L.Dense(4)])


@entry
def gru():
    return keras.Sequential([keras.Input((5, 6)), L.GRU(7), L.Dense(4)])


@entry
def bidirectional():
    return keras.Sequential([keras.Input((4, 6)), L.Bidirectional(L.SimpleRNN(5)), L.Dense(4)])


@entry
def time_distributed():
    inputs = keras.Input((4, 6))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(L.TimeDistributed(L.Dense(5, activation="relu"))(inputs))))


@entry
def normalized():
    inputs = keras.Input((6,))
    layer = L.Normalization(mean=[0.1] * 6, variance=[1.5] * 6)
    return keras.Model(inputs, L.Dense(4)(L.Dense(8, activation="relu")(layer(inputs))))


@entry
def group_normalized():
    inputs = keras.Input((8, 8, 3))
    x = L.ReLU()(L.GroupNormalization(2)(L.Conv2D(8, 3)(inputs)))
    return keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(x)))


@entry
def activations():
    x = inputs = keras.Input((12,))
    for name in ("swish", "elu", "selu", "softplus", "hard_sigmoid", "tanh", "exponential"):
        x = L.Dense(8, activation=name)(x)
    return keras.Model(inputs, L.Dense(4)(L.UnitNormalization()(x)))


@entry
def merges():
    inputs = keras.Input((12,))
    a, b = L.Dense(8)(inputs), L.Dense(8)(inputs)
    merged = [merge()([a, b]) for merge in (L.Maximum, L.Minimum, L.Average, L.Subtract, L.Multiply)]
    return keras.Model(inputs, L.Dense(4)(L.Concatenate()(merged)))


@entry
def cropped():
    inputs = keras.Input((10, 10, 3))
    x = L.Cropping2D(((1, 0), (0, 2)))(L.Conv2D(4, 3, activation="relu")(inputs))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(L.ZeroPadding2D(((0, 1), (2, 0)))(x))))


@entry
def two_towers():
    left, right = keras.Input((12,)), keras.Input((12,))
    tower = keras.Sequential([keras.Input((12,)), L.Dense(8, activation="relu"), L.Dense(6)], name="tower")
    a, b = tower(left), tower(right)
    return keras.Model([left, right], L.Dense(1, activation="sigmoid")(L.Multiply()([a, b])))


@entry
def shared_convolution():
    x = inputs = keras.Input((8, 8, 4))
    convolution = L.Conv2D(4, 3, padding="same", activation="relu")
    for _ in range(3):
        x = convolution(x)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@entry
def attention_pooling():
    inputs = keras.Input((6, 8))
    scores = L.Softmax(axis=1)(L.Dense(1)(inputs))
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(L.Dot(axes=1)([scores, inputs]))))


@entry
def asymmetric_kernels():
    inputs = keras.Input((9, 11, 2))
    x = L.Conv2D(4, (1, 5), strides=(1, 2), activation="relu")(inputs)
    x = L.Conv2D(6, (5, 1), strides=(2, 1), padding="same", activation="relu")(x)
    return keras.Model(inputs, L.Dense(4, activation="softmax")(L.Flatten()(x)))


@entry
def einsum_dense():
    inputs = keras.Input((5, 6))
    x = L.EinsumDense("abc,cd->abd", output_shape=(5, 7), bias_axes="d", activation="relu")(inputs)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


@keras.saving.register_keras_serializable("zoo")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = L.Dense(8, activation="relu")
        self.second = L.Dense(4)

    def call(self, inputs):
        return self.second(self.first(inputs))


@entry
def subclassed():
    model = Subclassed()
    model(np.zeros((1, 12), np.float32))
    return model


def samples(model: keras.Model, count: int, seed: int = 0) -> list[np.ndarray]:
    """Return seeded inputs for a model, one array per input."""
    generator = np.random.default_rng(seed)
    if not getattr(model, "inputs", None):
        return [generator.normal(size=(count, 12)).astype(np.float32)]
    return [
        generator.integers(0, 20, (count, *t.shape[1:])).astype(np.int32)
        if "int" in keras.backend.standardize_dtype(t.dtype)
        else generator.normal(size=(count, *t.shape[1:])).astype(np.float32)
        for t in model.inputs
    ]


def outputs(model: keras.Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Return a model's outputs as a flat list of arrays."""
    return [np.asarray(value) for value in keras.tree.flatten(model.predict(feed(model, inputs), verbose=0))]


def feed(model: keras.Model, inputs: list[np.ndarray]):
    """Return inputs as the model takes them."""
    if isinstance(getattr(model, "input", None), dict):
        return keras.tree.pack_sequence_as(model.input, inputs)
    return inputs[0] if len(inputs) == 1 else inputs


def settle(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give a model weights as after training: non-zero biases, moving averages that fit the data."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.name in ("bias", "beta", "moving_mean"):
            variable.assign(generator.normal(0, 0.1, variable.shape))
        elif variable.name in ("gamma", "moving_variance"):
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
    return model
