"""Recorded outputs: what a teacher says of some data, once, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.distillation.outputs import Output, logits
from dwindle.distillation.teachers import Teacher, check_finite, resolve_teacher, rows
from dwindle.errors import ConfigError, ConversionError, DataError, check_choice
from dwindle.files import replace_folder, temporary_folder, write_text

DTYPES = ("float16", "float32")
_VERSION = 1


class Recording(Teacher):
    """The outputs of a teacher for some samples, memory-mapped: a teacher that costs nothing.

    Probabilities are kept as logits, which half precision holds well. Pass it, or its path, to `distill`, and fit on
    the arrays that were recorded, in their order; training may shuffle them.

    Args:
        path: A folder that `record` has written.

    Attributes:
        path: The folder.
        key: Hash of the teacher, the data and the type.
        data_sha256: Hash of the data.
        arrays: One memory-mapped array for each output, shape ``(n, ...)``.

    Raises:
        DataError: If it is not a whole recording.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = json.loads((self.path / "recording.json").read_text(encoding="utf8"))
            self.key, self.data_sha256 = str(content["key"]), str(content["data_sha256"])
            self.teacher_sha256 = str(content["teacher_sha256"])
            self.arrays = [
                np.load(self.path / f"output-{number}.npy", mmap_mode="r") for number in range(len(content["outputs"]))
            ]
            self.specs = [
                Output(shape=(None, *array.shape[1:]), activation=one["activation"], recovered=True)
                for array, one in zip(self.arrays, content["outputs"], strict=True)
            ]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"`{self.path}` is no folder of recorded outputs, or a damaged one; write one with "
                "dwindle.distillation.record(teacher, x, path)"
            ) from None

    def __len__(self) -> int:
        return len(self.arrays[0])

    def check(self, x: Any) -> None:
        """Raise unless ``x`` is the data that was recorded.

        Raises:
            DataError: If it is other data, or in another order.
        """
        flat = [np.asarray(array) for array in keras.tree.flatten(x)]
        found = "" if len(flat[0]) != len(self) else data_hash(flat)
        if found != self.data_sha256:
            what = f"{len(flat[0])} samples" + (f" with the hash {found[:12]}" if found else "")
            raise DataError(
                f"`teacher` holds the recorded outputs of other data (`{self.path}`: {len(self)} samples with the hash "
                f"{self.data_sha256[:12]}), and `x` has {what}; fit on the arrays that were recorded, in their order, "
                "or record these"
            )

    def tell(self, x: Any) -> list[Any]:
        """Raise: what was recorded comes with the data, which ``fit`` sees to."""
        del x
        raise ConfigError(
            "`teacher` is a recording, and these batches come without its outputs; call fit with the arrays that were "
            "recorded, not with a data set or train_on_batch"
        )

    def run(self, x: Any) -> list[np.ndarray]:
        """Return what was recorded for ``x``, all of the data."""
        self.check(x)
        return [np.asarray(array) for array in self.arrays]

    def fingerprint(self) -> str:
        """Return the key."""
        return self.key

    def to_dict(self) -> dict[str, Any]:
        """Return the path and the key."""
        return {"kind": "recording", "path": str(self.path), "key": self.key}


