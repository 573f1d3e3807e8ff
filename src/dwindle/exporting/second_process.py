"""Conversion on another Keras backend than TensorFlow: in a second process, whose backend it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras

from dwindle.errors import ConversionError, DwindleError


def converted_elsewhere(model: keras.Model) -> bytes:
    """Return what `dwindle.exporting.convert.float_file` returns for a model without techniques, from a second process.

    The model travels as a ``.keras`` file. Custom layers have to be importable there: classes of the script that runs
    are not.

    Raises:
        ConversionError: If it can't be saved, loaded or converted.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "model.keras"), Path(folder, "model.tflite")
        try:
            model.save(given)
        except Exception as error:
            raise ConversionError(f"`{model.name}` can't be saved for the conversion in TensorFlow: {error}") from error
        done = subprocess.run(
            [sys.executable, "-m", "dwindle.exporting.second_process", str(given), str(made)],
            env={**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0 or not made.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
            raise ConversionError(f"a second process, on TensorFlow, can't write `{model.name}` as LiteRT: {said[-1]}")
        return made.read_bytes()


def main() -> None:
    """Convert the file named first into the file named second."""
    from dwindle.exporting.convert import float_file

    given, made = sys.argv[1:]
    try:
        # It was a model of the process that saved it, so its code has run already.
        model = keras.saving.load_model(given, compile=False, safe_mode=False)
        Path(made).write_bytes(float_file(model))
    except (DwindleError, TypeError, ValueError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
