"""Clustering, step by step: prune, share 8 values, put them on integers, and pack the file.

The classic network for handwritten digits: 784 inputs, 64 hidden units, 10 classes. Each step makes its weights
easier to write down: most become zero, the rest take 8 values, the values become small integers, and a packer that
knows what weights look like spends on each what it is worth. The packed file restores the very file that was measured.

    python examples/cluster_mnist.py
"""

from __future__ import annotations

from pathlib import Path

import keras

import dwindle as dw

OUT = Path(__file__).parent / "out"
SPARSITY = 0.85
CLUSTERS = 8


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
    """Run every step and print what its file gives."""
    keras.utils.set_random_seed(0)
    data = dw.load_demo_data()
    x, y = data.train.x[0], data.train.y
    test = (data.test.x[0], data.test.y)

    def train(model: keras.Model, epochs: int, rate: float) -> None:
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)

    def show(name: str, model: keras.Model) -> None:
        file = dw.export(model, OUT / f"clustering_{name.split()[0]}.tflite").path
        packed = dw.pack(file, file.with_suffix(".dwz"))
        found = dw.measure(file, test)
        print(f"{name:36} {found.size_bytes:8,} bytes  {packed.packed_bytes:8,} packed  {found.accuracy:.4f}")

    model = build()
    train(model, epochs=10, rate=1e-3)
    show("trained", model)

    # Zeros first: half-way through the training all of them are where they stay.
    schedule = dw.PolynomialDecay(end=400, frequency=50)
    pruned = dw.prune(model, SPARSITY, schedule=schedule)
    train(pruned, epochs=6, rate=1e-3)
    show(f"pruned, {SPARSITY:.0%} zeros", pruned)

    # Values next: zero is one of them, and the others are trained along with which weight has which.
    shared = dw.cluster(pruned, CLUSTERS)
    train(shared, epochs=4, rate=3e-4)
    show(f"shared, {CLUSTERS} values as well", shared)

    # Integers last, with one scale for a tensor, so that the values are shared by all of its channels.
    scheme = dw.Scheme(weights=8, activations=8, granularity="tensor")
    aware = dw.quantize(shared, scheme, data=x[:500])
    train(aware, epochs=2, rate=1e-4)
    show("quantized, on 8-bit integers as well", aware)


if __name__ == "__main__":
    main()