def record(
    teacher: Any,
    x: Any,
    path: str | Path,
    *,
    batch_size: int = 256,
    dtype: str = "float16",
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Run a teacher once over some data and keep what it says, for any number of epochs and trials.

    A recording of the same teacher and data is used as it is: called again, nothing is computed.

    Args:
        teacher: As in `distill`.
        x: The samples, shape ``(n, ...)``, or a list or dict of such arrays. No labels are needed.
        path: Folder to write to.
        batch_size: Samples that are run together.
        dtype: ``"float16"``, or ``"float32"`` for outputs that half precision does not hold.
        progress: Called with a line of text now and then; None: nothing.

    Returns:
        The recording.

    Raises:
        ConfigError: If the folder holds something else, such as the outputs of another teacher.
        DataError: If the teacher returns NaN or infinity, or values that the type does not hold.
        ConversionError: If it can't be written.

    Example:
        >>> import keras, numpy as np, tempfile
        >>> from dwindle.distillation import record
        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
        >>> x = np.zeros((8, 4), "float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record(teacher, x, folder + "/said").arrays[0].shape
        (8, 3)
    """
    check_choice("dtype", dtype, DTYPES)
    path = Path(path)
    flat = [np.asarray(array) for array in keras.tree.flatten(x)]
    if not flat or len({len(array) for array in flat}) != 1 or len(flat[0]) == 0:
        raise DataError(
            f"`x` has arrays of {[len(array) for array in flat]} samples; all must have as many, at least 1"
        )
    arrays = keras.tree.map_structure(np.asarray, x)
    source = resolve_teacher(teacher, x=rows(arrays, 0, 2))
    if isinstance(source, Recording):
        raise ConfigError("`teacher` is a recording itself; pass what was recorded")
    source.check_inputs([(None, *array.shape[1:]) for array in flat], "`x` has samples of")
    first = source.run(rows(arrays, 0, min(batch_size, len(flat[0]))))
    said = hashlib.sha256(source.fingerprint().encode("utf8"))
    if not source.model:  # a function may say something else under the same name
        for value in first:
            said.update(np.ascontiguousarray(value).tobytes())
    identity = {"teacher_sha256": said.hexdigest(), "data_sha256": data_hash(flat), "dtype": dtype}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf8")).hexdigest()
    if path.exists() and (found := _there_already(path, key, identity)) is not None:
        return found
    with temporary_folder(path) as folder:
        try:
            _write(folder, source, arrays, len(flat[0]), batch_size, dtype, progress)
            outputs = [{"activation": spec.activation} for spec in source.specs]
            content = {"version": _VERSION, "key": key, **identity, "outputs": outputs}
            write_text(folder / "recording.json", json.dumps(content, indent=2))
        except OSError as error:
            raise ConversionError(f"`{path}` can't be written: {error.strerror or error}") from None
        replace_folder(folder, path)
    return Recording(path)


def _there_already(path: Path, key: str, identity: dict[str, str]) -> Recording | None:
    """Return the recording at a path if it is the one that is wanted; None for an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return None
    if not (path / "recording.json").exists():
        raise ConfigError(f"`{path}` is there already and no recording; name another folder")
    found = Recording(path)
    if found.key == key:
        return found
    other = "other data" if found.data_sha256 != identity["data_sha256"] else "another teacher"
    if found.data_sha256 == identity["data_sha256"] and found.teacher_sha256 == identity["teacher_sha256"]:
        other = "another `dtype`"
    raise ConfigError(f"`{path}` holds recorded outputs of {other}; name another folder, or remove it")


def _write(
    folder: Path, source: Teacher, arrays: Any, count: int, batch_size: int, dtype: str,
    progress: Callable[[str], None] | None,
) -> None:  # fmt: skip
    files: list[np.memmap[Any, Any]] = []
    for start in range(0, count, batch_size):
        made = source.run(rows(arrays, start, start + batch_size))
        values = [_as_logits(value, spec) for value, spec in zip(made, source.specs, strict=True)]
        if not files:
            files = [
                np.lib.format.open_memmap(
                    folder / f"output-{number}.npy", mode="w+", dtype=dtype, shape=(count, *value.shape[1:])
                )
                for number, value in enumerate(values)
            ]
        for file, value in zip(files, values, strict=True):
            check_finite(value, start, count)
            if np.abs(value).max() > np.finfo(dtype).max:
                raise DataError(
                    f"`teacher` returns {np.abs(value).max():.6g}, which {dtype} does not hold; pass dtype='float32'"
                )
            file[start : start + len(value)] = value
        if progress is not None and (start // batch_size) % 32 == 31:
            progress(f"recorded {start + batch_size:,} of {count:,} samples")
    for file in files:
        file.flush()


def _as_logits(value: np.ndarray, spec: Output) -> np.ndarray:
    if spec.gives_logits:
        return np.asarray(value, np.float32)
    task = "classes" if spec.activation == "softmax" else "binary"
    found: np.ndarray = np.asarray(keras.ops.convert_to_numpy(logits(keras.ops.convert_to_tensor(value), task, False)))
    return found


def data_hash(arrays: list[np.ndarray]) -> str:
    """Return a hash over the types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        for start in range(0, len(array), 4096):
            digest.update(np.ascontiguousarray(array[start : start + 4096]).tobytes())
    return digest.hexdigest()
