"""Narrower twins of a model: the students that distillation trains."""

from __future__ import annotations

from typing import Any

import keras

from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.weights import check_model

_WIDTHS = {
    "Dense": "units", "Conv1D": "filters", "Conv2D": "filters", "Conv3D": "filters", "SeparableConv1D": "filters",
    "SeparableConv2D": "filters", "Conv1DTranspose": "filters", "Conv2DTranspose": "filters", "LSTM": "units",
    "GRU": "units", "SimpleRNN": "units",
}  # fmt: skip


def shrink(model: keras.Model, width: float = 0.5, *, multiple: int = 1, seed: int = 0) -> keras.Model:
    """Return a narrower, untrained twin of a functional or sequential model.

    Every layer's channel or unit count is multiplied by ``width`` and rounded, except where it makes a model output.

    Args:
        model: A built model; it is not changed.
        width: Factor of the widths, in (0, 1].
        multiple: Round widths to a multiple of this; 8 suits many kernels.
        seed: Seeds the new weights.

    Returns:
        A new model with the same inputs and output shapes, not compiled.

    Raises:
        ConfigError: If ``width`` is out of range.
        UnsupportedModelError: If no narrower graph fits together, as when a layer reshapes to fixed sizes.
    """
    if not 0 < width <= 1:
        raise ConfigError(f"`width` is {width!r}; it must be a factor in (0, 1], such as 0.5")
    check_model(model)
    pinned = _pinned(model)
    changed = []

    def edit(config: dict[str, Any], prefix: str) -> dict[str, Any]:
        layers = []
        for entry in config["layers"]:
            inner = entry.get("config", {})
            if isinstance(inner, dict) and "layers" in inner:
                entry = {**entry, "config": edit(inner, f"{prefix}{inner['name']}/")}
            elif (key := _WIDTHS.get(entry.get("class_name", ""))) and f"{prefix}{inner['name']}" not in pinned:
                groups = int(inner.get("groups", 1) or 1)
                step = multiple * groups if groups > 1 else multiple
                size = max(step, round(inner[key] * width / step) * step)
                changed.append(size != inner[key])
                # The build config holds the old shapes; the new layer is built by its call.
                entry = {**entry, "config": {**inner, key: size}, "build_config": None}
                entry.pop("build_config")
            else:
                entry = {k: v for k, v in entry.items() if k != "build_config"}
            layers.append(entry)
        return {**config, "layers": layers}

    try:
        with _seeded(seed):
            config = edit(model.get_config(), "")
            student = type(model).from_config(config)
            if not student.built:
                student.build(model.input_shape)
    except Exception as error:
        raise UnsupportedModelError(
            f"`{model.name}` can't be made {width:g} as wide: {str(error).splitlines()[0]}"
        ) from None
    if not any(changed):
        raise UnsupportedModelError(f"`{model.name}` has no layer that could be made {width:g} as wide")
    if [tuple(t.shape) for t in student.outputs] != [tuple(t.shape) for t in model.outputs]:
        raise UnsupportedModelError(f"`{model.name}` changes its output shape when its layers get narrower")
    return student


def _seeded(seed: int) -> Any:
    """Seed the initializers of what is made inside, and put the global state back afterwards."""
    import contextlib
    import random

    import numpy as np

    @contextlib.contextmanager
    def scope() -> Any:
        before = random.getstate(), np.random.get_state()
        keras.utils.set_random_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    return scope()


def _pinned(model: keras.Model) -> set[str]:
    """Return the paths of the layers whose width is that of a model output."""
    pinned: set[str] = set()

    def back(tensor: Any, prefix: str) -> None:
        operation = tensor._keras_history.operation
        if isinstance(operation, keras.Model):
            for inner in operation.outputs:
                back(inner, f"{prefix}{operation.name}/")
            if not any(path.startswith(f"{prefix}{operation.name}/") for path in pinned):
                for value in operation._inbound_nodes[-1].input_tensors:
                    back(value, prefix)
            return
        if type(operation).__name__ in _WIDTHS:
            pinned.add(f"{prefix}{operation.name}")
            return
        for node in operation._inbound_nodes[-1:]:
            for value in node.input_tensors:
                back(value, prefix)

    for output in model.outputs:
        back(output, "")
    return pinned
