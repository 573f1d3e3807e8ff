"""Resizing: an interpolation along each axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from dwindle.lifting.onnx.graph import Node
from dwindle.lifting.onnx.operators.registry import (
    Context,
    Inputs,
    is_constant,
    moving,
    number,
    operator,
    optional,
    unsupported,
)
from dwindle.lifting.onnx.values import channels_last

ops = keras.ops


@operator("Resize", "Upsample")
def _resize(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    given = node.attributes
    axes = [int(axis) % value.rank for axis in given.get("axes") or range(value.rank)]
    scales, sizes = _wanted(node, inputs)
    mode = given.get("mode", "nearest")
    old = node.kind == "Upsample" or node.version < 11
    how = "asymmetric" if old else given.get("coordinate_transformation_mode", "half_pixel")
    if how == "tf_crop_and_resize":
        raise unsupported(node, "crops while it resizes")
    changes: dict[int, tuple[int, float]] = {}
    for place, axis in enumerate(axes):
        scale = None if scales is None else float(scales[place])
        if scale == 1 or (sizes is not None and sizes[place] == value.sizes[axis]):
            continue
        length = number(node, value.sizes[axis])
        if scale is None:
            changes[axis] = (number(node, sizes[place]), number(node, sizes[place]) / length)
        else:
            changes[axis] = (int(np.floor(length * scale)), scale)
    policy = given.get("keep_aspect_ratio_policy", "stretch")
    if sizes is not None and policy != "stretch" and axes:
        pick = min if policy == "not_larger" else max
        lengths = [number(node, value.sizes[axis]) for axis in axes]
        scale = pick(number(node, size) / n for size, n in zip(sizes, lengths, strict=True))
        changes = {axis: (int(np.floor(n * scale + 0.5)), scale) for axis, n in zip(axes, lengths, strict=True)}
    if not changes:
        return value
    nearest = "floor" if old else given.get("nearest_mode", "round_prefer_floor")
    tensor = _by_layer(context, node, value, changes, mode, how, nearest)
    if tensor is not None:
        return context.value(tensor, channels_last(4), at_least_zero=value.at_least_zero and mode != "cubic")
    x = value.tensor
    for axis, (size, scale) in changes.items():
        length = number(node, value.sizes[axis])
        places = coordinates(how, length, size, scale)
        place = value.place(axis)
        if mode == "nearest":
            x = ops.take(x, nearest_places(places, nearest, length), axis=place)
        else:
            options = {"cubic": mode == "cubic", "a": given.get("cubic_coeff_a", -0.75), "scale": scale,
                       "antialias": bool(given.get("antialias", 0)),
                       "outside": not given.get("exclude_outside", 0)}  # fmt: skip
            matrix = interpolation(places, length, **options)
            x = _along(x, matrix, place)
    return context.value(x, value.axes, at_least_zero=value.at_least_zero and mode != "cubic")


def _wanted(node: Node, inputs: Inputs) -> tuple[Any, Any]:
    """Return the scales or the sizes, whichever is given."""
    if node.kind == "Upsample" or node.version < 11:
        scales = inputs[1] if len(inputs) > 1 else np.array(node.attributes["scales"], np.float32)
        sizes = None
    else:
        scales, sizes = optional(inputs, 2), optional(inputs, 3)
    for found in (scales, sizes):
        if found is not None and not is_constant(found):
            raise unsupported(node, "computes its sizes")
    scales = None if scales is None or scales.size == 0 else np.ravel(scales)
    if scales is not None and scales.dtype == object:
        raise unsupported(node, "scales by a length that is not known")
    return scales, None if sizes is None or sizes.size == 0 else np.ravel(sizes)


def _by_layer(
    context: Context, node: Node, value: Any, changes: dict[int, tuple[int, float]], mode: str, how: str, nearest: str
) -> Any:
    """Return what a Keras layer makes of images, None where there is none that does the same."""
    if value.rank != 4 or not set(changes) <= {2, 3}:
        return None
    lengths = [number(node, value.sizes[axis]) for axis in (2, 3)]
    factors = [changes.get(axis, (0, 1.0))[1] for axis in (2, 3)]
    whole = all(factor == int(factor) for factor in factors)
    # Where each entry is repeated a whole number of times, most conventions agree; the table says which.
    if mode == "nearest" and whole:
        same = all(
            (nearest_places(coordinates(how, n, int(n * f), f), nearest, n) == np.repeat(np.arange(n), int(f))).all()
            for n, f in zip(lengths, factors, strict=True)
        )
        if same:
            x = context.arranged(value, channels_last(4))
            return context.layer(keras.layers.UpSampling2D, node, size=tuple(int(f) for f in factors))(x)
    if mode == "linear" and how in ("half_pixel", "pytorch_half_pixel") and not node.attributes.get("antialias", 0):
        sizes = [changes[axis][0] if axis in changes else n for axis, n in zip((2, 3), lengths, strict=True)]
        exact = all(size / n == factor for size, n, factor in zip(sizes, lengths, factors, strict=True))
        if exact and min(sizes) > 1 and not node.attributes.get("exclude_outside", 0):
            x = context.arranged(value, channels_last(4))
            if whole:
                size = tuple(int(f) for f in factors)
                return context.layer(keras.layers.UpSampling2D, node, size=size, interpolation="bilinear")(x)
            options = {"height": sizes[0], "width": sizes[1], "interpolation": "bilinear", "antialias": False}
            return context.layer(keras.layers.Resizing, node, **options, data_format="channels_last")(x)
    return None


def _along(x: Any, matrix: np.ndarray, place: int) -> Any:
    """Return a tensor with one axis multiplied by a matrix of shape ``(before, after)``."""
    rank = len(x.shape)
    order = [*(k for k in range(rank) if k != place), place]
    back = [order.index(k) for k in range(rank)]
    if place == rank - 2:
        return ops.matmul(np.ascontiguousarray(matrix.T), x)
    return ops.transpose(ops.matmul(ops.transpose(x, order), matrix), back)


def coordinates(how: str, before: int, after: int, scale: float) -> np.ndarray:
    """Return where each new entry lies among the old ones."""
    x = np.arange(after, dtype=np.float64)
    if how == "align_corners":
        return np.zeros(1) if after == 1 else x * (before - 1) / (before * scale - 1)
    if how == "asymmetric":
        return x / scale
    if how == "pytorch_half_pixel" and after == 1:
        return np.full(1, -0.5)
    if how == "half_pixel_symmetric":
        ratio = after / (scale * before)
        return before / 2 * (1 - ratio) + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


def nearest_places(places: np.ndarray, how: str, length: int) -> np.ndarray:
    """Return the old entry that each new one copies."""
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "round_prefer_floor": lambda x: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: np.floor(x + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
    return np.asarray(np.clip(functions[how](places), 0, length - 1), np.int32)


def interpolation(
    places: np.ndarray, length: int, *, cubic: bool, a: float, scale: float, antialias: bool, outside: bool
) -> np.ndarray:
    """Return the matrix ``(before, after)`` of a linear or cubic interpolation; entries outside repeat the border."""
    shrink = min(scale, 1.0) if antialias else 1.0
    reach = (2 if cubic else 1) / shrink
    found = np.zeros((length, len(places)))
    for column, x in enumerate(places):
        base = int(np.floor(x))
        taps: Sequence[int] = range(base + int(np.floor(-reach)) + 1, base + int(np.ceil(reach)) + 1)
        weights = np.array([_weight(abs(tap - x) * shrink, cubic, a) for tap in taps])
        if not outside:
            weights = np.where([0 <= tap < length for tap in taps], weights, 0)
        weights = weights / weights.sum() if antialias or not outside else weights
        for tap, weight in zip(taps, weights, strict=True):
            found[min(max(tap, 0), length - 1), column] += weight
    return found.astype(np.float32)


def _weight(distance: float, cubic: bool, a: float) -> float:
    if not cubic:
        return max(0.0, 1 - distance)
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    if distance < 2:
        return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return 0.0
