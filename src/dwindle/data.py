"""The user's data: arrays, ``.npz`` files, image folders, a Python function, ``tf.data``."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwindle.errors import ConfigError, DataError, check_choice
from dwindle.reading import PARTS, call_function, check_names, read_dataset, read_npz


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
        """Return the number of samples."""
        return len(self.x[0])

    def take(self, count: int) -> Split:
        """Return the first ``count`` samples."""
        return Split(x=tuple(array[:count] for array in self.x), y=None if self.y is None else self.y[:count])

    def shuffled(self, seed: int) -> Split:
        """Return all samples in a random order that ``seed`` fixes, as new arrays."""
        return self.pick(np.random.default_rng(seed).permutation(len(self)))

    def pick(self, indices: np.ndarray | slice) -> Split:
        """Return the samples at ``indices``, in that order."""
        return Split(x=tuple(array[indices] for array in self.x), y=None if self.y is None else self.y[indices])


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training, validation and test samples.

    Attributes:
        train: Samples to train with, or None.
        val: Samples that pick between candidates, or None.
        test: Samples that judge the result, or None.
        source: Where they came from.
        class_names: Names of the classes, where the source has them.
        sha256: Hash over the names, shapes, types and contents of all arrays as `read_data` gave them, hexadecimal;
            `fit_to_model` keeps it, so that it tells where the samples are from.
    """

    train: Split | None
    val: Split | None
    test: Split | None
    source: str
    class_names: tuple[str, ...] | None
    sha256: str

    def evaluation(self) -> Split:
        """Return the samples that figures are measured on: test, else validation, else training samples.

        Raises:
            DataError: If there are none.
        """
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
    as_training: bool = False,
    image_size: tuple[int, int] | None = None,
    color: str | None = None,
) -> Data:
    """Return the user's data from any of the forms that it may have.

    Types are kept (uint8 images stay uint8) unless ``rescale`` is given; labels of shape ``(n, 1)`` become ``(n,)``.

    Args:
        source: `Data`, returned as it is; a dict with the names of an ``.npz``; a tuple ``(x, y)``; a
            ``tf.data.Dataset`` of ``(x, y)`` batches; the path of an ``.npz`` (``x_train``, ``y_train``, ..., or ``x``,
            ``y``; arrays of other names are left alone) or of a folder of images, one folder a class, with or without
            ``train``, ``val`` and ``test`` above; or ``module:function`` (``mydata.py:load``), which is imported and
            called and returns one of the others. That runs the user's own code. ``x`` is an array, or a list or tuple
            of one array per model input.
        rescale: Factor of the inputs, such as ``1 / 255`` for a model that was trained on pixels in [0, 1]; other than
            1 it makes them float32.
        validation_fraction: Share of the training samples, in [0, 1), that is set aside where there are no validation
            samples: at least one, evenly over the classes where labels are integers. 0: none.
        seed: Seeds that choice.
        as_training: What samples without a part's name are (a tuple, a ``tf.data.Dataset``, ``x`` and ``y``): False,
            samples to evaluate with (`Data.test`); True, samples to train with.
        image_size: ``(height, width)`` to which images of a folder are resized; None: they must have one size.
        color: ``"rgb"`` or ``"grayscale"`` for images of a folder; None: grayscale if every file is.

    Returns:
        New `Data`; its arrays may share memory with arrays that were passed.

    Raises:
        ConfigError: If an argument is not valid, or has no meaning for this source.
        DataError: If the data can't be read, has wrong names, is empty, or is not finite.

    Example:
        >>> import numpy as np
        >>> data = read_data({"x_train": np.zeros((20, 4)), "y_train": np.arange(20) % 2})
        >>> len(data.train), len(data.val), data.test
        (18, 2, None)
    """
    _check_arguments(rescale, validation_fraction, image_size, color)
    if isinstance(source, Data):
        if rescale != 1.0 or image_size is not None or color is not None or as_training:
            raise ConfigError("`source` is Data, which is returned as it is; leave out the other arguments")
        return source
    arrays, name, class_names = _arrays(source, image_size, color)
    if (image_size is not None or color is not None) and class_names is None:
        raise ConfigError(f"`image_size` and `color` are for folders of images, and data `{name}` is none; omit them")
    check_names(arrays, name)
    if as_training and any(f"{axis}_{part}" in arrays for axis in "xy" for part in ("val", "test")):
        raise ConfigError(f"`as_training` is True, and data `{name}` names its own parts; leave it out")
    unnamed = "train" if as_training else "test"
    arrays = {f"{key}_{unnamed}" if key in ("x", "y") else key: array for key, array in arrays.items()}
    splits = {part: _split(arrays, part, rescale, name) for part in PARTS}
    if splits["val"] is None and splits["train"] is not None and validation_fraction > 0:
        splits["train"], splits["val"] = _set_aside(splits["train"], validation_fraction, seed)
    return _data(splits, name, class_names)


