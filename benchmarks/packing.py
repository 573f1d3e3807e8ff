"""Bytes of packed models against zip, zstd, xz and brotli, and the speed of packing and restoring.

python benchmarks/packing.py [--models DIR] [--seed N]

LeNet-5 and a small MobileNet, trained for 3 epochs on the digits that dwindle ships, as float32, int8 and with 4-bit
weights; the same pruned to 90% zeros and with 16 shared values in each kernel (neither trained any further: bytes are
what counts here); and a layer and a MobileNet of 4 million random weights. --models keeps the .tflite files, or takes
them from there. Every packed file is restored and compared. zstd and brotli are left out where their packages
(`zstandard`, `brotli`) are not installed. Tables are Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import lzma
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: times are those of one core

import numpy as np

from dwindle.packing import c_sources, pack, unpack

SPEED_ROUNDS = 3
DECODER = r"""
#include "dwz.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static dwz_work work;
static uint8_t in[1 << 24], out[1 << 24];
static uint32_t table[1 << 22];
int main(int count, char **names) {
    FILE *file = fopen(names[1], "rb");
    size_t size = fread(in, 1, sizeof in, file);
    clock_t begun = clock();
    int i, status = 0;
    for (i = 0; i < 5 && !status; i++) status = dwz_unpack(in, size, out, sizeof out, &work, table, 1 << 22);
    printf("%g\n", (double)(clock() - begun) / CLOCKS_PER_SEC / 5);
    return status + (count != 2);
}
"""


def others() -> dict[str, Callable[[bytes], bytes]]:
    """Return the general-purpose compressors that are there, each at its strongest."""
    found: dict[str, Callable[[bytes], bytes]] = {
        "zip -9": lambda content: zlib.compress(content, 9),
        "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, module, call in (
        ("zstd -22", "zstandard", lambda package, content: package.ZstdCompressor(level=22).compress(content)),
        ("brotli -11", "brotli", lambda package, content: package.compress(content, quality=11, lgwin=24)),
    ):
        try:
            package = importlib.import_module(module)
        except ImportError:
            print(f"{name}: `{module}` is not installed", file=sys.stderr)
            continue
        found[name] = lambda content, package=package, call=call: call(package, content)
    return found


def models() -> Iterator[tuple[str, object]]:
    """Yield names and untrained models."""
    import keras

    layers = keras.layers
    yield "LeNet-5", keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(20, 5), layers.MaxPooling2D(), layers.Conv2D(50, 5),
            layers.MaxPooling2D(), layers.Flatten(), layers.Dense(500, activation="relu"), layers.Dense(10),
        ]
    )  # fmt: skip
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    for filters, strides in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1), (512, 1)):
        x = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Conv2D(filters, 1, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    yield "MobileNet", keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def pruned(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel with nine tenths of it zero."""
    return np.where(np.abs(kernel) > np.quantile(np.abs(kernel), 0.9), kernel, 0)


