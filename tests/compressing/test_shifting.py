"""Shifted images."""

from __future__ import annotations

import keras
import numpy as np

import dwindle as dw
from dwindle.compressing.shifting import Shifted, shifts
from dwindle.data import Split

L = keras.layers


def test_each_image_is_shifted_by_its_own_pixels_and_keeps_its_label():
    x = np.random.default_rng(0).random((50, 20, 30, 2), np.float32)
    y = np.arange(50)
    moved = Shifted(x, y, 0.1, batch_size=16, seed=0)
    epochs = [[moved[index] for index in range(len(moved))] for _ in range(2) if moved.on_epoch_end() is None]
    assert [len(labels) for _, labels in epochs[0]] == [16, 16, 16, 2]
    found = set()
    for epoch in epochs:
        assert sorted(np.concatenate([labels for _, labels in epoch])) == list(range(50))
        for images, labels in epoch:
            for image, label in zip(images, labels, strict=True):
                padded = np.pad(x[label], ((2, 2), (3, 3), (0, 0)), mode="edge")
                offsets = [
                    (dy, dx)
                    for dy in range(5)
                    for dx in range(7)
                    if np.array_equal(image, padded[dy : dy + 20, dx : dx + 30])
                ]
                assert len(offsets) == 1
                found.add(offsets[0])
    assert len(found) > 25  # of 35, in 100 draws
    again = Shifted(x, y, 0.1, batch_size=16, seed=0)
    again.on_epoch_end()
    np.testing.assert_array_equal(again[0][0], epochs[0][0][0])


def test_shifts_are_for_images_that_have_a_class():
    def network(*shape, ends=False):
        inputs = keras.Input(shape)
        x = L.Conv2D(2, 3, padding="same")(inputs) if len(shape) == 3 else inputs
        return keras.Model(inputs, x if ends else L.Dense(3)(L.Flatten()(x)))

    def split(*shape, y=(0, 1, 2, 2)):
        return Split(x=(np.zeros((4, *shape), np.float32),), y=np.array(y))

    assert shifts(network(16, 20, 3), split(16, 20, 3))
    assert shifts(network(16, 20, 3), split(16, 20, 3, y=np.eye(3)[[0, 1, 2, 2]]))
    assert shifts(network(16, 20, 3), split(16, 20, 3, y=np.full((4, 3), 1 / 3)))
    assert not shifts(network(16, 20, 3), split(16, 20, 3, y=np.full((4, 3), 0.7)))  # places of something
    assert not shifts(network(16, 20, 3), None)
    assert not shifts(network(8, 20, 3), split(8, 20, 3))
    assert not shifts(network(20), split(20))
    assert not shifts(network(16, 20, 3, ends=True), split(16, 20, 3))


def test_a_plan_may_shift_images_and_only_images(task, tmp_path, monkeypatch):
    inputs = keras.Input((16, 16, 1))
    model = keras.Model(inputs, L.Dense(3, activation="softmax")(L.Flatten()(L.Conv2D(4, 3)(inputs))))
    model.compile("adam", "sparse_categorical_crossentropy")
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 300)
    x = generator.normal(0, 0.3, (300, 16, 16, 1)).astype(np.float32)
    x[np.arange(300), 4 * y + 3, 5] += 3.0
    model.fit(x, y, epochs=2, verbose=0)
    training = {"epochs": 2, "learning_rate": 1e-3, "shift": 0.07}
    plan = dw.Plan(name="moved", steps=(("shrink", {"width": 0.5}), ("train", training), ("export", {})))
    options = {"goals": dw.Goals(max_drop=0.9), "data": {"x_train": x, "y_train": y, "x_val": x, "y_val": y}}
    batches = []

    class Watched(Shifted):
        def __getitem__(self, index):
            images, labels = super().__getitem__(index)
            batches.append(images)
            return images, labels

    monkeypatch.setattr("dwindle.compressing.steps.Shifted", Watched)
    found = [dw.compress(model, plan=plan, out=tmp_path / name, **options) for name in ("one", "two")]
    assert found[0].report["result"]["sha256"] == found[1].report["result"]["sha256"]
    assert len(batches) >= 2 * 2 * 5
    as_they_were = [(image == x).all(axis=(1, 2, 3)).any() for image in np.concatenate(batches)]
    assert 0.05 < np.mean(as_they_were) < 0.2  # one of nine
    vectors, parts = task
    data = {f"{part}_{kind}": array for kind, pair in parts.items() for part, array in zip("xy", pair, strict=True)}
    failed = dw.compress(vectors, plan=plan, goals=dw.Goals(max_drop=0.9), data=data, out=tmp_path / "three")
    assert "`shift: 0.07`, which is for models that take one image" in failed.report["trials"][1]["reason"]
