"""What has to change in an operation without weights whose tensors lose channels, where anything has to.

Most operations take whatever size they get. Those that name sizes or positions have an entry here; whether the entry
is right, the trial in `dwindle.pruning.dependencies` shows for every single call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class OperationEdit:
    """How an operation's config, or the arguments of one call, change.

    Attributes:
        config: From the config, the inputs, the outputs and what is kept, to the new config.
        node: From a call's serialized arguments likewise.
    """

    config: Callable[[dict[str, Any], Any, Any, Any], dict[str, Any]] | None = None
    node: Callable[[dict[str, Any], Any, Any, Any], dict[str, Any]] | None = None


def _new_shape(shape: Any, value: Any, kept: Any, first: int) -> list[Any]:
    """Return a target shape with the sizes of the axes that are cut; ``first`` is the axis that it starts at."""
    new = list(shape)
    for position in range(len(new)):
        labels = value.axes[position + first]
        if labels is not None and new[position] not in (-1, None):
            new[position] = len(kept(labels))
    return new


def _reshape_layer(config: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    del given
    return {**config, "target_shape": _new_shape(config["target_shape"], results[0], kept, 1)}


def _reshape(config: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    del given
    return {**config, "newshape": _new_shape(config["newshape"], results[0], kept, 0)}


def _broadcast_to(config: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    del given
    return {**config, "shape": _new_shape(config["shape"], results[0], kept, 0)}


def _split(config: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    axis = config["axis"] % len(given[0].shape)
    if given[0].axes[axis] is None:
        return config
    sizes = [len(kept(value.axes[axis])) for value in results]
    return {**config, "indices_or_sections": [int(place) for place in np.cumsum(sizes)[:-1]]}


def _bounds(labels: np.ndarray, part: slice, kept: Any) -> tuple[Any, Any, Any]:
    """Return the slice that picks, of what is kept, what the old slice picked."""
    picked = np.arange(len(labels))[part]
    left = kept(labels)
    places = np.flatnonzero(np.isin(left, picked))
    if not len(places):
        return 0, 0, None
    return int(places[0]), int(places[-1]) + 1, None


def _slice_layer(config: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    del results
    parts = [list(part) for part in config["parts"]]
    for axis, labels in enumerate(given[0].axes[1:], start=1):
        if labels is not None and axis not in config["shrink"]:
            parts[axis - 1] = list(_bounds(labels, slice(*parts[axis - 1]), kept))
    return {**config, "parts": parts}


def _get_item(node: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    del results
    args = list(node["args"])
    single = not isinstance(args[1], list | tuple)
    index = [args[1]] if single else list(args[1])
    rank = len(given[0].shape)
    kinds = [part.get("class_name") if isinstance(part, dict) else None for part in index]
    used = sum(part is not None and kind != "__ellipsis__" for part, kind in zip(index, kinds, strict=True))
    axis = 0
    for position, (part, kind) in enumerate(zip(index, kinds, strict=True)):
        if kind == "__ellipsis__":
            axis += rank - used
        elif part is not None:
            labels = given[0].axes[axis]
            if labels is not None and kind == "__slice__":
                old = part["config"]
                begin, end, step = _bounds(labels, slice(old["start"], old["stop"], old["step"]), kept)
                index[position] = {**part, "config": {"start": begin, "stop": end, "step": step}}
            axis += 1
    args[1] = index[0] if single else index
    return {**node, "args": args}


def _constants(node: dict[str, Any], given: Any, results: Any, kept: Any) -> dict[str, Any]:
    """Cut the arrays among a call's arguments along the axes of the output that they are broadcast to."""
    del given

    def edited(data: Any) -> Any:
        if isinstance(data, dict):
            if data.get("class_name") not in ("__numpy__", "__tensor__"):
                return {key: edited(value) for key, value in data.items()}
            array = np.asarray(data["config"]["value"])
            for back in range(1, min(array.ndim, len(results[0].axes)) + 1):
                labels = results[0].axes[-back]
                if labels is not None and array.shape[-back] == len(labels):
                    array = np.take(array, kept(labels), axis=-back)
            return {**data, "config": {**data["config"], "value": array.tolist()}}
        return [edited(value) for value in data] if isinstance(data, list | tuple) else data

    found: dict[str, Any] = edited(node)
    return found


OPERATION_EDITS: dict[str, OperationEdit] = {
    "Reshape": OperationEdit(
        config=lambda config, given, results, kept: (_reshape_layer if "target_shape" in config else _reshape)(
            config, given, results, kept
        )
    ),
    "BroadcastTo": OperationEdit(config=_broadcast_to),
    "Split": OperationEdit(config=_split),
    "Slice": OperationEdit(config=lambda config, *rest: _slice_layer(config, *rest) if "parts" in config else config),
    "GetItem": OperationEdit(node=_get_item),
}


def edit_of(kind: str, node: Any) -> OperationEdit | None:
    """Return what changes in a call of an operation of this class, or None if nothing does."""
    if kind in OPERATION_EDITS:
        return OPERATION_EDITS[kind]
    text = repr(node)
    return OperationEdit(node=_constants) if "__numpy__" in text or "__tensor__" in text else None
