"""TFMOT's quantization-aware training of a benchmark model; run by the Python of TFMOT's own environment.

tfmot_qat.py NAME FOLDER EPOCHS BATCH: reads weights.npz and data.npz of the folder, writes tfmot.tflite there.
"""

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras

layers = keras.layers


def lenet():
    """Return LeNet-5 as in the benchmark."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(20, 5), layers.MaxPooling2D(), layers.Conv2D(50, 5),
            layers.MaxPooling2D(), layers.Flatten(), layers.Dense(500, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def convolution(x, filters, strides=1, size=3):
    """Return a convolution and its normalization, as both residual networks have them."""
    x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def resnet():
    """Return the benchmark's residual network."""
    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 8, 2))
    for filters, strides in ((16, 2), (32, 2)):
        y = convolution(layers.ReLU()(convolution(x, filters, strides)), filters)
        x = layers.ReLU()(layers.Add()([y, convolution(x, filters, strides, 1)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


def main():
    """Train and convert."""
    name, folder, epochs, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    model = {"lenet": lenet, "resnet": resnet}[name]()
    x, y = read(model, folder)
    aware = tfmot.quantization.keras.quantize_model(model)
    rate = keras.optimizers.schedules.CosineDecay(5e-4, epochs * len(x) // batch)
    aware.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    aware.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    write(aware, folder)


def read(model, folder):
    """Give a model the weights of the folder; return the folder's samples and labels."""
    with np.load(os.path.join(folder, "weights.npz")) as arrays:
        model.set_weights([arrays[f"arr_{i}"] for i in range(len(arrays.files))])
    with np.load(os.path.join(folder, "data.npz")) as arrays:
        return arrays["x"], arrays["y"]


def write(model, folder):
    """Convert a model into the folder."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with open(os.path.join(folder, "tfmot.tflite"), "wb") as file:
        file.write(converter.convert())


if __name__ == "__main__":
    main()