def _check_arguments(rescale: float, fraction: float, image_size: tuple[int, int] | None, color: str | None) -> None:
    if not np.isfinite(rescale) or rescale == 0:
        raise ConfigError(f"`rescale` is {rescale!r}; it must be a factor other than 0, such as 1/255")
    if not 0 <= fraction < 1:
        raise ConfigError(f"`validation_fraction` is {fraction!r}; it must lie in [0, 1)")
    if image_size is not None and (len(image_size) != 2 or any(size < 1 for size in image_size)):
        raise ConfigError(f"`image_size` is {image_size!r}; it must be (height, width) in pixels, such as (32, 32)")
    if color is not None:
        check_choice("color", color, ("rgb", "grayscale"))


class Found(NamedTuple):
    """Arrays by the names of an ``.npz`` (``x`` and ``y`` where they have no part), where from, and the classes."""

    arrays: dict[str, Any]
    name: str
    class_names: tuple[str, ...] | None


def _arrays(source: Any, image_size: tuple[int, int] | None, color: str | None) -> Found:
    if isinstance(source, Mapping):
        return Found({str(key): array for key, array in source.items() if array is not None}, "arrays", None)
    if isinstance(source, Data):
        splits = {part: getattr(source, part) for part in PARTS}
        named = {f"x_{part}": split.x for part, split in splits.items() if split is not None}
        labels = {f"y_{part}": split.y for part, split in splits.items() if split is not None and split.y is not None}
        return Found({**named, **labels}, source.source, source.class_names)
    if isinstance(source, np.ndarray):
        return Found({"x": source}, "arrays", None)
    if isinstance(source, tuple) and len(source) == 2:
        return Found({"x": source[0]} if source[1] is None else {"x": source[0], "y": source[1]}, "arrays", None)
    if hasattr(source, "as_numpy_iterator"):
        return Found(read_dataset(source), "tf.data", None)
    if not isinstance(source, str | Path):
        raise DataError(
            f"data is a {type(source).__name__}; pass (x, y), a dict, a tf.data.Dataset, or the path of an .npz, "
            "an image folder or module:function"
        )
    path = Path(source)
    if path.is_dir():
        from dwindle.image_folders import read_images

        arrays, class_names = read_images(path, image_size, color)
        return Found(arrays, str(source), class_names)
    if path.exists():
        return Found(read_npz(path), str(source), None)
    if ":" in str(source):
        returned = call_function(str(source))
        if isinstance(returned, str) and not Path(returned).exists():
            raise DataError(f"data `{source}` returned {returned!r}, which does not exist; return arrays or a path")
        return _arrays(returned, image_size, color)._replace(name=str(source))
    raise DataError(f"data `{source}` does not exist; pass an .npz, an image folder, or module:function")


