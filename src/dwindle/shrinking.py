"""Narrower twins of a model: the students that distillation trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from dwindle.errors import ConfigError, UnsupportedModelError
from dwindle.graphs import graph_config, outputs, sources
from dwindle.seeding import seeded
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
    pinned = _pinned(model.get_config())
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
        with seeded(seed):
            config = model.get_config()
            # A lifted model's student is no longer tied to the file that it was lifted from.
            cls = keras.Model if "graph" in config else type(model)
            student = cls.from_config(edit(dict(graph_config(config)), ""))
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


def _pinned(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Return the paths of the layers whose width is that of a model output."""
    config = graph_config(config)
    before = sources(config)
    entries = {entry["config"]["name"]: entry for entry in config["layers"]}
    pinned: set[str] = set()

    def back(name: str, seen: set[str]) -> None:
        if name in seen:
            return
        seen.add(name)
        entry = entries[name]
        inner = entry["config"]
        if isinstance(inner, dict) and "layers" in inner:
            found = _pinned(inner, f"{prefix}{name}/")
            pinned.update(found)
            if found:
                return
        elif entry.get("class_name") in _WIDTHS:
            pinned.add(f"{prefix}{name}")
            return
        for source in before[name]:
            back(source, seen)

    for output in outputs(config):
        back(output, set())
    return pinned
