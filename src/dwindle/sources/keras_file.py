"""Keras' own files: ``.keras`` and ``.h5``."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

from dwindle.errors import UnsupportedModelError
from dwindle.files import LARGEST_CONFIG_BYTES

# An argument that a layer of Keras 2 had and that of Keras 3 does not take, and the value that it always computes with.
_DROPPED = {
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", "Conv1DTranspose",
                     "Conv2DTranspose", "Conv3DTranspose"), ("groups", 1)),
    **dict.fromkeys(("RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
                    ("time_major", False)),
}  # fmt: skip
# Those that had no effect.
_UNUSED = {name: {"kernel_initializer", "kernel_regularizer", "kernel_constraint"}
           for name in ("SeparableConv1D", "SeparableConv2D")}  # fmt: skip


def read(path: Path, trust: bool) -> Any:
    """Load a ``.keras`` file; Lambda layers only with ``trust``."""
    import keras

    # Registers dwindle's own layers, so that files saved in the middle of a technique load.
    import dwindle.distillation
    import dwindle.lifting.lifted
    import dwindle.lifting.onnx.islands
    import dwindle.transformed_layers  # noqa: F401

    config = _config(path)
    if not trust and (where := _code_in(config)):
        raise UnsupportedModelError(
            f"`{path}` holds Python code ({where}), which would run when it is loaded; "
            "if you know where the file comes from, allow it with --trust (trust=True)"
        )
    if not (isinstance(config, dict) and config.get("compile_config")):
        return _uncompiled(path, trust)
    try:
        with warnings.catch_warnings():
            # A model in it that was compiled and never trained: Keras builds the optimizer only when it loads.
            warnings.filterwarnings("ignore", message=".* the saved optimizer has 0 variables")
            return keras.saving.load_model(path, safe_mode=not trust)
    except (TypeError, ValueError):
        # Often a loss or metric of the user's own, which is not needed to compress the model.
        return _uncompiled(path, trust)


def _uncompiled(path: Path, trust: bool, *, name: Path | None = None) -> Any:
    """Load a model without its training; ``name`` is what errors call the file, if not its path.

    Raises:
        UnsupportedModelError: If a class in it is not known, or Keras 2 wrote it in a way that Keras 3 can't read.
    """
    import keras

    try:
        return keras.saving.load_model(path, compile=False, safe_mode=not trust)
    except (TypeError, ValueError) as error:
        if (version := _version(path)).startswith("2."):
            raise UnsupportedModelError(
                f"`{path}` was written by Keras {version} and can't be read by Keras 3; save it there as .h5 or as a "
                "SavedModel folder"
            ) from None
        found = re.search(r"(?:Could not locate class|Unknown layer:) '(\w+)'", str(error))
        if found is None:
            raise
        kind = found.group(1)
        raise UnsupportedModelError(
            f"`{name or path}` has a layer or model of the class `{kind}`, which is not known; import what registers "
            "it (keras.saving.register_keras_serializable), or load inside "
            f"keras.utils.custom_object_scope({{{kind!r}: {kind}}})"
        ) from None


def _config(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("config.json")
            if info.file_size > LARGEST_CONFIG_BYTES:
                raise UnsupportedModelError(f"`{path}` has a config of {info.file_size} bytes, which is no model's")
            return json.loads(archive.read(info))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        raise UnsupportedModelError(
            f"`{path}` is no Keras file (a zip archive with a `config.json`), or damaged; save one with model.save()"
        ) from None


def _version(path: Path) -> str:
    """Return the version of Keras that wrote a ``.keras`` file; an empty string for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            return str(json.loads(archive.read("metadata.json")).get("keras_version", ""))
    except (zipfile.BadZipFile, KeyError, ValueError, AttributeError):
        return ""


def _code_in(config: Any) -> str:
    """Return where a config holds a serialized Python function, or an empty string."""
    if isinstance(config, dict):
        if config.get("class_name") == "__lambda__":
            return "a lambda function"
        if config.get("class_name") == "Lambda":
            return f"Lambda layer `{config.get('config', {}).get('name', '')}`"
        parts: Any = config.values()
    elif isinstance(config, list):
        parts = config
    else:
        return ""
    return next((found for part in parts if (found := _code_in(part))), "")


def read_h5(path: Path, trust: bool) -> Any:
    """Load an ``.h5`` file of Keras 2 or 3; Lambda layers only with ``trust``."""
    import h5py

    if not h5py.is_hdf5(path):
        raise UnsupportedModelError(f"`{path}` is no HDF5 file, or a damaged one; save one with model.save()")
    with h5py.File(path, "r") as file:
        text = file.attrs.get("model_config")
    if text is None:
        raise UnsupportedModelError(
            f"`{path}` holds weights only, no model; load them into your model with model.load_weights() and save that"
        )
    config = json.loads(text)
    if not trust and (where := _code_in(config)):
        raise UnsupportedModelError(
            f"`{path}` holds Python code ({where}), which would run when it is loaded; "
            "if you know where the file comes from, allow it with --trust (trust=True)"
        )
    modern = _modern(config)
    if modern == config:
        return _uncompiled(path, trust)
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copyfile(path, Path(folder, path.name)))  # its bytes alone: it may be write-protected
        with h5py.File(copied, "r+") as file:
            file.attrs["model_config"] = json.dumps(modern)
        return _uncompiled(copied, trust, name=path)


def _modern(config: Any) -> Any:
    """Return a config without the arguments that layers of Keras 3 do not know."""
    if isinstance(config, list):
        return [_modern(part) for part in config]
    if not isinstance(config, dict):
        return config
    found = {key: _modern(value) for key, value in config.items()}
    given = found.get("config")
    if isinstance(given, dict):
        kind = str(found.get("class_name"))
        dropped = _dropped(kind)
        found["config"] = {
            key: value
            for key, value in given.items()
            if (key, value) not in dropped and key not in _UNUSED.get(kind, ())
        }
    return found


def _dropped(kind: str) -> list[tuple[str, Any]]:
    """Return the arguments that a class has no longer; one of the user's own may take what its base does not."""
    import keras

    found = keras.saving.get_registered_object(kind)
    names = [kind] if found is None else [base.__name__ for base in found.__mro__]
    own = () if found is None else inspect.signature(found.__init__).parameters
    return [pair for name in names if (pair := _DROPPED.get(name)) is not None and pair[0] not in own]
