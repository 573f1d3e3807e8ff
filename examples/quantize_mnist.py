"""Quantization in training, step by step: 8-bit weights, one scale for each output channel.

A float32 weight takes 4 bytes; an 8-bit integer takes 1 and most chips multiply it faster. Rounding costs accuracy,
unless the network learns with it: in quantized training every value is rounded just as the file will round it, while
the gradient passes as if it were not. What is trained is then what the file computes.

    python examples/quantize_mnist.py
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

import dwindle as dw

OUT = Path(__file__).parent / "out"


def build() -> keras.Model:
    """Return the 784-64-10 network."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="digit"),
        ]
    )


def main() -> None:
    """Train, quantize, train on, export, and compare the file with the model."""
    keras.utils.set_random_seed(0)
    data = dw.load_demo_data()
    x, y = data.train.x[0], data.train.y
    test = (data.test.x[0], data.test.y)

    model = build()
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=8, verbose=0)
    floats = dw.measure(dw.export(model, OUT / "float32.tflite").path, test)
    print(f"1. float32 file: {floats.size_bytes:,} bytes, test accuracy {floats.accuracy:.4f}")

    # The ranges of the activations come from 500 training images; the weights' scales from the weights.
    aware = dw.quantize(model, "int8", data=x[:500])
    after = dw.measure(dw.export(aware, OUT / "int8_after_training.tflite", data=x[:500]).path, test)
    print(f"2. int8 after training: {after.size_bytes:,} bytes, test accuracy {after.accuracy:.4f}")

    # The twin trains like any Keras model.
    aware.compile(keras.optimizers.Adam(2e-4), "sparse_categorical_crossentropy", metrics=["accuracy"])
    aware.fit(x, y, batch_size=64, epochs=3, verbose=0)
    artefact = dw.export(aware, OUT / "int8_in_training.tflite", data=test[0], verify_samples=len(test[0]))
    found = dw.measure(artefact.path, test)
    print(f"3. int8 in training: {found.size_bytes:,} bytes, test accuracy {found.accuracy:.4f}")

    predicted = aware.predict(test[0], verbose=0)
    told = artefact.verification
    print(
        f"4. the model says {np.mean(predicted.argmax(1) == test[1]):.4f}; the file gives the same class for ", end=""
    )
    print(f"{told.same_class:,} of {told.samples:,} images and is at most {told.quanta:.1f} output quanta away")


if __name__ == "__main__":
    main()
