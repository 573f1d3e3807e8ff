"""PyTorch's exported programs (``.pt2``), by way of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwindle.errors import ConversionError, MissingDependencyError, UnsupportedModelError
from dwindle.sources.torch_module import compared, examples_of, exported_message, quietly


def read(path: Path, inputs: Any, layout: str, *, trust: bool) -> Any:
    """Load what `torch.export.save` wrote, lift it, and compare the result with the program itself.

    Args:
        path: The file.
        inputs: Example inputs or shapes, as in `dwindle.sources.torch_module.read`; None: those saved in the file.
        layout: As in `dwindle.load`.
        trust: Whether PyTorch may load it, which unpickles parts of the file, and a pickle can run any code.

    Raises:
        UnsupportedModelError: If ``trust`` is off, or PyTorch can't load the file.
        ConversionError: If PyTorch can't export the program.
        VerificationError: If the model does not predict what the program predicts.
        MissingDependencyError: If `torch`, `onnx` or `onnxscript` is not installed.
    """
    if not trust:
        raise UnsupportedModelError(
            f"`{path}` is unpickled by PyTorch, which runs whatever code it holds; pass trust=True (--trust) if you "
            "know where it comes from"
        )
    from dwindle.lifting.onnx.reading import lift_onnx

    try:
        import torch
    except ImportError:
        raise MissingDependencyError(
            "`.pt2` files are read by the `torch` package; install it with pip install 'dwindle[torch]'"
        ) from None
    try:
        with quietly():
            program = torch.export.load(str(path))
    except Exception as error:  # PyTorch fails on broken files in ways that it does not name
        text = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"`{path}` can't be read as a .pt2 file: {text or type(error).__name__}") from None
    if inputs is None:
        arguments, named = program.example_inputs or ((), {})
        if named or not arguments:
            raise ConversionError(f"`{path}` holds no example inputs by position; pass inputs=, a tensor or a shape")
        inputs = tuple(arguments)
    examples = examples_of(inputs)
    message = exported_message(program, path.name)
    model = lift_onnx(message, layout=layout, name=path.stem)
    difference = compared(program.module(), model, examples, layout)
    model.notes = (f"agrees with PyTorch: largest difference {difference:.2g} of the largest output", *model.notes)
    return model
