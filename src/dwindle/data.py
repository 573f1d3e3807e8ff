"""The user's data: arrays, ``.npz`` files, image folders, a Python function, ``tf.data``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.errors import ConfigError, DataError

PARTS = ("train", "val", "test")
_KEYS = "x_train, y_train and, where there, x_val, y_val, x_test, y_test (x_train_0, x_train_1 ... for several inputs)"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of one part of the data.

    Attributes:
        x: One array per model input, shape ``(n, ...)``.
        y: Labels or targets, shape ``(n,)`` or ``(n, ...)``; None where there are none.
    """

    x: tuple[np.ndarray, ...]
    y: np.ndarray | None

    def __len__(self) -> int:
        return len(self.x[0])

    def take(self, count: int) -> Split:
        """Return at most ``count`` samples, spread evenly over all."""
        return self.pick(spread(len(self), count))

    def pick(self, indices: np.ndarray | slice) -> Split:
        """Return the samples at ``indices``, in that order."""
        return Split(x=tuple(array[indices] for array in self.x), y=None if self.y is None else self.y[indices])


def spread(available: int, count: int) -> np.ndarray | slice:
    """Return which ``count`` of ``available`` samples to take spread evenly; all where there are fewer."""
    return slice(None) if available <= count else np.linspace(0, available - 1, count).round().astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training, validation and test samples.

    Attributes:
        train: Samples to train with, or None.
        val: Samples that pick between candidates, or None.
        test: Samples that judge the result, or None.
        source: Where they came from.
        class_names: Names of the classes, where the source has them.
        sha256: Hash over all arrays.
    """

    train: Split | None
    val: Split | None
    test: Split | None
    source: str
    class_names: tuple[str, ...] | None
    sha256: str

    def evaluation(self) -> Split:
        """Return the samples that figures are measured on: test, else validation, else training samples."""
        found = self.test or self.val or self.train
        if found is None:
            raise DataError(f"data `{self.source}` has no samples")
        return found


def read_data(
    source: Any,
    *,
    rescale: float = 1.0,
    validation_fraction: float = 0.1,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
) -> Data:
    """Return the user's data from any of the forms that it may have.

    Args:
        source: `Data`; a dict with the names of an ``.npz``; a tuple ``(x, y)`` (evaluation samples); a
            ``tf.data.Dataset`` of ``(x, y)`` batches (evaluation samples); the path of an ``.npz`` or of a folder of
            images, one folder a class, with or without ``train``, ``val`` and ``test`` above; or ``module:function``,
            which is imported and called and returns one of these. That runs the function's code.
        rescale: Factor of the inputs, such as ``1 / 255`` for a model that was trained on pixels in [0, 1].
        validation_fraction: Share of the training samples that is set aside where there are no validation samples.
        seed: Seeds that choice.
        image_size: ``(height, width)`` to which images of a folder are resized; None: they must have one size.

    Raises:
        ConfigError: If an argument is not valid.
        DataError: If the data can't be read, has wrong names, is empty, or is not finite.
    """
    if not np.isfinite(rescale) or rescale == 0:
        raise ConfigError(f"`rescale` is {rescale!r}; it must be a factor other than 0, such as 1/255")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"`validation_fraction` is {validation_fraction!r}; it must lie in [0, 1)")
    if isinstance(source, Data):
        return source
    arrays, name, class_names = _arrays(source, image_size)
    if "x" not in arrays and not any(f"x_{part}" in arrays for part in PARTS) and not _numbered(arrays):
        raise DataError(f"data `{name}` has the arrays {', '.join(sorted(arrays)) or 'none'}; expected {_KEYS}")
    splits = {part: _split(arrays, part, rescale, name) for part in PARTS}
    if splits["val"] is None and splits["train"] is not None and validation_fraction > 0:
        splits["train"], splits["val"] = set_aside(splits["train"], validation_fraction, seed)
    return Data(
        train=splits["train"], val=splits["val"], test=splits["test"], source=name, class_names=class_names,
        sha256=_hash(splits),
    )  # fmt: skip


Named = tuple[dict[str, Any], str, tuple[str, ...] | None]


def _arrays(source: Any, image_size: tuple[int, int] | None) -> Named:
    """Return arrays by the names of an ``.npz``, where they are from, and the classes' names."""
    if isinstance(source, Mapping):
        return dict(source), "arrays", None
    if isinstance(source, tuple) and len(source) == 2:
        return {"x_test": source[0], "y_test": source[1]}, "arrays", None
    if isinstance(source, np.ndarray):
        return {"x_test": source}, "arrays", None
    if hasattr(source, "as_numpy_iterator"):
        return _from_dataset(source)
    if not isinstance(source, str | Path):
        raise DataError(
            f"data is a {type(source).__name__}; pass (x, y), a dict, a tf.data.Dataset, or the path of an .npz, "
            "an image folder or module:function"
        )
    path = Path(source)
    if path.is_dir():
        from dwindle.image_folders import read_images

        arrays, class_names = read_images(path, image_size)
        return arrays, str(source), class_names
    if path.exists():
        return _from_npz(path), str(source), None
    if ":" in str(source):
        return _from_function(str(source), image_size)
    raise DataError(f"data `{source}` does not exist; pass an .npz, an image folder, or module:function")


