"""Shifted images: each epoch sees the training images a few pixels off, and the original says what it makes of them."""

from __future__ import annotations

import keras
import numpy as np

from dwindle.data import Split

# Images smaller than this show too little of their object once they are shifted.
SMALLEST = 16
# Largest shift as a share of height and width.
LARGEST_SHIFT = 0.5


def shifts(model: keras.Model, split: Split | None) -> bool:
    """Whether shifts are tried: one input of images, and a class for each, which does not move with the image."""
    if split is None or split.y is None or len(split.x) != 1 or len(model.inputs) != 1 or len(model.outputs) != 1:
        return False
    shape = model.inputs[0].shape
    images = len(shape) == 4 and all(side is not None and side >= SMALLEST for side in shape[1:3])
    return images and len(model.outputs[0].shape) == 2 and _classes(np.asarray(split.y), model.outputs[0].shape[1])


def _classes(y: np.ndarray, units: int) -> bool:
    """Whether labels are numbers of classes, or say of each class whether or how surely it is there, not places."""
    numbers = units > 1 and (y.ndim == 1 or y.shape[1:] == (1,))
    shares = y.ndim == 2 and y.shape[1] > 1 and bool((y >= 0).all() and np.allclose(y.sum(axis=1), 1))
    return numbers or shares or bool(np.isin(y, (0, 1)).all())


class Shifted(keras.utils.PyDataset):
    """Batches in random order, each image shifted by its own number of pixels; its edges are repeated.

    Args:
        x: Images, shape ``(n, height, width, channels)``.
        y: Labels.
        share: Largest shift as a share of height and width, in (0, `LARGEST_SHIFT`].
        batch_size: Samples of a batch.
        seed: Seeds order and shifts.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, share: float, batch_size: int, seed: int) -> None:
        super().__init__()
        self._x, self._y, self._batch = x, y, batch_size
        self._most = [max(1, round(share * side)) for side in x.shape[1:3]]
        self._generator = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-len(self._x) // self._batch)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch."""
        part = slice(index * self._batch, (index + 1) * self._batch)
        chosen, moved = self._order[part], self._moved[part]
        rows, columns = (
            np.clip(np.arange(side) + moved[:, axis, None], 0, side - 1) for axis, side in enumerate(self._x.shape[1:3])
        )
        return self._x[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], self._y[chosen]

    def on_epoch_end(self) -> None:
        """Choose the next epoch's order and shifts."""
        self._order = self._generator.permutation(len(self._x))
        self._moved = np.stack([self._generator.integers(-most, most + 1, len(self._x)) for most in self._most], axis=1)
