"""Keras' own files: ``.keras`` and ``.h5``."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from dwindle.errors import UnsupportedModelError

_LARGEST_CONFIG_BYTES = 64_000_000


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
        return keras.saving.load_model(path, compile=False, safe_mode=not trust)
    try:
        return keras.saving.load_model(path, safe_mode=not trust)
    except (TypeError, ValueError):
        # Often a loss or metric of the user's own, which is not needed to compress the model.
        return keras.saving.load_model(path, compile=False, safe_mode=not trust)


def _config(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("config.json")
            if info.file_size > _LARGEST_CONFIG_BYTES:
                raise UnsupportedModelError(f"`{path}` has a config of {info.file_size} bytes, which is no model's")
            return json.loads(archive.read(info))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        raise UnsupportedModelError(
            f"`{path}` is no Keras file (a zip archive with a `config.json`), or damaged; save one with model.save()"
        ) from None


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
    import keras

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
    return keras.saving.load_model(path, compile=False, safe_mode=not trust)
