"""What a model's outputs mean: classes, independent yes-or-no units or quantities; and their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from dwindle.errors import check_choice
from dwindle.graph_editing import Ref, calls, functional_config, output_refs
from dwindle.weights import is_graph

TASKS = ("classes", "binary", "regression")
_LOOKED_THROUGH = ("FakeQuantize", "Reshape", "Flatten", "Dropout")
# An output behind one of these is no logit.
_BOUNDED = ("relu", "relu6", "tanh", "softplus", "elu", "selu", "exponential", "hard_sigmoid", "hardsigmoid")
_QUANTITIES = ("mean_squared", "mean_absolute", "mse", "mae", "huber", "log_cosh", "poisson")


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of a model.

    Attributes:
        shape: With the batch axis, None where a size is free.
        activation: Name of what makes it, such as ``softmax``; ``linear`` where there is none, empty where the model's
            graph is not known.
        recovered: Whether its values have been turned into logits already.
    """

    shape: tuple[int | None, ...]
    activation: str
    recovered: bool = False

    @property
    def gives_logits(self) -> bool:
        """Whether its values are logits or quantities, not probabilities."""
        return self.recovered or self.activation not in ("softmax", "sigmoid")


def outputs_of_model(model: keras.Model) -> list[Output]:
    """Describe the outputs of a built model, in the order of ``keras.tree.flatten``.

    Args:
        model: Functional, sequential or lifted; of a subclassed model nothing is known, and the list is empty.
    """
    tensors = getattr(model, "outputs", None) or []
    endings = _endings(model) if is_graph(model) else [""] * len(tensors)
    return [
        Output(shape=tuple(tensor.shape), activation=ending) for tensor, ending in zip(tensors, endings, strict=True)
    ]


def ends_in(model: keras.Model, activation: str) -> bool:
    """Whether the layer that makes the model's first output ends in an activation of that name.

    Layers that keep a probability a probability (reshapes, dropout, fake quantization) are looked through. A subclassed
    model, whose graph is not known, counts as ending in nothing.
    """
    return is_graph(model) and _endings(model)[0] == activation


def _endings(model: keras.Model) -> list[str]:
    """Return the name of the activation that makes each output."""
    config = functional_config(model)
    taken = calls(config)
    # Operations such as keras.ops.softmax are no layers, but have names among them.
    parts = {part.name: part for part in [*getattr(model, "operations", ()), *model.layers]}

    def ending(ref: Ref) -> str:
        part = parts[ref[0]]
        before = taken[ref[:2]]
        if type(part).__name__ in _LOOKED_THROUGH and before:
            return ending(before[0])
        if isinstance(part, keras.Model):
            return _endings(part)[ref[2]] if is_graph(part) else ""
        function = getattr(part, "activation", None)
        name = getattr(function, "__name__", "") or type(function).__name__ if function is not None else ""
        return (name or type(part).__name__).lower()

    return [ending(ref) for ref in output_refs(config)]


def task_of(outputs: Sequence[Output], losses: Sequence[Any], task: str | None) -> tuple[str, bool]:
    """Return what an output means, and whether that is known: given, or by what models end in or were compiled with.

    Args:
        outputs: The student's, and those of each teacher that stand opposite of it.
        losses: Losses that the models were compiled with; None where they were not.
        task: One of `TASKS`, or None.

    Returns:
        One of `TASKS`; and False where it is a guess by the shape alone, which a loss may correct later.

    Raises:
        ConfigError: If ``task`` is not known.
    """
    if task is not None:
        check_choice("task", task, TASKS)
        return task, True
    endings = {output.activation for output in outputs}
    if "softmax" in endings:
        return "classes", True
    if "sigmoid" in endings:
        return "binary", True
    meant = {task_of_loss(loss) for loss in losses}
    for one in ("binary", "classes"):
        if one in meant:
            return one, True
    if endings & set(_BOUNDED) or "regression" in meant:
        return "regression", True
    shape = outputs[0].shape
    return ("classes" if len(shape) == 2 and shape[-1] != 1 else "regression"), False


def task_of_loss(loss: Any) -> str | None:
    """Return what a loss takes an output for, one of `TASKS`, by its name; None where that says nothing."""
    name = str(getattr(loss, "name", None) or getattr(loss, "__name__", None) or loss or "").lower()
    if "binary" in name:
        return "binary"
    if "categorical" in name:
        return "classes"
    return "regression" if any(word in name for word in _QUANTITIES) else None


def loss_of_each(loss: Any, names: Sequence[str]) -> list[Any]:
    """Return the loss of each output, as ``compile`` takes them: one for all, a list, or a dict by name."""
    if isinstance(loss, Mapping):
        return [loss.get(name) for name in names]
    if isinstance(loss, list | tuple):
        return list(loss) if len(loss) == len(names) else [None] * len(names)
    return [loss] * len(names)


def logits(values: Any, task: str, are_logits: bool) -> Any:
    """Return the logits behind an output, in float32.

    ``log p`` for classes, which differs from the logits by a constant that softmax ignores, and ``log p - log(1 - p)``
    for yes-or-no units; quantities are returned as they are.

    Args:
        values: What a model gives, shape ``(batch, ...)``.
        task: One of `TASKS`.
        are_logits: Whether they are logits already.
    """
    ops = keras.ops
    dtype = keras.backend.standardize_dtype(values.dtype)
    values = ops.cast(values, "float32")
    if are_logits or task == "regression":
        return values
    # The least that the type holds: 0 stands for anything below it.
    least = 6e-8 if dtype == "float16" else 1e-37
    if task == "classes":
        return ops.log(ops.maximum(values, least))
    values = ops.clip(values, least, 1 - (5e-4 if dtype == "float16" else 6e-8))
    return ops.log(values) - ops.log1p(-values)