def shared(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel of 16 values: k-means, from evenly spaced ones."""
    centroids = np.linspace(kernel.min(), kernel.max(), 16)
    for _ in range(30):
        nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, kernel)
        sums = np.bincount(nearest.ravel(), kernel.ravel(), 16)
        counts = np.bincount(nearest.ravel(), minlength=16)
        centroids = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), centroids))
    return centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, kernel)]


def write_models(folder: Path, seed: int) -> None:
    """Train both models and write all their files."""
    import keras

    import dwindle as dw
    from dwindle.data import load_demo_data

    data = load_demo_data(full=False).train
    x, y = data.x[0], data.y
    keras.utils.set_random_seed(seed)
    for name, model in models():
        model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, epochs=3, batch_size=64, verbose=0)
        trained = model.get_weights()
        for treatment, treat in (("", None), (", 90% zeros", pruned), (", 16 values", shared)):
            model.set_weights(trained)
            for layer in model.layers:
                if treat is not None and type(layer) in (keras.layers.Conv2D, keras.layers.Dense):
                    layer.kernel.assign(treat(layer.kernel.numpy()))
            for scheme in ("float32", "int8", *([] if treat is not None else ["int4"])):
                calibration = None if scheme == "float32" else x[:200]
                dw.export(model, folder / f"{name}, {scheme}{treatment}.tflite", scheme=scheme, data=calibration)


def write_large(folder: Path, seed: int) -> None:
    """Write a layer of 4 million random weights, for the speed of what takes long; dense and with 90% zeros."""
    import keras

    import dwindle as dw

    rng = np.random.default_rng(seed)
    layer = keras.layers.Dense(2048)
    model = keras.Sequential([keras.Input((2048,)), layer])
    samples = rng.normal(size=(20, 2048)).astype(np.float32)
    for treatment, treat in (("", lambda kernel: kernel), (", 90% zeros", pruned)):
        layer.kernel.assign(treat(rng.normal(size=(2048, 2048)).astype(np.float32)))
        dw.export(model, folder / f"random layer, int8{treatment}.tflite", scheme="int8", data=samples)


def write_application(folder: Path, seed: int) -> None:
    """Write a MobileNet of 4.3 million random weights, whose channels differ in size; dense and with 80% zeros."""
    import keras

    import dwindle as dw

    rng = np.random.default_rng(seed)
    model = keras.applications.MobileNet(weights=None, input_shape=(64, 64, 3))
    for zeros in (0.0, 0.8):
        for variable in model.trainable_variables:
            if len(variable.shape) > 1:
                sizes = np.exp(0.3 * rng.normal(size=variable.shape[-1]))
                kernel = 0.05 * sizes * rng.standard_t(5, size=variable.shape)
                variable.assign(np.where(np.abs(kernel) >= np.quantile(np.abs(kernel), zeros), kernel, 0))
        name = f"large MobileNet, int8{', 80% zeros' if zeros else ''}"
        dw.export(model, folder / f"{name}.tflite", scheme="int8-dynamic", verify_samples=2)


def seconds(call: Callable[[], object]) -> float:
    """Return the least CPU time of a few calls."""
    times = []
    for _ in range(SPEED_ROUNDS):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


def decoder(folder: Path) -> Path | None:
    """Return the compiled C decoder, or None where there is no compiler."""
    header, source, _ = c_sources()
    (folder / "speed.c").write_text(DECODER)
    command = ["cc", "-std=c99", "-O2", "-I", str(header.parent), "-o", str(folder / "speed"), str(folder / "speed.c")]
    try:
        subprocess.run([*command, str(source)], check=True)
    except FileNotFoundError:
        return None
    return folder / "speed"


def in_python(source: Path, packed: Path) -> tuple[float, float]:
    """Return how long both directions take without the native engine, in a process of its own."""
    code = (
        "import sys, time; from pathlib import Path; from dwindle.packing import pack, unpack\n"
        "source, packed, back = map(Path, sys.argv[1:])\n"
        "begun = time.process_time(); unpack(packed, back); middle = time.process_time()\n"
        "pack(source, packed); print(middle - begun, time.process_time() - middle - (middle - begun))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, packed, packed.with_suffix(".tflite")],
        env={**os.environ, "DWINDLE_NATIVE": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    unpacking, packing = map(float, done.stdout.split())
    return packing, unpacking


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="DIR", help="keep the models there, or take those that are")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Path(options.models) if options.models else folder
        place.mkdir(parents=True, exist_ok=True)
        if not list(place.glob("*.tflite")):
            write_models(place, options.seed)
            write_large(place, options.seed)
            write_application(place, options.seed)
        report(sorted(place.glob("*.tflite")), folder)


def report(files: list[Path], folder: Path) -> None:
    """Print bytes and speeds."""
    compressors = others()
    program = decoder(folder)
    print(f"| model | bytes | {' | '.join(compressors)} | dwz | against the best |")
    print(f"| --- | --- | {' | '.join('---' for _ in compressors)} | --- | --- |")
    speeds = []
    for source in files:
        content = source.read_bytes()
        sizes = {name: len(compress(content)) for name, compress in compressors.items()}
        packed, back = folder / "model.dwz", folder / "model.tflite"
        found = pack(source, packed)
        unpack(packed, back)
        if back.read_bytes() != content:
            raise SystemExit(f"{source} comes back changed")
        less = 1 - found.packed_bytes / min(sizes.values())
        row = [source.stem, f"{len(content):,}", *(f"{size:,}" for size in sizes.values())]
        print(f"| {' | '.join(row)} | {found.packed_bytes:,} | {-less:+.1%} |", flush=True)
        if "16 values" not in source.stem:
            native = [seconds(partial(pack, source, packed)), seconds(partial(unpack, packed, back))]
            native[0] -= native[1]  # it restores what it wrote
            slow = in_python(source, packed)
            in_c = None
            if program is not None:
                done = subprocess.run([program, packed], capture_output=True, text=True, check=True)
                in_c = float(done.stdout)
            speeds.append((source.stem, len(content) / 1e6, *native, in_c, *slow))
    print("\nMB of model in a second of one core\n")
    print("| model | pack, native | unpack, native | C decoder | pack, Python | unpack, Python |")
    print("| --- | --- | --- | --- | --- | --- |")
    for stem, megabytes, *times in speeds:
        print(f"| {stem} | {' | '.join('-' if t is None else f'{megabytes / t:.2g}' for t in times)} |")


if __name__ == "__main__":
    main()