def _from_npz(path: Path) -> dict[str, Any]:
    try:
        # Opened here, so that it is closed also where NumPy finds it damaged.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"data `{path}` is one array, not an .npz with {_KEYS}")
            return {name: file[name] for name in file.files}
    except ValueError as error:
        if "pickle" in str(error) and zipfile.is_zipfile(path):
            raise DataError(
                f"data `{path}` has arrays of Python objects, which only pickle reads and dwindle does not; "
                "save them as numbers"
            ) from None
        raise DataError(f"data `{path}` is no .npz file, or a damaged one; write one with np.savez") from None
    except (OSError, zipfile.BadZipFile, EOFError, KeyError):
        raise DataError(f"data `{path}` is no .npz file, or a damaged one; write one with np.savez") from None


def _from_dataset(dataset: Any) -> Named:
    inputs: list[list[np.ndarray]] = []
    labels: list[np.ndarray] = []
    for batch in dataset.as_numpy_iterator():
        x, y = batch if isinstance(batch, tuple) and len(batch) >= 2 else (batch, None)
        parts = list(x) if isinstance(x, tuple | list) else [x]
        inputs = inputs or [[] for _ in parts]
        for collected, part in zip(inputs, parts, strict=True):
            collected.append(np.asarray(part))
        if y is not None:
            labels.append(np.asarray(y))
    if not inputs:
        raise DataError("the tf.data.Dataset has no batches")
    if inputs[0][0].ndim == 0:
        raise DataError("the tf.data.Dataset gives single values; batch it, such as dataset.batch(64)")
    found: dict[str, Any] = {"x_test": [np.concatenate(parts) for parts in inputs]}
    if labels:
        found["y_test"] = np.concatenate(labels)
    return found, "tf.data", None


def _from_function(source: str, image_size: tuple[int, int] | None) -> Named:
    """Import ``module:function`` (or ``file.py:function``), call it, and read what it returns."""
    module_name, _, function_name = source.rpartition(":")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            if spec is None or spec.loader is None or not Path(module_name).exists():
                raise DataError(f"data `{source}`: there is no file `{module_name}`")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.remove(os.getcwd())
        function = getattr(module, function_name, None)
        if not callable(function):
            raise DataError(f"data `{source}`: `{module_name}` has no function `{function_name}`")
        returned = function()
    except DataError:
        raise
    except Exception as error:  # the user's own code
        raise DataError(f"data `{source}`: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if isinstance(returned, Data):
        parts = {"train": returned.train, "val": returned.val, "test": returned.test}
        arrays: dict[str, Any] = {}
        for part, split in parts.items():
            if split is not None:
                arrays[f"x_{part}"], arrays[f"y_{part}"] = list(split.x), split.y
        return arrays, source, returned.class_names
    found, _, class_names = _arrays(returned, image_size)
    return found, source, class_names


def _split(arrays: Mapping[str, Any], part: str, rescale: float, name: str) -> Split | None:
    """Return one part from arrays by name, checked."""
    given = arrays.get(f"x_{part}", _numbered(arrays, part) or None)
    labels = arrays.get(f"y_{part}")
    if part == "test" and given is None and "x" in arrays:
        given, labels = arrays["x"], arrays.get("y")
    if given is None:
        return None
    inputs = [np.asarray(array) for array in (given if isinstance(given, list | tuple) else [given])]
    y = None if labels is None else np.asarray(labels)
    for label, array in (*((f"x_{part}", array) for array in inputs), (f"y_{part}", y)):
        if array is not None:
            _check(array, label, name)
    counts = {len(array) for array in (*inputs, *([] if y is None else [y]))}
    if len(counts) > 1:
        raise DataError(
            f"data `{name}`: `x_{part}` and `y_{part}` have {', '.join(map(str, sorted(counts)))} samples; "
            "they must have the same number"
        )
    if rescale != 1.0:
        inputs = [(array * rescale).astype(np.float32) for array in inputs]
    if y is not None and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return Split(x=tuple(inputs), y=y)


def _numbered(arrays: Mapping[str, Any], part: str | None = None) -> list[Any]:
    found = []
    for candidate in (part,) if part else PARTS:
        number = 0
        while f"x_{candidate}_{number}" in arrays:
            found.append(arrays[f"x_{candidate}_{number}"])
            number += 1
    return found


def _check(array: np.ndarray, label: str, name: str) -> None:
    if array.dtype == object or array.dtype.kind not in "biuf":
        raise DataError(f"data `{name}`: `{label}` holds {array.dtype}, not numbers; convert it")
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"data `{name}`: `{label}` is empty; pass at least one sample")
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if bad.any():
            raise DataError(
                f"data `{name}`: `{label}` has NaN or infinite values in {int(bad.sum())} of {len(array)} samples, "
                f"the first at index {int(bad.argmax())}; remove or repair them"
            )