def _split(arrays: Mapping[str, Any], part: str, rescale: float, name: str) -> Split | None:
    """Return one part from arrays by name, checked."""
    numbered = list(itertools.takewhile(arrays.__contains__, (f"x_{part}_{i}" for i in itertools.count())))
    given = arrays.get(f"x_{part}", [arrays[key] for key in numbered] or None)
    if given is None:
        return None
    several = isinstance(given, list | tuple)
    inputs = {
        f"x_{part}_{number}" if several and len(given) > 1 else f"x_{part}": array
        for number, array in enumerate(given if several else [given])
    }
    if not inputs:
        raise DataError(f"data `{name}`: `x_{part}` is empty; pass one array per model input")
    checked = {label: _checked(array, label, name) for label, array in inputs.items()}
    answers = arrays.get(f"y_{part}")
    y = None if answers is None else _checked(answers, f"y_{part}", name)
    lengths = {label: len(array) for label, array in (*checked.items(), *([] if y is None else [(f"y_{part}", y)]))}
    if len(set(lengths.values())) > 1:
        listed = " and ".join(f"`{label}` has {length}" for label, length in lengths.items())
        raise DataError(f"data `{name}`: {listed} samples; they must have the same number")
    x = tuple(checked.values())
    if rescale != 1.0:
        x = tuple(np.multiply(array, rescale, dtype=np.float64).astype(np.float32) for array in x)
    if y is not None and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return Split(x=x, y=y)


def _checked(given: Any, label: str, name: str) -> np.ndarray:
    """Return an array of finite numbers with at least one sample."""
    try:
        array = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise DataError(f"data `{name}`: `{label}` is no array ({error}); its samples must have one shape") from None
    if array.dtype.kind not in "biuf":
        raise DataError(f"data `{name}`: `{label}` holds {array.dtype}, not numbers; convert it")
    if array.ndim == 0:
        raise DataError(f"data `{name}`: `{label}` is the single number {array}; pass an array of shape (n, ...)")
    if len(array) == 0:
        raise DataError(f"data `{name}`: `{label}` is empty; pass at least one sample")
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if bad.any():
            raise DataError(
                f"data `{name}`: `{label}` has NaN or infinite values in {int(bad.sum())} of {len(array)} samples, "
                f"the first at index {int(bad.argmax())}; remove or repair them"
            )
    return array


