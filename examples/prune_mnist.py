"""Pruning, step by step: train with L1, rate, remove, retrain, and repeat until the requirement is met.

The model is the classic network for handwritten digits: 784 inputs, 64 hidden units, 10 classes. Most of its 50,816
weights do not matter. An L1 penalty pushes those towards zero while it trains; pruning removes the smallest; training
repairs what that broke. The loop removes more each round, as long as the accuracy stays within the requirement.

    python examples/prune_mnist.py
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import keras

import dwindle as dw

LARGEST_DROP = 0.010  # the requirement: at most 1 point less accuracy on validation data ...
SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97)  # ... at the highest of these that still meets it
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


def zipped_bytes(path: Path) -> int:
    """Return the size of a file after zip, which is what zeros make smaller."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.write(path, path.name)
    return len(memory.getvalue())


def main() -> None:
    """Run every step and print what it gave."""
    keras.utils.set_random_seed(0)
    data = dw.load_demo_data()
    (x, y), (x_val, y_val) = (data.train.x[0], data.train.y), (data.val.x[0], data.val.y)

    def train(model: keras.Model, epochs: int, rate: float) -> float:
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
        return model.evaluate(x_val, y_val, verbose=0)[1]

    model = build()
    original = train(model, epochs=8, rate=1e-3)
    print(f"1. trained: {model.count_params():,} parameters, validation accuracy {original:.4f}")

    # L1-regularized training: the loss gets 1e-5 * sum |w|. The twin has the same layers and starts from the weights.
    sparse = dw.prune(model, sparsity=0.0, l1=1e-5)
    print(f"2. trained on with L1: {train(sparse, epochs=4, rate=1e-3):.4f}")

    best, reached = sparse, 0.0
    for sparsity in SPARSITIES:
        # Rate every weight by its magnitude, remove the least important ones, and train the rest again.
        candidate = dw.prune(best, sparsity=sparsity, l1=1e-5)
        before = candidate
        before.compile(metrics=["accuracy"], loss="sparse_categorical_crossentropy")
        removed = before.evaluate(x_val, y_val, verbose=0)[1]
        repaired = train(candidate, epochs=3, rate=1e-3)
        kept = repaired >= original - LARGEST_DROP
        print(f"3. {sparsity:.0%} removed: {removed:.4f}, retrained: {repaired:.4f}{'' if kept else ', too much'}")
        if not kept:
            break
        best, reached = candidate, sparsity

    # The file: masks become ordinary zeros, weights become 8 bits, and the file is compared with the model.
    plain = dw.finalize(best)
    artefact = dw.export(plain, OUT / "pruned.tflite", scheme="int8", data=data.train.x[0][:500])
    baseline = dw.export(model, OUT / "original.tflite")
    test = (data.test.x[0], data.test.y)
    before, after = dw.measure(baseline.path, test), dw.measure(artefact.path, test)
    print(f"4. {reached:.0%} of the weights are zero")
    print(f"   original file: {before.size_bytes:,} bytes ({zipped_bytes(baseline.path):,} zipped), ", end="")
    print(f"test accuracy {before.accuracy:.4f}")
    print(f"   pruned int8 file: {after.size_bytes:,} bytes ({zipped_bytes(artefact.path):,} zipped), ", end="")
    print(f"test accuracy {after.accuracy:.4f}, measured on {artefact.path.name}")


if __name__ == "__main__":
    main()
