"""What a technique costs: time of a training step against plain ``fit``, interleaved in one run.

python benchmarks/step_time.py [--tfmot PYTHON]
python benchmarks/step_time.py --memory [--only clustered]

``--tfmot`` names the Python of an environment with TensorFlow 2.19, tf-keras and tensorflow-model-optimization, whose
quantization-aware training and pruning are then timed in the same rounds, against its own plain ``fit``. Factors are of
the fastest rounds: what else the machine does only adds. ``--memory`` measures the peak of resident memory instead,
of the MLP, each technique in a process of its own: all of it, and what came on top of the frameworks.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np

import dwindle as dw

ROUNDS, STEPS, BATCH = 15, 80, 64
TFMOT_RUNS = (
    "TFMOT, int8 in training", "TFMOT, pruned every 100 steps", "TFMOT, pruned every step",
    "TFMOT, clustered, 16 values", "TFMOT, clustered, 64 values",
)  # fmt: skip


def mlp() -> keras.Model:
    """Return an MLP of 669,706 parameters."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((784,)), layers.Dense(512, activation="relu"), layers.Dense(512, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def cnn() -> keras.Model:
    """Return a small CNN."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


@contextlib.contextmanager
def peer(python: str | None, name: str) -> Iterator[Callable[[], list[float]] | None]:
    """Yield a function that measures TFMOT's steps once, in ms; None without its environment."""
    if python is None:
        yield None
        return
    script = Path(__file__).parent / "peers" / "tfmot_steps.py"
    command = [python, str(script), name, str(STEPS), str(BATCH)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdout.readline()

        def once() -> list[float]:
            run.stdin.write("\n")
            run.stdin.flush()
            return [float(word) for word in run.stdout.readline().split()]

        yield once
        run.stdin.close()


def twins(model: keras.Model, build: Callable[[], keras.Model], x: np.ndarray) -> dict[str, Callable[[], keras.Model]]:
    """Return what makes each technique's twin of a model."""
    schedule = dw.PolynomialDecay(end=10_000, frequency=100)
    every = dw.PolynomialDecay(end=10_000, frequency=1)
    return {
        "plain": lambda: model,
        "the same graph, plain": lambda: dw.lift(model),
        "int8 in training": lambda: dw.quantize(model, "int8", data=x[:64]),
        "int8 in training, learned ranges": lambda: dw.quantize(model, "int8", data=x[:64], ranges="learned"),
        "pruned, masks every 100 steps": lambda: dw.prune(model, 0.8, schedule=schedule),
        "pruned, masks every step": lambda: dw.prune(model, 0.8, schedule=every),
        "pruned, masks as they are": lambda: dw.prune(model, 0.8),
        "clustered, 16 values": lambda: dw.cluster(model, 16),
        "clustered, 64 values": lambda: dw.cluster(model, 64),
        "clustered, 256 values": lambda: dw.cluster(model, 256),
        "distilled from itself": lambda: dw.distill(build(), model),
    }


def samples(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return random samples and labels for an epoch."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 10, STEPS * BATCH)
    return generator.random((STEPS * BATCH, *shape)).astype(np.float32), y


def peak_bytes() -> int:
    """Return the most memory that this process has had resident."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report_own_memory(run: str) -> None:
    """Train one technique's MLP for two epochs; print the peak before it and at the end."""
    x, y = samples((784,))
    first = keras.Sequential([keras.Input((784,)), keras.layers.Dense(10, activation="softmax")])
    first.compile("adam", "sparse_categorical_crossentropy")
    first.fit(x, y, batch_size=BATCH, verbose=0)
    before = peak_bytes()
    twin = twins(mlp(), mlp, x)[run]()
    twin.compile("adam", "sparse_categorical_crossentropy")
    twin.fit(x, y, batch_size=BATCH, epochs=2, verbose=0)
    print(before, peak_bytes())


def report_memory(wanted: str) -> None:
    """Print the peak of resident memory of each technique in a process of its own."""
    found: dict[str, tuple[float, float]] = {}
    for run in twins(mlp(), mlp, samples((784,))[0]):
        if run != "plain" and wanted not in run:
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", run], capture_output=True, text=True, check=True
        )
        before, peak = (int(word) / 1e6 for word in done.stdout.splitlines()[-1].split())
        found[run] = (peak, peak - before)
        times = [mine / plain for mine, plain in zip(found[run], found["plain"], strict=True)]
        print(
            f"  {run:34} {peak:6.0f} MB, {times[0]:.2f}x plain; {peak - before:6.0f} MB on top of the frameworks, "
            f"{times[1]:.2f}x",
            flush=True,
        )


def main() -> None:
    """Print the time of a step of each technique in its fastest round, as a factor of the plain step's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tfmot")
    parser.add_argument("--only", help="part of the names of the techniques to time")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--model", choices=["MLP", "CNN"], help="one of the two models")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return report_own_memory(options.memory_of)
    if options.memory:
        return report_memory(options.only or "")
    for name, build, shape in (("MLP", mlp, (784,)), ("CNN", cnn, (28, 28, 1))):
        if options.model not in (None, name):
            continue
        x, y = samples(shape)
        model = build()
        wanted = options.only or ""
        makers = twins(model, build, x).items()
        runs = {run: make() for run, make in makers if "plain" in run or wanted in run}
        times: dict[str, list[float]] = {run: [] for run in runs}
        for run in runs.values():
            run.compile("adam", "sparse_categorical_crossentropy")
            run.fit(x, y, batch_size=BATCH, verbose=0)
        with peer(options.tfmot, name) as tfmot:
            pairs = []
            for _ in range(options.rounds):
                for run, twin in runs.items():
                    begun = time.perf_counter()
                    twin.fit(x, y, batch_size=BATCH, verbose=0)
                    times[run].append((time.perf_counter() - begun) / STEPS * 1000)
                pairs += [tfmot()] if tfmot is not None else []
        plain = min(times["plain"])  # what else the machine does only adds
        print(f"{name}, {model.count_params():,} parameters: a plain step takes {plain:.2f} ms")
        for run, taken in times.items():
            best, pairs_of = min(taken), np.divide(taken, times["plain"])
            print(
                f"  {run:34} {best / plain:.2f}x the plain step, {best:.2f} ms (median of the rounds' factors "
                f"{np.median(pairs_of):.2f})"
            )
        if pairs:
            own, *theirs = np.min(pairs, axis=0)
            for run, taken in zip(TFMOT_RUNS, theirs, strict=True):
                print(f"  {run:34} {taken / own:.2f}x its plain step of {own:.2f} ms, {taken:.2f} ms")


if __name__ == "__main__":
    main()
