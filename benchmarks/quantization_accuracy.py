"""Accuracy of quantized files beside other tools, same float models, same data, same number of steps.

python benchmarks/quantization_accuracy.py --data mnist.npz --data fashion_mnist.npz [--tfmot PYTHON] [--out FILE]

Each row is a file that LiteRT ran on all test images. Finished runs are kept in the output file, so that an
interrupted benchmark goes on. ``--tfmot`` names the Python of an environment that has TensorFlow 2.19, tf-keras and
tensorflow-model-optimization; without it that row is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.exporting import float_file
from dwindle.lifting.flatbuffer import read_graph

FLOAT_EPOCHS, EPOCHS, BATCH, CALIBRATION = 4, 1, 128, 200
layers = keras.layers


def lenet() -> keras.Model:
    """Return LeNet-5 as in Caffe: 431,080 parameters."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(20, 5), layers.MaxPooling2D(), layers.Conv2D(50, 5),
            layers.MaxPooling2D(), layers.Flatten(), layers.Dense(500, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def resnet() -> keras.Model:
    """Return a residual network of seven convolutions."""

    def convolution(x: object, filters: int, strides: int = 1, size: int = 3) -> object:
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 8, 2))
    for filters, strides in ((16, 2), (32, 2)):
        y = convolution(layers.ReLU()(convolution(x, filters, strides)), filters)
        x = layers.ReLU()(layers.Add()([y, convolution(x, filters, strides, 1)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


MODELS: dict[str, Callable[[], keras.Model]] = {"lenet": lenet, "resnet": resnet}


def accuracy(file: Path | bytes, test: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the file's accuracy in percent."""
    if isinstance(file, bytes):
        with tempfile.NamedTemporaryFile(suffix=".tflite") as named:
            named.write(file)
            named.flush()
            return accuracy(Path(named.name), test)
    return round(100 * float(dw.measure(file, test).accuracy), 2)


def converter(model: keras.Model, calibration: np.ndarray) -> bytes:
    """Return the TensorFlow converter's int8 file."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        tool = tf.lite.TFLiteConverter.from_saved_model(folder)
        tool.optimizations = [tf.lite.Optimize.DEFAULT]
        tool.representative_dataset = lambda: ([sample[None]] for sample in calibration)
        return bytes(tool.convert())


def quantizer(model: keras.Model, calibration: np.ndarray) -> bytes:
    """Return ai-edge-quantizer's file with its default recipe for static int8."""
    from ai_edge_quantizer import quantizer as aeq
    from ai_edge_quantizer import recipe

    content = float_file(model)
    tool = aeq.Quantizer(bytearray(content))
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    name = read_graph(content).input_names[0]
    found = tool.calibrate({"serving_default": [{name: sample[None]} for sample in calibration]})
    return bytes(tool.quantize(found).quantized_model)


def trained(model: keras.Model, scheme: object, train: tuple, test: tuple, folder: Path, **options: object) -> float:
    """Return the accuracy of the file after quantized training."""
    x, y = train
    twin = dw.quantize(model, scheme, x[:CALIBRATION], **options)
    steps = EPOCHS * len(x) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(5e-4, steps)
    twin.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    twin.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return accuracy(dw.export(twin, folder / "trained.tflite", data=x[:256]).path, test)


def tfmot(python: str, name: str, model: keras.Model, train: tuple, test: tuple, folder: Path) -> float:
    """Return the accuracy of TFMOT's file after as much training, made in its own environment."""
    np.savez(folder / "weights.npz", *model.get_weights())
    np.savez(folder / "data.npz", x=train[0], y=train[1])
    script = Path(__file__).parent / "peers" / "tfmot_qat.py"
    subprocess.run([python, script, name, folder, str(EPOCHS), str(BATCH)], check=True, capture_output=True)
    return accuracy(folder / "tfmot.tflite", test)


def one(name: str, data: Path, seed: int, python: str | None) -> dict[str, float]:
    """Train one float model and return the accuracy of every file made from it, in percent."""
    with np.load(data) as arrays:
        x, x_test = ((arrays[k][..., None] / 255.0).astype(np.float32) for k in ("x_train", "x_test"))
        y, y_test = arrays["y_train"].astype(np.int64), arrays["y_test"].astype(np.int64)
    keras.utils.set_random_seed(seed)
    model = MODELS[name]()
    rate = keras.optimizers.schedules.CosineDecay(2e-3, FLOAT_EPOCHS * len(x) // BATCH)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=BATCH, epochs=FLOAT_EPOCHS, verbose=0)
    train, test, calibration = (x, y), (x_test, y_test), x[:CALIBRATION]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found = {"float": accuracy(float_file(model), test)}
        found["dwindle int8 after training"] = accuracy(
            dw.export(model, folder / "a.tflite", "int8", calibration).path, test
        )
        found["dwindle int4 after training, adaround"] = accuracy(
            dw.export(dw.quantize(model, "int4", calibration, clipping="mse", rounding="adaround"),
                      folder / "b.tflite", data=calibration).path, test
        )  # fmt: skip
        found["TensorFlow converter int8 after training"] = accuracy(converter(model, calibration), test)
        found["ai-edge-quantizer int8 after training"] = accuracy(quantizer(model, calibration), test)
        found["dwindle int8 in training"] = trained(model, "int8", train, test, folder)
        found["dwindle 4-bit weights in training"] = trained(model, "int4", train, test, folder)
        found["dwindle 2-bit weights in training"] = trained(
            model, "int2-dynamic", train, test, folder, ranges="learned", clipping="mse"
        )
        if python is not None:
            found["TFMOT int8 in training"] = tfmot(python, name, model, train, test, folder)
    return found


def main() -> None:
    """Run what is not in the output file yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", required=True, type=Path)
    parser.add_argument("--tfmot")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default="lenet,resnet")
    parser.add_argument("--out", type=Path, default=Path("quantization_accuracy.json"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in range(options.seeds):
        for name in options.models.split(","):
            for data in options.data:
                key = f"{name} {data.stem} {seed}"
                if key not in done:
                    begun = time.time()
                    done[key] = one(name, data, seed, options.tfmot)
                    options.out.write_text(json.dumps(done, indent=1))
                    print(f"{key}: {time.time() - begun:.0f} s {done[key]}", file=sys.stderr, flush=True)
                    keras.backend.clear_session()
    for name in options.models.split(","):
        for data in options.data:
            runs = [value for key, value in done.items() if key.startswith(f"{name} {data.stem} ")]
            print(f"{name}, {data.stem}, {len(runs)} seeds")
            for row in runs[0]:
                values = [run[row] for run in runs if row in run]
                print(f"  {row:42} {np.mean(values):.2f}  ({', '.join(f'{v:.2f}' for v in values)})")


if __name__ == "__main__":
    main()
