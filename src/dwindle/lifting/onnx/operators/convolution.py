"""Convolutions and pooling: windows over space, with channels last."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Any

import keras
import numpy as np

from dwindle.lifting.constants import Pad
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
from dwindle.lifting.onnx.values import Moving, channels_last

ops = keras.ops
Pairs = list[tuple[int, int]]


class Window:
    """How a window moves over space.

    Attributes:
        size: Its lengths.
        strides: Its steps.
        dilations: Distance of its entries.
        pads: Entries added before and behind each axis.
        same: Whether the padding is what Keras calls "same".
    """

    def __init__(self, node: Node, size: Sequence[int], lengths: Sequence[Any]) -> None:
        rank = len(size)
        given = node.attributes
        self.size = [int(n) for n in size]
        self.strides = list(given.get("strides") or [1] * rank)
        self.dilations = list(given.get("dilations") or [1] * rank)
        self.reach = [(n - 1) * d + 1 for n, d in zip(self.size, self.dilations, strict=True)]
        flat = list(given.get("pads") or [0] * 2 * rank)
        self.pads: Pairs = list(zip(flat[:rank], flat[rank:], strict=True))
        kind = given.get("auto_pad", "NOTSET")
        if kind.startswith("SAME"):
            found = []
            for n, s, r in zip(lengths, self.strides, self.reach, strict=True):
                total = r - 1 if s == 1 else max((ceil(number(node, n) / s) - 1) * s + r - n, 0)
                small = total // 2
                found.append((small, total - small) if kind == "SAME_UPPER" else (total - small, small))
            self.pads = found
        elif kind == "VALID":
            self.pads = [(0, 0)] * rank
        if any(n < 0 for pair in self.pads for n in pair):
            raise unsupported(node, "has negative padding")
        self.extra = [0] * rank  # of the pads behind: what only fills a last window up
        self.ceil = bool(given.get("ceil_mode", 0)) and kind == "NOTSET"
        if self.ceil:
            self._widen(node, lengths)
        self.same = all(
            pair == _same(n, s, r) for pair, n, s, r in zip(self.pads, lengths, self.strides, self.reach, strict=True)
        )

    def _widen(self, node: Node, lengths: Sequence[Any]) -> None:
        """Add behind what a last, incomplete window needs."""
        for k, (n, s, r, (before, behind)) in enumerate(zip(lengths, self.strides, self.reach, self.pads, strict=True)):
            total = number(node, n) + before + behind
            count = ceil((total - r) / s) + 1
            if (count - 1) * s >= number(node, n) + before:
                count -= 1
            self.extra[k] = max((count - 1) * s + r - total, 0)
        self.pads = [(before, behind + extra) for (before, behind), extra in zip(self.pads, self.extra, strict=True)]

    @property
    def padded(self) -> bool:
        """Whether anything is added."""
        return any(pair != (0, 0) for pair in self.pads)

    def counts(self, lengths: Sequence[int], *, with_pads: bool) -> np.ndarray:
        """Return how many entries lie in each window, of shape ``(1, *space, 1)``."""
        found = np.ones((), np.float32)
        for n, s, d, size, (before, behind), more in zip(
            lengths, self.strides, self.dilations, self.size, self.pads, self.extra, strict=True
        ):
            present = np.zeros(before + n + behind, np.float32)
            present[before : before + n] = 1
            if with_pads:
                present[: before + n + behind - more] = 1
            starts = range(0, len(present) - (size - 1) * d, s)
            found = np.multiply.outer(found, [present[a : a + (size - 1) * d + 1 : d].sum() for a in starts])
        return found[None, ..., None].astype(np.float32)


def _same(length: Any, stride: int, reach: int) -> tuple[int, int] | None:
    if stride == 1:
        return (reach - 1) // 2, (reach - 1) - (reach - 1) // 2
    if not isinstance(length, int):
        return None
    total = max((ceil(length / stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def with_zeros(context: Context, node: Node, tensor: Any, pads: Pairs) -> Any:
    """Return a tensor with channels last and zeros around it."""
    layers = {1: keras.layers.ZeroPadding1D, 2: keras.layers.ZeroPadding2D, 3: keras.layers.ZeroPadding3D}
    if len(pads) == 1:
        return context.layer(layers[1], node, padding=tuple(pads[0]))(tensor)
    if len(pads) in layers:
        return context.layer(layers[len(pads)], node, padding=tuple(tuple(pair) for pair in pads))(tensor)
    return ops.pad(tensor, [(0, 0), *pads, (0, 0)])


def _spatial(node: Node, value: Moving) -> tuple[int, list[Any]]:
    rank = value.rank - 2
    if rank < 1:
        raise unsupported(node, f"works on {value.rank} axes")
    return rank, list(value.sizes[2:])


_CONVOLUTIONS = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}
_DEPTHWISE = {1: keras.layers.DepthwiseConv1D, 2: keras.layers.DepthwiseConv2D}


@operator("Conv")
def _convolution(context: Context, node: Node, inputs: Inputs) -> Any:
    value, kernel, bias = moving(node, inputs[0]), inputs[1], optional(inputs, 2)
    rank, lengths = _spatial(node, value)
    sizes = kernel.sizes if isinstance(kernel, Moving) else kernel.shape
    window = Window(node, [number(node, n) for n in sizes[2:]], lengths)
    groups = node.attributes.get("group", 1)
    order = channels_last(value.rank)
    tensor = context.arranged(value, order)
    crowded = max(window.strides) > 1 and max(window.dilations) > 1
    fixed = is_constant(kernel) and (bias is None or is_constant(bias)) and rank <= 3 and not crowded
    padding = "same" if window.same else "valid"
    if not window.same and window.padded:
        tensor = with_zeros(context, node, tensor, window.pads)
    if not fixed:
        moved = context.arranged(kernel, (*range(2, rank + 2), 1, 0)) if isinstance(kernel, Moving) else (
            kernel.transpose(*range(2, rank + 2), 1, 0)
        )  # fmt: skip
        if crowded:
            raise unsupported(node, "has strides and dilations")
        found = _grouped(tensor, moved, groups, window, padding)
        if bias is not None:
            found = ops.add(found, context.plain(bias))
        return context.value(found, order)
    depthwise = groups > 1 and groups == kernel.shape[0] // (kernel.shape[0] // groups) == _channels(tensor)
    depthwise = depthwise and rank in _DEPTHWISE and len(set(window.strides)) == 1 and kernel.shape[1] == 1
    channels = kernel.shape[0]
    if bias is None:
        bias = context.added_behind(node, lambda constant: _as_bias(constant, channels, value.rank))
    names = [k for k in (1, 2) if k < len(node.inputs)]
    options: dict[str, Any] = {
        "strides": window.strides[0] if rank == 1 else tuple(window.strides), "padding": padding,
        "dilation_rate": window.dilations[0] if rank == 1 else tuple(window.dilations),
        "use_bias": bias is not None, "kernel_size": window.size[0] if rank == 1 else tuple(window.size),
    }  # fmt: skip
    if depthwise:
        options["depth_multiplier"] = channels // groups
        layer = context.shared(node, names, _DEPTHWISE[rank], **options)
        weight = kernel.reshape(groups, channels // groups, *kernel.shape[2:])
        weight = weight.transpose(*range(2, rank + 2), 0, 1)
        return context.value(context.filled(layer, tensor, kernel=weight, bias=bias), order)
    layer = context.shared(node, names, _CONVOLUTIONS[rank], filters=channels, groups=groups, **options)
    weight = kernel.transpose(*range(2, rank + 2), 1, 0)
    return context.value(context.filled(layer, tensor, kernel=weight, bias=bias), order)


def _channels(tensor: Any) -> int:
    return int(tensor.shape[-1])


def _as_bias(constant: np.ndarray, channels: int, rank: int) -> np.ndarray | None:
    padded = (1,) * (rank - constant.ndim) + constant.shape
    return constant.ravel() if padded == (1, channels, *[1] * (rank - 2)) and constant.dtype == np.float32 else None


def _grouped(tensor: Any, kernel: Any, groups: int, window: Window, padding: str) -> Any:
    options = {"strides": tuple(window.strides), "padding": padding, "dilation_rate": tuple(window.dilations)}
    if groups == 1:
        return ops.conv(tensor, kernel, **options)
    parts = zip(ops.split(tensor, groups, axis=-1), ops.split(kernel, groups, axis=-1), strict=True)
    return ops.concatenate([ops.conv(a, b, **options) for a, b in parts], axis=-1)


def _transposed_pads(
    node: Node, lengths: list[Any], strides: Sequence[int], reach: Sequence[int], behind: Sequence[int]
) -> Pairs:
    """Return what a transposed convolution cuts off in front of and behind each axis."""
    given, rank = node.attributes, len(lengths)
    kind = given.get("auto_pad", "NOTSET")
    if "output_shape" not in given and not kind.startswith("SAME"):
        flat = given.get("pads") or [0] * 2 * rank
        return list(zip(flat[:rank], flat[rank:], strict=True))
    wanted = given.get("output_shape") or [number(node, n) * s for n, s in zip(lengths, strides, strict=True)]
    pads = []
    for n, s, r, o, w in zip(lengths, strides, reach, behind, wanted, strict=True):
        total = s * (number(node, n) - 1) + o + r - w
        small = total // 2
        pads.append((small, total - small) if kind == "SAME_UPPER" else (total - small, small))
    return pads


@operator("ConvTranspose")
def _transposed(context: Context, node: Node, inputs: Inputs) -> Any:
    value, kernel, bias = moving(node, inputs[0]), inputs[1], optional(inputs, 2)
    rank, lengths = _spatial(node, value)
    sizes = kernel.sizes if isinstance(kernel, Moving) else kernel.shape
    size = [number(node, n) for n in sizes[2:]]
    given, groups = node.attributes, node.attributes.get("group", 1)
    strides, dilations = given.get("strides") or [1] * rank, given.get("dilations") or [1] * rank
    reach = [(n - 1) * d + 1 for n, d in zip(size, dilations, strict=True)]
    if max(dilations) > 1:
        kernel = _dilated(node, kernel, dilations)
        size, dilations = reach, [1] * rank
    behind = given.get("output_padding") or [0] * rank
    pads = _transposed_pads(node, lengths, strides, reach, behind)
    order = channels_last(value.rank)
    tensor = context.arranged(value, order)
    # What Keras computes without padding has max(reach - stride, 0) entries behind the last stride.
    full = [max(r - s, 0) - (r - s) for r, s in zip(reach, strides, strict=True)]
    crops = [(before, after - o + extra) for (before, after), o, extra in zip(pads, behind, full, strict=True)]
    same = all(
        r >= s and crop == ((r - s) // 2, r - s - (r - s) // 2)
        for crop, r, s in zip(crops, reach, strides, strict=True)
    )
    padding = "same" if same else "valid"
    layers = {1: keras.layers.Conv1DTranspose, 2: keras.layers.Conv2DTranspose, 3: keras.layers.Conv3DTranspose}
    order_kernel = (*range(2, rank + 2), 1, 0)
    if is_constant(kernel) and (bias is None or is_constant(bias)) and rank in layers:
        # What is added where the result is padded must not have the bias.
        own = bias is not None and (same or all(n >= 0 for pair in crops for n in pair))
        options = {"filters": kernel.shape[1], "kernel_size": tuple(size), "strides": tuple(strides),
                   "padding": padding, "use_bias": own}  # fmt: skip
        parts = []
        wide, filters = kernel.shape[0] // groups, kernel.shape[1]
        for k in range(groups):
            layer = context.layer(layers[rank], node, **options)
            weight = kernel[k * wide : (k + 1) * wide].transpose(order_kernel)
            source = tensor if groups == 1 else tensor[..., k * wide : (k + 1) * wide]
            mine = bias[k * filters : (k + 1) * filters] if own else None
            parts.append(context.filled(layer, source, kernel=weight, bias=mine))
        found = parts[0] if groups == 1 else ops.concatenate(parts, axis=-1)
        bias = None if own else bias
    else:
        moved = context.arranged(kernel, order_kernel) if isinstance(kernel, Moving) else kernel.transpose(order_kernel)
        pairs = zip(ops.split(tensor, groups, axis=-1), ops.split(moved, groups, axis=-1), strict=True)
        found = ops.concatenate(
            [
                ops.conv_transpose(a, b, strides=tuple(strides), padding=padding, data_format="channels_last")
                for a, b in pairs
            ],
            axis=-1,
        )
    if not same:
        found = _cropped(found, crops)
    if bias is not None:
        found = ops.add(found, context.plain(bias))
    return context.value(found, order)


def _dilated(node: Node, kernel: Any, dilations: Sequence[int]) -> np.ndarray:
    """Return a kernel with zeros between its entries: TensorFlow has no dilated transposed convolution on CPUs."""
    if not is_constant(kernel):
        raise unsupported(node, "computes a kernel with dilations")
    shape = [(n - 1) * d + 1 for n, d in zip(kernel.shape[2:], dilations, strict=True)]
    found = np.zeros((*kernel.shape[:2], *shape), kernel.dtype)
    found[(slice(None), slice(None), *(slice(None, None, d) for d in dilations))] = kernel
    return found


def _cropped(tensor: Any, crops: Pairs) -> Any:
    cut = [slice(max(a, 0), -b if b > 0 else None) for a, b in crops]
    if any(part != slice(0, None) for part in cut):
        tensor = tensor[(slice(None), *cut, slice(None))]
    missing = [(max(-a, 0), max(-b, 0)) for a, b in crops]
    return ops.pad(tensor, [(0, 0), *missing, (0, 0)]) if any(n for pair in missing for n in pair) else tensor


_MAXIMA = {1: keras.layers.MaxPooling1D, 2: keras.layers.MaxPooling2D, 3: keras.layers.MaxPooling3D}
_MEANS = {1: keras.layers.AveragePooling1D, 2: keras.layers.AveragePooling2D, 3: keras.layers.AveragePooling3D}


def _pool_options(window: Window, padding: str) -> dict[str, Any]:
    if len(window.size) == 1:
        return {"pool_size": window.size[0], "strides": window.strides[0], "padding": padding}
    return {"pool_size": tuple(window.size), "strides": tuple(window.strides), "padding": padding}


@operator("MaxPool")
def _maximum(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    rank, lengths = _spatial(node, value)
    window = Window(node, node.attributes["kernel_shape"], lengths)
    if len(node.outputs) > 1 and node.outputs[1]:
        raise unsupported(node, "gives the places of the maxima")
    order = channels_last(value.rank)
    tensor = context.arranged(value, order)
    if rank not in _MAXIMA or "float" not in value.dtype or max(window.dilations) > 1:
        return context.value(_shifted(tensor, window, value.dtype), order, at_least_zero=value.at_least_zero)
    if window.same:
        layer = context.layer(_MAXIMA[rank], node, **_pool_options(window, "same"))
        return context.value(layer(tensor), order, at_least_zero=value.at_least_zero)
    if window.padded and value.at_least_zero:
        tensor = with_zeros(context, node, tensor, window.pads)
    elif window.padded:
        # A window that reaches outside holds the entries next to the edge as well: mirrored, they change no maximum.
        if all(2 * max(pair) <= n for pair, n in zip(window.pads, window.size, strict=True)):
            tensor = Pad(paddings=[(0, 0), *window.pads, (0, 0)], mode="symmetric")(tensor)
        else:
            return context.value(_shifted(tensor, window, value.dtype), order)
    layer = context.layer(_MAXIMA[rank], node, **_pool_options(window, "valid"))
    return context.value(layer(tensor), order, at_least_zero=value.at_least_zero)


def _shifted(tensor: Any, window: Window, dtype: str) -> Any:
    """Return the maxima of windows as the maximum of shifted copies."""
    lowest = np.finfo(dtype).min if "float" in dtype else np.iinfo(dtype).min
    found = ops.pad(
        tensor, [(0, 0), *window.pads, (0, 0)], constant_values=lowest.item() if hasattr(lowest, "item") else lowest
    )
    for axis, (size, step, dilation) in enumerate(zip(window.size, window.strides, window.dilations, strict=True), 1):
        count = (int(found.shape[axis]) - (size - 1) * dilation - 1) // step + 1
        parts = []
        for k in range(size):
            index = [slice(None)] * len(found.shape)
            index[axis] = slice(k * dilation, k * dilation + (count - 1) * step + 1, step)
            parts.append(found[tuple(index)])
        found = parts[0]
        for part in parts[1:]:
            found = ops.maximum(found, part)
    return found


@operator("AveragePool")
def _mean(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    rank, lengths = _spatial(node, value)
    window = Window(node, node.attributes["kernel_shape"], lengths)
    if rank not in _MEANS or max(window.dilations) > 1:
        return _mean_of_shifts(context, node, value, window, lengths)
    order = channels_last(value.rank)
    tensor = context.arranged(value, order)
    with_pads = bool(node.attributes.get("count_include_pad", 0))
    zero = value.at_least_zero
    if window.same and (not with_pads or not window.padded):
        padding = "same" if window.padded else "valid"
        layer = context.layer(_MEANS[rank], node, **_pool_options(window, padding))
        return context.value(layer(tensor), order, at_least_zero=zero)
    if window.padded:
        tensor = with_zeros(context, node, tensor, window.pads)
    found = context.layer(_MEANS[rank], node, **_pool_options(window, "valid"))(tensor)
    if window.padded and not (with_pads and not window.ceil):
        counts = window.counts([number(node, n) for n in lengths], with_pads=with_pads)
        if not (counts == prod(window.size)).all():
            found = ops.multiply(found, (prod(window.size) / counts).astype(value.dtype))
    return context.value(found, order, at_least_zero=zero)


def _mean_of_shifts(context: Context, node: Node, value: Moving, window: Window, lengths: list[Any]) -> Any:
    order = channels_last(value.rank)
    found = ops.pad(context.arranged(value, order), [(0, 0), *window.pads, (0, 0)])
    counts = window.counts(
        [number(node, n) for n in lengths], with_pads=bool(node.attributes.get("count_include_pad", 0))
    )
    return context.value(ops.divide(_summed(found, window), counts.astype(value.dtype)), order)


def _summed(found: Any, window: Window) -> Any:
    """Return the sums of windows of a padded tensor as sums of shifted copies."""
    for axis, (size, step, dilation) in enumerate(zip(window.size, window.strides, window.dilations, strict=True), 1):
        count = (int(found.shape[axis]) - (size - 1) * dilation - 1) // step + 1
        total: Any = 0.0
        for k in range(size):
            index = [slice(None)] * len(found.shape)
            index[axis] = slice(k * dilation, k * dilation + (count - 1) * step + 1, step)
            total = total + found[tuple(index)]
        found = total
    return found


@operator("LpPool")
def _norm(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    rank, lengths = _spatial(node, value)
    window = Window(node, node.attributes["kernel_shape"], lengths)
    power = float(node.attributes.get("p", 2))
    order = channels_last(value.rank)
    if rank not in _MEANS or max(window.dilations) > 1:
        powers = ops.power(ops.abs(context.arranged(value, order)), power)
        total = _summed(ops.pad(powers, [(0, 0), *window.pads, (0, 0)]), window)
        return context.value(ops.power(total, 1 / power), order, at_least_zero=True)
    tensor = ops.power(ops.abs(context.arranged(value, order)), power)
    if window.padded:
        tensor = with_zeros(context, node, tensor, window.pads)
    found = context.layer(_MEANS[rank], node, **_pool_options(window, "valid"))(tensor)
    return context.value(ops.power(found * float(prod(window.size)), 1 / power), order, at_least_zero=True)


@operator("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global(context: Context, node: Node, inputs: Inputs) -> Any:
    value = moving(node, inputs[0])
    rank, _ = _spatial(node, value)
    order = channels_last(value.rank)
    tensor = context.arranged(value, order)
    if node.kind == "GlobalLpPool":
        power = float(node.attributes.get("p", 2))
        total = ops.sum(ops.power(ops.abs(tensor), power), axis=tuple(range(1, rank + 1)), keepdims=True)
        return context.value(ops.power(total, 1 / power), order, at_least_zero=True)
    kind = "Average" if node.kind == "GlobalAveragePool" else "Max"
    if rank > 3:
        function = ops.mean if kind == "Average" else ops.max
        return context.value(function(tensor, axis=tuple(range(1, rank + 1)), keepdims=True), order)
    factory = getattr(keras.layers, f"Global{kind}Pooling{rank}D")
    return context.value(context.layer(factory, node, keepdims=True)(tensor), order, at_least_zero=value.at_least_zero)
