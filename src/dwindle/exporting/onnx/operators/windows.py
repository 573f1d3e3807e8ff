"""Convolutions, pooling and resizing: windows over space, with channels on the second axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.exporting.onnx.operators.registry import (
    Inputs,
    finish,
    given,
    operator,
    optional,
    shape_of,
    unsupported,
)
from dwindle.exporting.onnx.values import Operand, Value, channels_first
from dwindle.lifting.flatbuffer import Operation, Tensor

if TYPE_CHECKING:
    from dwindle.exporting.onnx.writer import Writer


def _numbers(operation: Operation, names: Sequence[str], default: int | None = None) -> list[int]:
    return [int(operation.options[name] if default is None else operation.options.get(name, default)) for name in names]


def _pads(operation: Operation, lengths: Sequence[int], size: Sequence[int], strides: Sequence[int],
          dilations: Sequence[int]) -> list[int]:  # fmt: skip
    """Return the entries before all axes of space, then those behind: of what is missing, the larger half behind."""
    if operation.options["padding"] != schema.Padding.SAME:
        return [0] * (2 * len(lengths))
    before, behind = [], []
    for length, entries, stride, dilation in zip(lengths, size, strides, dilations, strict=True):
        reach = (entries - 1) * dilation + 1
        total = max((-(-length // stride) - 1) * stride + reach - length, 0)
        before.append(total // 2)
        behind.append(total - total // 2)
    return [*before, *behind]


def _convolution(
    writer: Writer, operation: Operation, inputs: Inputs, *, order: Sequence[int], names: Sequence[str], group: int
) -> Value:
    """Write a convolution.

    Args:
        writer: The writer.
        operation: The operator.
        inputs: Images, kernel, bias.
        order: The kernel's axes in ONNX's order ``(out, in, *space)``.
        names: What the options call the axes of space.
        group: Number of groups of channels.
    """
    kernel, lengths = shape_of(operation, 1), shape_of(operation)[1:-1]
    size = [kernel[axis] for axis in order[2:]]
    strides = _numbers(operation, [f"stride{name}" for name in names])
    dilations = _numbers(operation, [f"dilation{name}Factor" for name in names], 1)
    axes = channels_first(len(lengths) + 2)
    made = writer.node(
        "Conv", [*_named(writer, inputs[0], inputs[1], axes, order), *_bias(writer, optional(inputs, 2))],
        kernel_shape=size, strides=strides, dilations=dilations, group=group,
        pads=_pads(operation, lengths, size, strides, dilations),
    )  # fmt: skip
    return Value(finish(writer, operation, made), axes)


def _named(writer: Writer, images: Operand, kernel: Operand, axes: Sequence[int], order: Sequence[int]) -> list[str]:
    return [writer.ordered(writer.moving(images), axes), writer.ordered(kernel, order)]


def _bias(writer: Writer, bias: Operand | None) -> list[str]:
    return [] if bias is None else [writer.plain(bias)]


@operator("CONV_2D")
def _conv_2d(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    group = shape_of(operation)[-1] // shape_of(operation, 1)[3]
    return _convolution(writer, operation, inputs, order=(0, 3, 1, 2), names="HW", group=group)


@operator("DEPTHWISE_CONV_2D")
def _depthwise_conv_2d(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    # The channels that are made of one lie next to each other, as those of a group do in ONNX.
    group = shape_of(operation)[-1]
    return _convolution(writer, operation, inputs, order=(3, 0, 1, 2), names="HW", group=group)


@operator("CONV_3D")
def _conv_3d(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    group = shape_of(operation)[-1] // shape_of(operation, 1)[3]
    return _convolution(writer, operation, inputs, order=(4, 3, 0, 1, 2), names="DHW", group=group)


@operator("TRANSPOSE_CONV")
def _transpose_conv(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    kernel, before = shape_of(operation, 1), shape_of(operation, 2)[1:3]
    after = operation.outputs[0].shape[1:3]
    size, strides = kernel[1:3], _numbers(operation, ["strideH", "strideW"])
    first = _pads(operation, after, size, strides, (1, 1))[:2]
    behind = [
        (length - 1) * stride + entries - start - made
        for length, stride, entries, start, made in zip(before, strides, size, first, after, strict=True)
    ]
    extra = [max(-n, 0) for n in behind]
    if any(more >= stride for more, stride in zip(extra, strides, strict=True) if more):
        raise unsupported(operation, f"makes {tuple(after)} of {tuple(before)}")
    axes = channels_first(4)
    made = writer.node(
        "ConvTranspose",
        [*_named(writer, inputs[2], inputs[1], axes, (3, 0, 1, 2)), *_bias(writer, optional(inputs, 3))],
        kernel_shape=list(size), strides=strides, pads=[*first, *(max(n, 0) for n in behind)], output_padding=extra,
    )  # fmt: skip
    return Value(finish(writer, operation, made), axes)


@operator("MAX_POOL_2D", "AVERAGE_POOL_2D")
def _pool_2d(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    size, strides = (_numbers(operation, names) for names in (("filterHeight", "filterWidth"), ("strideH", "strideW")))
    value, axes = writer.moving(inputs[0]), channels_first(4)
    name = writer.ordered(value, axes)
    pads = _pads(operation, shape_of(operation)[1:3], size, strides, (1, 1))
    options: dict[str, Any] = {"kernel_shape": size, "strides": strides, "pads": pads}
    if operation.name == "MAX_POOL_2D":
        return Value(finish(writer, operation, writer.node("MaxPool", [name], **options)), axes)
    options["count_include_pad"] = 0
    output = operation.outputs[0]
    if writer.away and value.integers is not None and output.is_quantized:
        return _average_of_integers(writer, operation, Value(name, axes, None, value.integers), options)
    return Value(finish(writer, operation, writer.node("AveragePool", [name], **options)), axes)


def _average_of_integers(writer: Writer, operation: Operation, value: Value, options: dict[str, Any]) -> Value:
    """Return averages on their grid, halves rounded away from the integer zero."""
    output = operation.outputs[0]
    scale, point = np.ravel(np.asarray(output.scale))[0], np.ravel(np.asarray(output.zero_point))[0]
    scale_name, point_name = (
        writer.initializer(np.float32(scale), "scale"),
        writer.initializer(np.float32(point), "zero"),
    )
    real = writer.node("AveragePool", [value.name], **options)
    steps = writer.node("Add", [writer.node("Div", [real, scale_name]), point_name])
    # Averages of up to a thousand integers are no nearer to a half than this; the division is not as exact.
    half = writer.initializer(np.float32(0.5 + 2.0**-11), "half")
    size = writer.node("Floor", [writer.node("Add", [writer.node("Abs", [steps]), half])])
    whole = writer.node("Mul", [writer.node("Sign", [steps]), size])
    found = writer.node("Mul", [writer.node("Sub", [whole, point_name]), scale_name])
    return Value(finish(writer, operation, found), value.axes)


@operator("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
def _resize(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    axes = channels_first(4)
    how = "asymmetric"
    if operation.options.get("alignCorners"):
        how = "align_corners"
    elif operation.options.get("halfPixelCenters"):
        how = "half_pixel"
    options = {"mode": "linear"}
    if operation.name == "RESIZE_NEAREST_NEIGHBOR":
        options = {"mode": "nearest", "nearest_mode": "floor" if how == "asymmetric" else "round_prefer_ceil"}
    # Sizes would have to name the number of samples, or axes, which ONNX Runtime loses where it moves a transpose.
    scales = [_scale(old, int(new)) for old, new in zip(shape_of(operation)[1:3], given(operation, 1), strict=True)]
    names = [writer.ordered(writer.moving(inputs[0]), axes), ""]
    names.append(writer.initializer(np.array([1, 1, *scales], np.float32), "scales"))
    return Value(writer.node("Resize", names, coordinate_transformation_mode=how, **options), axes)


def _scale(before: int, after: int) -> np.float32:
    """Return a factor that makes one length of another when the product is cut to a whole number."""
    found = np.float32(after / before)
    while before * float(found) < after:
        found = np.nextafter(found, np.float32(np.inf))
    return found


@operator("DEPTH_TO_SPACE", "SPACE_TO_DEPTH")
def _depth_and_space(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    axes = channels_first(4)
    images = writer.ordered(writer.moving(inputs[0]), axes)
    block = int(operation.options["blockSize"])
    if operation.name == "SPACE_TO_DEPTH":
        return Value(writer.node("SpaceToDepth", [images], blocksize=block), axes)
    return Value(writer.node("DepthToSpace", [images], blocksize=block, mode="DCR"), axes)


@operator("PAD", "PADV2", "MIRROR_PAD")
def _pad(writer: Writer, operation: Operation, inputs: Inputs) -> Any:
    value = writer.moving(inputs[0])
    pairs = [[int(n) for n in pair] for pair in given(operation, 1)]
    if operation.name == "MIRROR_PAD" and operation.options.get("mode", 0) != schema.MirrorPadMode.REFLECT:
        return _mirrored(writer, operation, value, pairs)
    pads = [*value.moved([pair[0] for pair in pairs]), *value.moved([pair[1] for pair in pairs])]
    names = [value.name, writer.numbers(pads, "pads")]
    if operation.name == "MIRROR_PAD":
        return Value(writer.node("Pad", names, mode="reflect"), value.axes)
    fill = optional(inputs, 2)
    if isinstance(fill, Tensor):
        names.append(writer.scalar(fill))
    elif fill is not None:
        raise unsupported(operation, "computes what it pads with")
    return Value(writer.node("Pad", names, mode="constant"), value.axes)


def _mirrored(writer: Writer, operation: Operation, value: Value, pairs: Sequence[Sequence[int]]) -> Value:
    """Return a value with its borders mirrored, the outermost entries twice, which ONNX' own operator can't."""
    name = value.name
    for axis, (before, behind) in enumerate(pairs):
        if before or behind:
            places = np.pad(np.arange(shape_of(operation)[axis]), (before, behind), mode="symmetric").tolist()
            name = writer.node("Gather", [name, writer.numbers(places, "places")], axis=value.place(axis))
    return Value(name, value.axes)
