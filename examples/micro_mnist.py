"""A microcontroller's model, step by step: a small CNN becomes C++ sources that were proved in TensorFlow Lite Micro.

A microcontroller has no files and no heap to speak of: the model is a constant array in flash, and every tensor lies in
one arena of RAM whose size must be known before. Both are measured here, by running the very file in the interpreter
that the device will run. The folder in `out` builds with CMake and as an Arduino sketch.

    python examples/micro_mnist.py
"""

from __future__ import annotations

from pathlib import Path

import keras

import dwindle as dw

OUT = Path(__file__).parent / "out"


def build() -> keras.Model:
    """Return a CNN of depthwise separable convolutions, 2,570 parameters."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="first")(x)
    for number in (1, 2):
        x = layers.DepthwiseConv2D(3, strides=number, padding="same", name=f"depthwise_{number}")(x)
        x = layers.Conv2D(32, 1, activation="relu", name=f"pointwise_{number}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax", name="digit")(x), name="digits")


def main() -> None:
    """Train, export, and look at what was measured."""
    keras.utils.set_random_seed(0)
    data = dw.load_demo_data()
    model = build()
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(data.train.x[0], data.train.y, batch_size=64, epochs=12, verbose=0)
    accuracy = model.evaluate(data.test.x[0], data.test.y, verbose=0)[1]
    print(f"1. {model.count_params():,} parameters, test accuracy {accuracy:.4f} in float")

    # 8-bit integers in and out; every operator is one that TensorFlow Lite Micro has, or the layer is named.
    made = dw.export_micro(model, OUT / "micro_digits", data=data)
    print(f"2. operators: {', '.join(made.operators)}")
    print(f"3. {made.plain_bytes:,} bytes as it was quantized, {made.size_bytes:,} without what no runtime reads")
    print(f"4. arena: {made.needed_bytes:,} bytes are needed, {made.persistent_bytes:,} of them the interpreter's")
    for found in made.agreements:
        print(f"5. {found}")

    measured = dw.measure(made.file, (data.test.x[0], data.test.y))
    print(f"6. test accuracy of that file {measured.accuracy:.4f}")
    print(f"7. sources in {made.folder}: {', '.join(sorted(path.name for path in made.folder.iterdir()))}")


if __name__ == "__main__":
    main()
