"""Write docs/support.md: what works, found by running it on the models of tests/zoo.py.

python scripts/support_table.py            # docs/support.md
python scripts/support_table.py --torch    # docs/support-pytorch.md, where PyTorch is installed
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

#: How far a model that was read back may be from the one that was written, as a share of the largest output.
CLOSE = 1e-4


def outcome(action: Callable[[], object]) -> str:
    """Return ``yes``, or why not, in a sentence without the folder that the model lay in."""
    from dwindle import DwindleError

    try:
        action()
    except DwindleError as error:
        reason = re.split(r";|\. ", " ".join(str(error).split()))[0]
        return "no: " + re.sub(r"`/[^`]*/", "`", reason).replace("|", "/")
    return "yes"


def table() -> str:
    """Return the page."""
    return "\n".join(["# What works", "", *techniques(), "", *conversions(), "", *operators(), ""])


def row(name: str, cells: Iterable[str]) -> str:
    """Return a line of a table."""
    return f"| {name.replace('_', ' ')} | {' | '.join(cells)} |"


def techniques() -> list[str]:
    """Return the table of what works on which model."""
    import keras
    from zoo import ZOO, samples, settle

    import dwindle as dw

    lines = [
        "Made by `scripts/support_table.py`, which runs every verb on the models of `tests/zoo.py`.",
        "",
        "| model | prune | lift | quantize in training | float32 | float16 | int8 | int8-dynamic |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, build in ZOO.items():
            keras.utils.set_random_seed(0)
            model = settle(build())
            inputs = samples(model, 64)
            cells = [
                outcome(lambda model=model: dw.prune(model, 0.5)),
                outcome(lambda model=model: dw.lift(model)),
                outcome(lambda model=model, inputs=inputs: dw.quantize(model, "int8", inputs)),
            ]
            for scheme in ("float32", "float16", "int8", "int8-dynamic"):
                path = Path(folder) / "model.tflite"
                cells.append(outcome(lambda m=model, p=path, s=scheme, i=inputs: dw.export(m, p, scheme=s, data=i)))
            lines.append(row(name, cells))
    return lines


def conversions() -> list[str]:
    """Return the table of what converts."""
    import keras
    from zoo import ZOO, settle

    import dwindle as dw

    lines = [
        "## What converts",
        "",
        "Each model is written as a file of each kind, `.keras`, `.h5` and the first SavedModel by Keras, the others",
        "by `dw.export` in float32, and read back with `dw.load`. Yes: every output is within 1e-4 of the largest one",
        "of the model that was written. The last column is only written, and compared as every export is.",
        "",
        "| model | `.keras` | `.h5` | SavedModel of Keras | `.tflite` | `.onnx` | SavedModel written |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, build in ZOO.items():
        keras.utils.set_random_seed(0)
        model = settle(build())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras advises against HDF5, and says so each time
            kinds = ("model.keras", "model.h5", "saved", "model.tflite", "model.onnx")
            files = [Path(folder, kind) for kind in kinds]
            cells = [outcome(lambda model=model, path=path: there_and_back(model, path)) for path in files]
            cells.append(outcome(lambda model=model, folder=folder: dw.export(model, Path(folder) / "written")))
        lines.append(row(name, cells))
    return lines


def there_and_back(model: Any, path: Path) -> None:
    """Write a model, read it, and compare the outputs of both.

    Raises:
        DwindleError: If one of the three fails.
    """
    import numpy as np
    from zoo import outputs, samples

    import dwindle as dw

    if path.suffix in (".tflite", ".onnx"):
        dw.export(model, path)
    else:
        written_by_keras(model, path)
    again = dw.load(path)
    inputs = samples(model, 8)
    expected, found = outputs(model, inputs), outputs(again, as_named(model, again, inputs))
    if [y.shape for y in expected] != [y.shape for y in found]:
        raise dw.VerificationError(f"the outputs have the shapes {[y.shape for y in found]}")
    largest = max(1.0, *(float(np.abs(y).max()) for y in expected))
    error = max(float(np.abs(y - z).max()) for y, z in zip(expected, found, strict=True)) / largest
    if not error <= CLOSE:
        raise dw.VerificationError(f"the largest difference is {error:.2g} of the largest output")


def as_named(model: Any, again: Any, inputs: list[Any]) -> list[Any]:
    """Return a model's inputs in the order that another one has them in, which in a SavedModel is that of the names."""
    here, there = ([tensor.name for tensor in getattr(one, "inputs", None) or []] for one in (model, again))
    return [inputs[here.index(name)] for name in there] if here and sorted(here) == sorted(there) else inputs


