"""Loading: every source becomes a Keras model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, DwindleError, UnsupportedModelError

SUFFIXES = (".keras", ".h5", ".hdf5", ".tflite")


def load(source: Any, inputs: Any = None, *, trust: bool = False) -> Any:
    """Return a `keras.Model` made from a file, a folder or a model.

    Args:
        source: Path of a ``.keras``, ``.h5``, SavedModel folder or ``.tflite`` file, or a `keras.Model`, which is
            returned as it is. A ``.tflite`` is lifted: it becomes a trainable functional model.
        inputs: Reserved for sources that do not know their input shapes.
        trust: Whether code that comes with a file (Lambda layers) may run. Only for files whose origin you know.

    Returns:
        A Keras model; from ``.tflite`` a `dwindle.lifting.LiftedModel`.

    Raises:
        ConfigError: If the file does not exist or its kind is not known.
        UnsupportedModelError: If it can't be read, or holds code and ``trust`` is off.
    """
    import keras

    del inputs
    if isinstance(source, keras.Model):
        return source
    if not isinstance(source, str | Path):
        raise ConfigError(f"`source` is a {type(source).__name__}; pass a path or a keras.Model")
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"`{path}` does not exist; pass a model file: {', '.join(SUFFIXES)} or a SavedModel folder")
    reader = _reader(path)
    try:
        return reader(path, trust)
    except DwindleError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"`{path}` can't be read as {_kind(path)}: {_first_line(error)}") from None


def _reader(path: Path) -> Callable[[Path, bool], Any]:
    from dwindle.sources import keras_file, saved_model, tflite

    if path.is_dir():
        if (path / "saved_model.pb").exists():
            return saved_model.read
        raise ConfigError(f"`{path}` is a folder without `saved_model.pb`; pass a SavedModel folder or a model file")
    readers = {
        ".keras": keras_file.read,
        ".h5": keras_file.read_h5,
        ".hdf5": keras_file.read_h5,
        ".tflite": tflite.read,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ConfigError(
            f"`{path}` ends in {suffix or 'nothing'!r}; known are {', '.join(SUFFIXES)} and SavedModel folders"
        )
    return readers[suffix]


def _kind(path: Path) -> str:
    return "a SavedModel" if path.is_dir() else f"a {path.suffix} file"


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:300] + "…" if len(text) > 300 else text) or type(error).__name__