def _set_aside(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Carve validation samples out of the training samples, evenly over the classes where labels are integers."""
    if len(train) < 2:
        return train, None
    total = min(max(1, round(len(train) * fraction)), len(train) - 1)
    generator = np.random.default_rng(seed)
    groups = [np.arange(len(train))]
    if train.y is not None and train.y.ndim == 1 and train.y.dtype.kind in "biu":
        groups = [np.flatnonzero(train.y == label) for label in np.unique(train.y)]
    shuffled = [generator.permutation(group) for group in groups]
    shares = np.array([len(group) * fraction for group in groups])
    counts = np.floor(shares + 1e-9).astype(int)
    # What rounding down leaves goes to the classes that lost most by it, at random among equals.
    remainders = np.round(shares - counts, 9)
    counts[np.lexsort((generator.random(len(groups)), -remainders))[: max(0, total - counts.sum())]] += 1
    aside = np.concatenate([group[:count] for group, count in zip(shuffled, counts, strict=True)])
    mask = np.zeros(len(train), dtype=bool)
    mask[aside] = True
    return train.pick(np.flatnonzero(~mask)), train.pick(np.flatnonzero(mask))


def _data(splits: Mapping[str, Split | None], source: str, class_names: tuple[str, ...] | None) -> Data:
    digest = hashlib.sha256()
    for part in PARTS:
        split = splits[part]
        if split is None:
            continue
        named = [(f"x_{part}_{number}", array) for number, array in enumerate(split.x)]
        for label, array in (*named, *([] if split.y is None else [(f"y_{part}", split.y)])):
            digest.update(f"{label} {array.shape} {array.dtype.str};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return Data(
        train=splits["train"], val=splits["val"], test=splits["test"], source=source, class_names=class_names,
        sha256=digest.hexdigest(),
    )  # fmt: skip


def fit_to_model(
    data: Data,
    input_shapes: Sequence[tuple[int | None, ...]],
    output_units: int | None,
    *,
    input_dtypes: Sequence[str] | None = None,
) -> Data:
    """Return the data in the shape and type that a model takes.

    A missing channel axis is added, ``(28, 28)`` to ``(28, 28, 1)``, and images are flattened for a model that takes
    vectors of just that size. Nothing else is changed: images are not resized, labels are kept.

    Args:
        data: The user's data.
        input_shapes: Shape of each model input without the batch axis, None for any size.
        output_units: Classes that the model tells apart; integer labels ``(n,)`` must lie below. None or 1: unchecked.
        input_dtypes: Type of each input; None: float32 for all, what Keras inputs are unless told otherwise.

    Returns:
        New `Data` with the same ``sha256``; arrays that fit already are not copied.

    Raises:
        ConfigError: If ``input_dtypes`` are not as many as inputs, or one is no type.
        DataError: If samples do not fit an input or its type, or labels lie outside the classes.
    """
    dtypes = list(["float32"] * len(input_shapes) if input_dtypes is None else input_dtypes)
    if len(dtypes) != len(input_shapes):
        raise ConfigError(
            f"`input_dtypes` has {len(dtypes)} types; it must have one for each of {len(input_shapes)} inputs"
        )
    fitted: dict[str, Split | None] = {}
    for part in PARTS:
        split: Split | None = getattr(data, part)
        if split is None:
            fitted[part] = None
            continue
        if len(split.x) != len(input_shapes):
            raise DataError(
                f"data `{data.source}`: `x_{part}` has {len(split.x)} arrays and the model has {len(input_shapes)} "
                "inputs; pass one array per input, in the model's order"
            )
        labels = [f"x_{part}_{number}" if len(split.x) > 1 else f"x_{part}" for number in range(len(split.x))]
        inputs = tuple(
            _fit(array, tuple(shape), dtype, label, data.source)
            for array, shape, dtype, label in zip(split.x, input_shapes, dtypes, labels, strict=True)
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
    elif shape[-1:] == (1,) and matches((*have, 1)):
        fitted = array[..., None]
    elif len(have) > 1 and shape == (int(np.prod(have)),):
        fitted = array.reshape(len(array), -1)
    else:
        raise DataError(
            f"data `{name}`: `{label}` has samples of shape {have} and the model's input has {shape}; "
            "resize or reshape the samples, or pass the model that they are for"
        )
    return _cast(fitted, dtype, label, name)


def _cast(array: np.ndarray, dtype: str, label: str, name: str) -> np.ndarray:
    """Return the array in a type that holds its values: whole numbers stay whole, none overflows."""
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        raise ConfigError(f"`input_dtypes` has {dtype!r}; it must be a type of numbers, such as 'float32'") from None
    if wanted.kind in "iu" and not np.can_cast(array.dtype, wanted):
        limits = np.iinfo(wanted)
        lost = (array < limits.min) | (array > limits.max) | (array != np.trunc(array))
    elif wanted == np.float16:
        lost = np.abs(array.astype(np.float64)) > np.finfo(wanted).max
    else:
        return array.astype(wanted, copy=False)
    if lost.any():
        raise DataError(
            f"data `{name}`: `{label}` has {int(lost.sum())} values, such as {array[lost][0]}, that the model's input "
            f"of type {wanted} can't hold; scale them as in training"
        )
    return array.astype(wanted, copy=False)


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
            ship with dwindle; None: all where the cache has it. Of all of MNIST the last 5,000 training images, after a
            shuffle with a fixed seed, are the validation samples. ``KERAS_HOME`` moves the cache.

    Returns:
        Labels are integers, 0 to 9, shape ``(n,)``.

    Raises:
        DataError: If ``full`` is True and the cache has none, or the cache's file is damaged.
    """
    cache = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets" / "mnist.npz"
    if full or (full is None and cache.exists()):
        if not cache.exists():
            raise DataError(f"`{cache}` does not exist; keras.datasets.mnist.load_data() fetches it")
        read = read_data(cache, rescale=1 / 255, validation_fraction=0)
        if read.train is None:
            raise DataError(f"`{cache}` has no `x_train`; keras.datasets.mnist.load_data() fetches it anew")
        shuffled = read.train.shuffled(seed=0)
        kept = len(shuffled) - len(shuffled) // 12  # the last 5,000 of 60,000 validate
        splits = {"train": shuffled.take(kept), "val": shuffled.pick(slice(kept, None)), "test": read.test}
        found = _data(splits, "MNIST (70,000 digits, Keras cache)", None)
    else:
        with files("dwindle").joinpath("demo_data/mnist.npz").open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
        found = replace(read_data(arrays, rescale=1 / 255), source="MNIST (the 17,000 digits that ship with dwindle)")
    return fit_to_model(found, [(28, 28, 1)], 10)
