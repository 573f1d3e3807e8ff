"""Loading: every source becomes a Keras model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, DwindleError, UnsupportedModelError, check_choice

SUFFIXES = (".keras", ".h5", ".hdf5", ".tflite", ".onnx", ".pt2")
LAYOUTS = ("source", "channels_last")


def load(source: Any, inputs: Any = None, *, trust: bool = False, layout: str = "source") -> Any:
    """Return a `keras.Model` made from a file, a folder or a model.

    An ``.onnx`` and a ``.tflite`` are lifted: they become trainable functional models. A model from an ``.onnx`` is
    compared with ONNX Runtime, where that is installed, on random inputs: every output must be within 1e-3 of the
    largest. What the user should know is in ``notes``.

    Args:
        source: Path of a ``.keras``, ``.h5``, ``.tflite``, ``.onnx`` or ``.pt2`` file or a SavedModel folder; an
            `onnx.ModelProto`; a `torch.nn.Module`, which is exported to ONNX in memory; or a `keras.Model`, which is
            returned as it is if ``inputs`` chooses no lengths.
        inputs: For PyTorch: an example tensor or a shape such as ``(1, 3, 224, 224)``, or a tuple of them; a ``.pt2``
            has its own. For ONNX, Keras and SavedModel: shapes of inputs whose lengths are open, by name, or the shape
            of the only input; None stands for a length that stays open, such as ``(None, 224, 224, 3)``. A Keras model
            is built anew for them, with its weights and not compiled.
        trust: Whether code that comes with a file may run: Lambda layers, and a ``.pt2``, which PyTorch unpickles. Only
            for files whose origin you know.
        layout: For ONNX and PyTorch: ``"source"`` keeps the order of the axes of inputs and outputs;
            ``"channels_last"`` gives them their channels last, as Keras and LiteRT have them.

    Returns:
        A Keras model; from ``.tflite`` a `dwindle.lifting.LiftedModel`.

    Raises:
        ConfigError: If the file does not exist, its kind is not known, or ``inputs`` or ``layout`` does not fit.
        UnsupportedModelError: If it can't be read, or holds code and ``trust`` is off.
        VerificationError: If the model does not predict what its source predicts.
        MissingDependencyError: If what reads it is not installed.
    """
    import keras

    check_choice("layout", layout, LAYOUTS)
    if isinstance(source, keras.Model):
        return _with_lengths(source, inputs)
    if type(source).__name__ == "ModelProto":
        from dwindle.lifting.onnx.reading import lift_onnx

        return lift_onnx(source, inputs=inputs, layout=layout)
    if not isinstance(source, str | Path):
        from dwindle.sources import torch_module

        if torch_module.is_module(source):
            return torch_module.read(source, inputs, layout)
        raise ConfigError(f"`source` is a {type(source).__name__}; pass a path, a keras.Model or a torch.nn.Module")
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"`{path}` does not exist; pass a model file: {', '.join(SUFFIXES)} or a SavedModel folder")
    reader = _reader(path)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if inputs and suffix == ".tflite":
        raise ConfigError(f"`inputs` chooses open lengths, and `{path}` is a .tflite, which has none; leave it out")
    if layout != "source" and suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"`layout` is for .onnx and .pt2 files, and `{path}` knows its own; leave it out")
    try:
        if suffix == ".pt2":
            return reader(path, inputs, layout, trust=trust)
        if suffix == ".onnx":
            return reader(path, inputs, layout)
        return reader(path, trust, inputs) if path.is_dir() else _with_lengths(reader(path, trust), inputs)
    except DwindleError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"`{path}` can't be read as {_kind(path)}: {_first_line(error)}") from None


def _with_lengths(model: Any, inputs: Any) -> Any:
    from dwindle.open_lengths import with_lengths

    return with_lengths(model, inputs) if inputs else model


def _reader(path: Path) -> Callable[..., Any]:
    from dwindle.sources import keras_file, onnx_file, saved_model, tflite, torch_program

    if path.is_dir():
        if (path / "saved_model.pb").exists():
            return saved_model.read
        raise ConfigError(f"`{path}` is a folder without `saved_model.pb`; pass a SavedModel folder or a model file")
    readers: dict[str, Callable[..., Any]] = {
        ".keras": keras_file.read,
        ".h5": keras_file.read_h5,
        ".hdf5": keras_file.read_h5,
        ".tflite": tflite.read,
        ".onnx": onnx_file.read,
        ".pt2": torch_program.read,
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
