"""TFMOT's combined recipe on the residual network of `search.py`; run by the Python of TFMOT's own environment.

tfmot_pcqat.py FOLDER EPOCHS BATCH: reads weights.npz and data.npz of the folder, writes tfmot.tflite there. Half of
the weights are pruned and the net trained again, then 8 clusters a layer that keep the zeros, then quantized training
that keeps both; a quarter, a quarter and a half of the epochs.
"""

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster
from tfmot_qat import convolution, read, write

layers = keras.layers


def resnet8():
    """Return the network of `search.py`."""
    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 16))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = convolution(layers.ReLU()(convolution(x, filters, strides)), filters)
        shortcut = x if strides == 1 else convolution(x, filters, strides, 1)
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


def main():
    """Train and convert."""
    folder, epochs, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = resnet8()
    x, y = read(model, folder)

    def fit(model, share, rate, callbacks=()):
        rounds = max(1, round(share * epochs))
        decay = keras.optimizers.schedules.CosineDecay(rate, rounds * (len(x) // batch + 1))
        model.compile(keras.optimizers.Adam(decay), "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, batch_size=batch, epochs=rounds, verbose=0, callbacks=list(callbacks))

    half = tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=0, frequency=100)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(model, pruning_schedule=half)
    fit(pruned, 0.25, 1e-3, [tfmot.sparsity.keras.UpdatePruningStep()])
    start = tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS
    clustered = cluster.cluster_weights(
        tfmot.sparsity.keras.strip_pruning(pruned), number_of_clusters=8, cluster_centroids_init=start,
        preserve_sparsity=True,
    )  # fmt: skip
    fit(clustered, 0.25, 5e-4)
    annotated = tfmot.quantization.keras.quantize_annotate_model(tfmot.clustering.keras.strip_clustering(clustered))
    scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=True)
    aware = tfmot.quantization.keras.quantize_apply(annotated, scheme)
    fit(aware, 0.5, 5e-4)
    write(aware, folder)


if __name__ == "__main__":
    main()
