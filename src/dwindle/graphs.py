"""The graph of a functional or sequential model, read off its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def graph_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a model's config that holds its layers."""
    inner: Mapping[str, Any] = config.get("graph", config)
    return inner


def sources(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Map each layer's name to the names of the layers that it takes its inputs from.

    Args:
        config: `graph_config` of a functional or sequential model.
    """
    entries = config["layers"]
    names = [entry["config"]["name"] for entry in entries]
    if "output_layers" not in config:  # sequential: each layer follows the one before
        return {name: names[max(0, number - 1) : number] for number, name in enumerate(names)}
    return {
        name: list(dict.fromkeys(_tensors(entry.get("inbound_nodes"))))
        for name, entry in zip(names, entries, strict=True)
    }


def outputs(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the layers that make the model's outputs, in their order."""
    if "output_layers" not in config:
        return [config["layers"][-1]["config"]["name"]]
    return list(_names(config["output_layers"]))


def _tensors(value: Any) -> Iterator[str]:
    """Yield the layer behind each Keras tensor in the serialized arguments of a call."""
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            yield value["config"]["keras_history"][0]
        else:
            for part in value.values():
                yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _names(part)
    elif len(value) == 3 and isinstance(value[0], str):
        yield value[0]
    else:
        for part in value:
            yield from _names(part)