def written_by_keras(model: Any, path: Path) -> None:
    """Save a model with Keras.

    Raises:
        ConversionError: If Keras can't.
    """
    from dwindle import ConversionError
    from dwindle.exporting.convert import quiet

    try:
        if path.suffix:
            model.save(path)
        else:
            with quiet():
                model.export(path, format="tf_saved_model", verbose=False)
    except NotImplementedError as error:
        raise ConversionError(f"Keras does not write it: {str(error).split('.')[0]}") from None


def operators() -> list[str]:
    """Return the operators of both tables."""
    from dwindle.lifting.onnx.operators import OPERATORS as ONNX
    from dwindle.lifting.operators import OPERATORS as LITERT

    onnx = [name for name in ONNX if not name.startswith("dwindle::")]  # those stand for several of a file

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"`{name}`" for name in sorted(names))

    return [
        f"Operators of LiteRT that can be made trainable ({len(LITERT)}): {listed(LITERT)}.",
        "",
        f"Operators of ONNX that are read ({len(onnx)}): {listed(onnx)}.",
    ]


def torch_table() -> str:
    """Return the page on PyTorch; needs PyTorch."""
    import numpy as np
    import torch
    from torch_zoo import KINDS

    import dwindle as dw

    lines = [
        "# PyTorch: what converts",
        "",
        "Made by `scripts/support_table.py --torch`, which loads the modules of `tests/torch_zoo.py`, small networks",
        "of kinds that are in use, compares each with the module (every output within 1e-3 of the largest one), and",
        "prunes, quantizes and writes it.",
        "",
        "| network | load | prune channels | quantize in training | `.tflite` | int8 `.tflite` | `.onnx` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (make, shapes) in KINDS.items():
        torch.manual_seed(0)
        module, loaded = make(), []
        generator = np.random.default_rng(0)

        def load(module: Any = module, shapes: Any = shapes, loaded: list[Any] = loaded) -> None:
            loaded.append(dw.load(module, inputs=shapes, layout="channels_last"))

        cells = [outcome(load)]
        if loaded:
            (model,) = loaded
            inputs = [
                generator.random((16, *key.shape[1:]), np.float32)
                if "float" in key.dtype
                else generator.integers(0, 100, (16, *key.shape[1:]))
                for key in model.inputs
            ]
            cells += written(model, inputs)
        lines.append(row(name, [*cells, *["" for _ in range(6 - len(cells))]]))
    return "\n".join([*lines, ""])


def written(model: Any, inputs: list[Any]) -> list[str]:
    """Return what becomes of a model that came from PyTorch."""
    import dwindle as dw

    with tempfile.TemporaryDirectory() as folder:
        tflite, onnx = Path(folder) / "model.tflite", Path(folder) / "model.onnx"
        return [
            outcome(lambda: dw.prune(model, 0.5, structure="channel")),
            outcome(lambda: dw.quantize(model, "int8", inputs)),
            outcome(lambda: dw.export(model, tflite, data=inputs)),
            outcome(lambda: dw.export(model, tflite, "int8", inputs)),
            outcome(lambda: dw.export(model, onnx, data=inputs)),
        ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--torch"]:
        (ROOT / "docs" / "support-pytorch.md").write_text(torch_table(), encoding="utf8")
    else:
        (ROOT / "docs" / "support.md").write_text(table(), encoding="utf8")
