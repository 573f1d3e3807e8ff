"""Step times of TFMOT's quantization-aware training, pruning and clustering, run by the Python of its own environment.

tfmot_steps.py NAME STEPS BATCH: for each line on standard input, trains plainly, quantized, pruned with masks every 100
steps and every step, and clustered with 16 and 64 values, and prints the times of a step in milliseconds.
"""

import os
import sys
import time

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras as keras

layers = keras.layers


def mlp():
    """Return the benchmark's MLP."""
    return keras.Sequential(
        [
            keras.Input((784,)), layers.Dense(512, activation="relu"), layers.Dense(512, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def cnn():
    """Return the benchmark's small CNN."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def main():
    """Answer each line of standard input with one measurement."""
    name, steps, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = {"MLP": mlp, "CNN": cnn}[name]()
    generator = np.random.default_rng(0)
    x = generator.random((steps * batch, *model.input_shape[1:])).astype(np.float32)
    y = generator.integers(0, 10, steps * batch)
    runs = [(model, []), (tfmot.quantization.keras.quantize_model(model), [])]
    for frequency in (100, 1):
        schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.8, 0, 10_000, frequency=frequency)
        pruned = tfmot.sparsity.keras.prune_low_magnitude(keras.models.clone_model(model), pruning_schedule=schedule)
        runs.append((pruned, [tfmot.sparsity.keras.UpdatePruningStep()]))
    for clusters in (16, 64):
        shared = tfmot.clustering.keras.cluster_weights(
            keras.models.clone_model(model), number_of_clusters=clusters,
            cluster_centroids_init=tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS,
        )  # fmt: skip
        runs.append((shared, []))
    for each, callbacks in runs:
        each.compile("adam", "sparse_categorical_crossentropy")
        each.fit(x, y, batch_size=batch, verbose=0, callbacks=callbacks)
    print("ready", flush=True)
    for _ in sys.stdin:
        times = []
        for each, callbacks in runs:
            begun = time.perf_counter()
            each.fit(x, y, batch_size=batch, verbose=0, callbacks=callbacks)
            times.append((time.perf_counter() - begun) / steps * 1000)
        print(*times, flush=True)


if __name__ == "__main__":
    main()
