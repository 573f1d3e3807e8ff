"""Every architecture of `keras.applications`, at its smallest input: lifted, and its int8 file against the simulation.

python benchmarks/applications.py [NAME ...] [--out FILE]

For each: the largest difference of the lifted model from LiteRT, as a share of the largest output, and that of the
Keras model itself, which is what float arithmetic in another order amounts to in a network of that depth; and, in
static int8, the share of outputs within one quantum of the simulation, and the largest difference in quanta. Weights
are random (the published ones can't be had without a network), with moving averages adapted to the data, as after
training. Results are kept in the output file; architectures in it are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import dwindle as dw
from dwindle.exporting import check, float_file, predict
from dwindle.exporting.verify import BOUNDS
from dwindle.lifting.shared_constants import unshared
from dwindle.measuring import LiteRTRunner
from dwindle.quantization import calibrate, resolve_scheme, simulate, write_quantized

SAMPLES = 24
CLASSES = 100
# The smallest input that each takes.
SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71, "NASNetLarge": 32, "NASNetMobile": 32}


def architectures() -> dict[str, Any]:
    """Return the functions of `keras.applications` that build a model, by name."""
    found = {name: getattr(keras.applications, name) for name in dir(keras.applications) if name[:1].isupper()}
    return {name: build for name, build in found.items() if callable(build)}


def built(name: str) -> keras.Model:
    """Return an architecture with random weights and moving averages that fit normal data."""
    size = SMALLEST.get(name, 32)
    keras.utils.set_random_seed(0)
    model = architectures()[name](
        weights=None, input_shape=(size, size, 3), classes=CLASSES, classifier_activation=None
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(images(model, 32, seed=1), training=True)
    return model


def images(model: keras.Model, count: int, seed: int = 0) -> np.ndarray:
    """Return blurred noise in 0..255, as pictures are."""
    generator = np.random.default_rng(seed)
    shape = (count, *model.inputs[0].shape[1:])
    coarse = generator.uniform(0, 255, (count, 8, 8, 3)).astype(np.float32)
    wide = np.asarray(keras.ops.image.resize(coarse, shape[1:3], interpolation="bilinear"))
    return np.clip(wide + generator.normal(0, 10, shape), 0, 255).astype(np.float32)


def one(name: str) -> dict[str, Any]:
    """Lift one architecture and compare its int8 file with the simulation."""
    begun = time.time()
    model = built(name)
    x = images(model, SAMPLES)
    content = unshared(float_file(model))
    lifted = dw.lift(content)
    expected = LiteRTRunner(content).predict([x])[0]
    error, noise = (
        float(np.abs(predict(twin, [x])[0] - expected).max() / np.abs(expected).max()) for twin in (lifted, model)
    )
    scheme = resolve_scheme("int8")
    ranges = calibrate(content, [x])
    written = write_quantized(content, scheme, ranges)
    twin = simulate(content, scheme, ranges, name=name)
    agreed = check(written, twin, [x], BOUNDS["static"], "simulation")
    return {
        "lift": error, "keras": noise, "within": agreed.within, "quanta": agreed.quanta, "islands": list(lifted.notes),
        "seconds": round(time.time() - begun),
    }  # fmt: skip


def main() -> None:
    """Run what is not in the output file yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("applications.json"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.names or architectures():
        if name not in done:
            done[name] = one(name)
            options.out.write_text(json.dumps(done, indent=1))
            keras.backend.clear_session()
        row = done[name]
        print(
            f"{name:20} lifted to {row['lift']:.1e} (Keras {row['keras']:.1e}), within one quantum "
            f"{row['within']:.4%}, largest {row['quanta']:.2f} quanta, {len(row['islands'])} islands, "
            f"{row['seconds']} s",
            flush=True,
        )
    worst = min(row["within"] for row in done.values())
    missed = [name for name, row in done.items() if row["lift"] > max(1e-4, 2 * row["keras"])]
    print(f"{len(done)} architectures; at least {worst:.4%} within one quantum")
    print(f"lifted to 1e-4 or twice what Keras itself differs by: {len(done) - len(missed)}; not: {missed or 'none'}")
    sys.exit(int(worst < 0.999 or bool(missed)))


if __name__ == "__main__":
    main()
