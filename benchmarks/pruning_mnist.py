"""LeNet-300-100 and LeNet-5 with a small fraction of their weights, on all of MNIST.

python benchmarks/pruning_mnist.py --data mnist.npz [--network mlp|conv] [--times 60] [--seeds 0 1 2]

A network is trained, then pruned a little and trained an epoch, again and again: one global ranking by magnitude each
time, and sparsity rising by the cubic schedule. Training images are shifted by up to one pixel. `--times` counts
weights of kernels, as the papers do; the line printed gives the biases as well.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np

import dwindle as dw

#: Times fewer weights; epochs dense, epochs while pruning, and epochs after it.
RECIPES = {"mlp": (60, 5, 30, 25), "conv": (100, 3, 12, 12)}
BATCH = 256


def mlp() -> keras.Model:
    """Return LeNet-300-100: 266,200 weights and 410 biases."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"), layers.Dense(10),
        ]
    )  # fmt: skip


def conv() -> keras.Model:
    """Return LeNet-5 as Caffe has it: 430,500 weights and 580 biases."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)), layers.Conv2D(20, 5), layers.MaxPooling2D(), layers.Conv2D(50, 5),
            layers.MaxPooling2D(), layers.Flatten(), layers.Dense(500, activation="relu"), layers.Dense(10),
        ]
    )  # fmt: skip


class Shifted(keras.utils.PyDataset):
    """Batches in random order, each shifted by up to a pixel both ways."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.generator = np.random.default_rng(seed)
        self.order = self.generator.permutation(len(x))

    def __len__(self) -> int:
        return len(self.x) // BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        return np.roll(self.x[chosen], self.generator.integers(-1, 2, size=2), axis=(1, 2)), self.y[chosen]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.generator.permutation(len(self.x))


def run(
    network: str,
    times: float,
    data: dict[str, np.ndarray],
    seed: int,
    epochs: tuple[int, int, int],
    folder: Path | None,
) -> dict:
    """Train, prune and train on; return what came out, and keep the model where a folder is given."""
    keras.utils.set_random_seed(seed)
    begun = time.perf_counter()
    model = {"mlp": mlp, "conv": conv}[network]()
    train = Shifted(data["x_train"], data["y_train"], seed)
    dense, pruning, after = epochs
    total, done, peak = sum(epochs), 0, 3e-3 if network == "mlp" else 2e-3

    def fit(model: keras.Model, count: int) -> None:
        nonlocal done
        steps = total * len(train)
        rates = keras.optimizers.schedules.CosineDecay(peak, steps, alpha=0.02)
        optimizer = keras.optimizers.Adam(peak)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        for _ in range(count):
            optimizer.learning_rate = float(rates(done * len(train)))
            model.fit(train, epochs=1, verbose=0)
            done += 1

    def error(model: keras.Model) -> float:
        return 100 * (1 - model.evaluate(data["x_test"], data["y_test"], batch_size=1000, verbose=0)[1])

    fit(model, dense)
    original = error(model)
    final = 1 - 1 / times
    for number in range(1, pruning + 1):
        sparsity = final * (1 - (1 - number / pruning) ** 3)
        # The penalty pushes what does not matter towards zero until the last are removed.
        model = dw.prune(model, sparsity, scope="global", l1=1e-5)
        fit(model, 1)
    model = dw.prune(dw.finalize(model), final, scope="global")
    fit(model, after)
    plain = dw.finalize(model)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        plain.save(folder / f"{network}-{times:g}-{seed}.keras")
    kernels = [variable.numpy() for variable in plain.trainable_variables if len(variable.shape) > 1]
    kept = [int((kernel != 0).sum()) for kernel in kernels]
    biases = plain.count_params() - sum(kernel.size for kernel in kernels)
    return {
        "network": network,
        "seed": seed,
        "weights": sum(kernel.size for kernel in kernels),
        "kept": sum(kept),
        "kept_by_layer": kept,
        "biases": biases,
        "times_fewer": round(sum(kernel.size for kernel in kernels) / sum(kept), 1),
        "error_before_percent": round(original, 2),
        "error_percent": round(error(model), 2),
        "seconds": round(time.perf_counter() - begun),
    }


def main() -> None:
    """Print a line of JSON a seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist.npz of keras.datasets")
    parser.add_argument("--network", choices=sorted(RECIPES), nargs="+", default=sorted(RECIPES))
    parser.add_argument("--times", type=float, nargs="+", help="times fewer weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder for the pruned models")
    parser.add_argument("--epochs", type=int, nargs=3, help="dense, while pruning, after")
    options = parser.parse_args()
    with np.load(options.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    for name in ("x_train", "x_test"):
        data[name] = (data[name] / np.float32(255)).astype(np.float32).reshape(-1, 28, 28, 1)
    for network in options.network:
        times, *epochs = RECIPES[network]
        for wanted in options.times or [times]:
            results = []
            for seed in options.seeds:
                results.append(run(network, wanted, data, seed, tuple(options.epochs or epochs), options.out))
                print(json.dumps(results[-1]), flush=True)
            errors = [result["error_percent"] for result in results]
            print(
                f"{network}: {results[0]['times_fewer']} times fewer weights, error {np.mean(errors):.2f}% "
                f"({min(errors):.2f} to {max(errors):.2f})"
            )


if __name__ == "__main__":
    main()
