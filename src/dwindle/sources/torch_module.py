"""PyTorch modules, by way of ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dwindle.errors import ConfigError, ConversionError, MissingDependencyError, VerificationError


def is_module(source: Any) -> bool:
    """Return whether a source is a `torch.nn.Module`, without importing PyTorch."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "torch.nn.modules.module.Module" for kind in type(source).__mro__
    )


def read(module: Any, inputs: Any, layout: str) -> Any:
    """Export the module to ONNX in memory, lift that, and compare the result with the module itself.

    Args:
        module: A `torch.nn.Module`; it is run as in evaluation, and left as it was.
        inputs: An example input (tensor or array), a tuple of them, or a shape or tuple of shapes, samples first.
        layout: As in `dwindle.load`.

    Raises:
        ConfigError: If ``inputs`` is missing or is none of these.
        ConversionError: If PyTorch can't export the module.
        VerificationError: If the model does not predict what the module predicts.
        MissingDependencyError: If `onnx` or `onnxscript` is not installed.
    """
    from dwindle.lifting.onnx.reading import lift_onnx

    examples = examples_of(inputs)
    training = {name: part.training for name, part in module.named_modules()}
    module.eval()
    try:
        message = _exported(module, examples)
        model = lift_onnx(message, layout=layout, name=type(module).__name__.lower())
        error = compared(module, model, examples, layout)
    finally:
        for name, part in module.named_modules():
            part.training = training[name]
    model.notes = (f"agrees with PyTorch: largest difference {error:.2g} of the largest output", *model.notes)
    return model


def examples_of(inputs: Any) -> tuple[Any, ...]:
    """Return example tensors for tensors, arrays or shapes.

    Raises:
        ConfigError: If ``inputs`` is missing or is none of these.
    """
    import torch

    if inputs is None:
        raise ConfigError(
            "a PyTorch module does not know its input shapes; pass inputs=, an example tensor or a shape such as "
            "(1, 3, 224, 224), or a tuple of them"
        )
    if _is_shape(inputs) or not isinstance(inputs, tuple | list):
        inputs = (inputs,)
    found = []
    for one in inputs:
        if _is_shape(one):
            found.append(torch.rand(tuple(one), generator=torch.Generator().manual_seed(0)))
        elif isinstance(one, torch.Tensor | np.ndarray):
            found.append(torch.as_tensor(one))
        else:
            raise ConfigError(f"`inputs` holds a {type(one).__name__}; it must hold example tensors or shapes")
    return tuple(found)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(n, int) for n in value)


def _exported(module: Any, examples: tuple[Any, ...]) -> Any:
    """Return the ONNX message, with any number of samples if PyTorch finds that the module takes that."""
    import torch

    _require_onnxscript()
    # One sample would be taken for a length that is fixed.
    several = tuple(torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x for x in examples)
    problem: Exception | None = None
    for arguments, dynamic in ((several, True), (examples, False)):
        shapes = tuple({0: torch.export.Dim.DYNAMIC} if x.ndim else None for x in arguments) if dynamic else None
        try:
            # Not optimized: the exporter would fold normalizations into what is in front of them.
            options = {"dynamic_shapes": shapes, "dynamo": True, "verbose": False, "optimize": False}
            with quietly(), torch.no_grad():
                program = torch.onnx.export(module, arguments, **options)
            return program.model_proto
        except Exception as error:
            problem = problem or error
    text = " ".join(str(problem).split())[:300]
    raise ConversionError(f"PyTorch can't export the module `{type(module).__name__}`: {text}") from None


def exported_message(program: Any, name: str) -> Any:
    """Return the ONNX message of an exported program, with the open lengths that it was exported with.

    Raises:
        ConversionError: If PyTorch can't export it.
        MissingDependencyError: If `onnxscript` is not installed.
    """
    import torch

    _require_onnxscript()
    try:
        with quietly(), torch.no_grad():
            return torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model_proto
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ConversionError(f"PyTorch can't export `{name}`: {text}") from None


def _require_onnxscript() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "PyTorch modules need the `onnx` and `onnxscript` packages; install them with pip install 'dwindle[torch]'"
        ) from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hold back what the exporter prints and warns about."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def compared(module: Any, model: Any, examples: Sequence[Any], layout: str) -> float:
    """Return the largest difference on the examples, as a share of the largest output."""
    import keras
    import torch

    with torch.no_grad():
        expected = _tensors(module(*examples))
    fed = [x.numpy() for x in examples]
    if layout == "channels_last":
        pairs = zip(fed, model.inputs, strict=True)
        fed = [x if _fits(x.shape, key.shape) and x.ndim < 4 else np.moveaxis(x, 1, -1) for x, key in pairs]
    found = [np.asarray(y) for y in keras.tree.flatten(model.predict_on_batch(fed[0] if len(fed) == 1 else fed))]
    if len(found) != len(expected):
        raise VerificationError(f"the model has {len(found)} outputs, and PyTorch gives {len(expected)}")
    worst = 0.0
    for wanted, given in zip(expected, found, strict=True):
        given = np.moveaxis(given, -1, 1) if given.shape != wanted.shape and given.ndim > 2 else given
        if given.shape != wanted.shape:
            raise VerificationError(f"an output has the shape {given.shape}; PyTorch gives {wanted.shape}")
        largest = max(1.0, float(np.abs(wanted).max(initial=0)))
        worst = max(worst, float(np.abs(given - wanted).max(initial=0)) / largest)
    if not worst <= 1e-3:
        raise VerificationError(
            f"the model does not predict what PyTorch predicts: the largest difference is {worst:.3g} of the largest "
            "output (bound: 0.001)"
        )
    return worst


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def _tensors(output: Any) -> list[np.ndarray]:
    import torch

    if isinstance(output, torch.Tensor):
        return [output.numpy()]
    parts = output.values() if hasattr(output, "values") else output
    return [array for part in parts if part is not None for array in _tensors(part)]