def set_aside(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Return some samples in two parts, evenly over the classes where labels are integers.

    Args:
        train: The samples.
        fraction: Share that the second part gets.
        seed: Seeds which go where.

    Returns:
        Both parts; all samples and None where there are too few.
    """
    generator = np.random.default_rng(seed)
    groups = [np.arange(len(train))]
    if train.y is not None and train.y.ndim == 1 and train.y.dtype.kind in "iu":
        groups = [np.flatnonzero(train.y == label) for label in np.unique(train.y)]
    aside = np.concatenate([generator.permutation(group)[: int(len(group) * fraction)] for group in groups])
    if len(aside) == 0:
        return train, None
    mask = np.zeros(len(train), dtype=bool)
    mask[aside] = True
    return train.pick(np.flatnonzero(~mask)), train.pick(np.flatnonzero(mask))


def _hash(splits: Mapping[str, Split | None]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        split = splits[part]
        if split is None:
            continue
        for array in (*split.x, *([] if split.y is None else [split.y])):
            digest.update(f"{part}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fit_to_model(
    data: Data,
    input_shapes: Sequence[tuple[int | None, ...]],
    output_units: int | None,
    *,
    input_dtypes: Sequence[str] | None = None,
) -> Data:
    """Return the data in the shape and type that a model takes.

    A missing channel axis is added, ``(28, 28)`` to ``(28, 28, 1)``, and images are flattened for a model that takes
    vectors of just that size. Nothing else is changed: images are not resized.

    Args:
        data: The user's data.
        input_shapes: Shape of each model input without the batch axis, None for any size.
        output_units: Classes that the model tells apart; labels must lie below. None or 1: not checked.
        input_dtypes: Type of each input, float32 where left out.

    Raises:
        DataError: If samples do not fit an input, or labels lie outside the classes.
    """
    dtypes = list(input_dtypes or ["float32"] * len(input_shapes))
    fitted: dict[str, Split | None] = {}
    for part in PARTS:
        split: Split | None = getattr(data, part)
        if split is None:
            fitted[part] = None
            continue
        if len(split.x) != len(input_shapes):
            raise DataError(
                f"data `{data.source}`: `x_{part}` has {len(split.x)} arrays and the model has {len(input_shapes)} "
                "inputs"
            )
        inputs = tuple(
            _fit(array, tuple(shape), dtype, f"x_{part}", data.source)
            for array, shape, dtype in zip(split.x, input_shapes, dtypes, strict=True)
        )
        _check_labels(split.y, output_units, f"y_{part}", data.source)
        fitted[part] = Split(x=inputs, y=split.y)
    return replace(data, **fitted)  # type: ignore[arg-type]


def _fit(array: np.ndarray, shape: tuple[int | None, ...], dtype: str, label: str, name: str) -> np.ndarray:
    have = array.shape[1:]

    def matches(sizes: tuple[int, ...]) -> bool:
        return len(sizes) == len(shape) and all(want in (None, size) for want, size in zip(shape, sizes, strict=True))

    if matches(have):
        fitted = array
    elif matches((*have, 1)):
        fitted = array[..., None]
    elif len(have) > 1 and matches((int(np.prod(have)),)):
        fitted = array.reshape(len(array), -1)
    else:
        raise DataError(
            f"data `{name}`: `{label}` has samples of shape {have} and the model's input has {shape}; "
            "resize or reshape the samples, or pass the model that they are for"
        )
    return fitted.astype(dtype, copy=False)


def _check_labels(y: np.ndarray | None, units: int | None, label: str, name: str) -> None:
    if y is None or units is None or units < 2 or y.ndim != 1 or y.dtype.kind not in "iub":
        return
    bad = (y < 0) | (y >= units)
    if bad.any():
        raise DataError(
            f"data `{name}`: `{label}` has label {int(y[bad][0])} ({int(bad.sum())} of {len(y)} labels lie outside), "
            f"and the model has {units} classes, 0 to {units - 1}; check the labels or the model"
        )


def load_demo_data(full: bool | None = None) -> Data:
    """Return MNIST digits, shape ``(28, 28, 1)``, float32 in [0, 1].

    Args:
        full: True: all of MNIST from the Keras cache (``~/.keras/datasets/mnist.npz``); False: the 17,000 digits that
            ship with dwindle; None: all where the cache has it.

    Raises:
        DataError: If ``full`` is True and the cache has none.
    """
    cache = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets" / "mnist.npz"
    if full or (full is None and cache.exists()):
        if not cache.exists():
            raise DataError(f"`{cache}` does not exist; keras.datasets.mnist.load_data() fetches it")
        found = read_data(cache, rescale=1 / 255, validation_fraction=1 / 12)
        found = replace(found, source="MNIST (70,000 digits, Keras cache)")
    else:
        with files("dwindle").joinpath("demo_data/mnist.npz").open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
        found = replace(read_data(arrays, rescale=1 / 255), source="MNIST (the 17,000 digits that ship with dwindle)")
    return fit_to_model(found, [(28, 28, 1)], 10)
