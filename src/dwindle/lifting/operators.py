"""The table of operators: how each LiteRT operator becomes a Keras layer.

An entry is a function ``(context, operation, inputs) -> outputs`` over Keras tensors, registered under the operator's
name. To add one: write the function with ``@operator("NAME")`` and give it a numeric test in
``tests/lifting/test_operators.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dwindle.errors import UnsupportedModelError
from dwindle.lifting.constants import ConstantOperand, Gather, Pad, Slice
from dwindle.lifting.flatbuffer import Operation, Tensor


class Context(Protocol):
    """What an entry may ask of the lifting in progress."""

    def layer(self, factory: Callable[..., Any], operation: Operation, **options: Any) -> Any:
        """Make a layer named after the operator's output."""
        ...

    def weights(self, layer: Any, **tensors: tuple[Tensor | None, str]) -> None:
        """Note which constants of the file fill which variables of a layer, and how they are laid out."""
        ...


Entry = Callable[[Context, Operation, list[Any]], Any]
OPERATORS: dict[str, Entry] = {}


def operator(*names: str) -> Callable[[Entry], Entry]:
    """Register an entry for one or several operators."""

    def register(entry: Entry) -> Entry:
        for name in names:
            OPERATORS[name] = entry
        return entry

    return register


_ACTIVATIONS: dict[int, Any] = {
    schema.ActivationFunctionType.NONE: None,
    schema.ActivationFunctionType.RELU: "relu",
    schema.ActivationFunctionType.RELU6: "relu6",
    schema.ActivationFunctionType.TANH: "tanh",
}


def fused_activation(operation: Operation) -> str | None:
    """Return the Keras name of the activation that the operator ends in."""
    code = operation.options.get("fusedActivationFunction", 0)
    if code not in _ACTIVATIONS:
        raise UnsupportedModelError(f"{operation.name} ends in activation number {code}, which has no entry yet")
    name: str | None = _ACTIVATIONS[code]
    return name


def _finish(context: Context, operation: Operation, value: Any) -> Any:
    """Apply the fused activation of an operator whose layer has none."""
    activation = fused_activation(operation)
    if activation is None:
        return value
    return context.layer(keras.layers.Activation, operation, activation=activation)(value)


def _padding(operation: Operation) -> str:
    return "same" if operation.options["padding"] == schema.Padding.SAME else "valid"


def constant(operation: Operation, position: int) -> np.ndarray:
    """Return an input that must be a constant, such as a shape or axes."""
    tensor = operation.inputs[position] if position < len(operation.inputs) else None
    if tensor is None or tensor.value is None:
        raise UnsupportedModelError(
            f"{operation.name} `{operation.outputs[0].name}` computes its operand {position}; "
            "only constants have an entry"
        )
    return tensor.value


def _weight(operation: Operation, position: int) -> Tensor:
    tensor = operation.inputs[position]
    if tensor is None or tensor.value is None:
        raise UnsupportedModelError(
            f"{operation.name} `{operation.outputs[0].name}` computes its weights; only constant ones have an entry"
        )
    return tensor


def _bias(operation: Operation, position: int) -> Tensor | None:
    return operation.inputs[position] if position < len(operation.inputs) else None


@operator("CONV_2D")
def _conv_2d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    kernel, bias = _weight(operation, 1), _bias(operation, 2)
    out_channels, height, width, in_channels = kernel.shape
    channels = int(inputs[0].shape[-1])
    layer = context.layer(
        keras.layers.Conv2D,
        operation,
        filters=out_channels,
        kernel_size=(height, width),
        strides=(operation.options["strideH"], operation.options["strideW"]),
        dilation_rate=(operation.options["dilationHFactor"], operation.options["dilationWFactor"]),
        padding=_padding(operation),
        groups=channels // in_channels,
        use_bias=bias is not None,
        activation=fused_activation(operation),
    )
    context.weights(layer, kernel=(kernel, "conv2d"), bias=(bias, "plain"))
    return layer(inputs[0])


@operator("DEPTHWISE_CONV_2D")
def _depthwise_conv_2d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    kernel, bias = _weight(operation, 1), _bias(operation, 2)
    _, height, width, out_channels = kernel.shape
    strides = (operation.options["strideH"], operation.options["strideW"])
    dilation = (operation.options["dilationHFactor"], operation.options["dilationWFactor"])
    if strides[0] != strides[1] or (max(dilation) > 1 and max(strides) > 1):
        # Keras' depthwise layer takes one stride only; a grouped convolution computes the same.
        layer = context.layer(
            keras.layers.Conv2D, operation, filters=out_channels, kernel_size=(height, width), strides=strides,
            dilation_rate=dilation, padding=_padding(operation), groups=int(inputs[0].shape[-1]),
            use_bias=bias is not None, activation=fused_activation(operation),
        )  # fmt: skip
        context.weights(layer, kernel=(kernel, "depthwise_as_conv2d"), bias=(bias, "plain"))
        return layer(inputs[0])
    layer = context.layer(
        keras.layers.DepthwiseConv2D,
        operation,
        kernel_size=(height, width),
        strides=strides,
        dilation_rate=dilation,
        padding=_padding(operation),
        depth_multiplier=out_channels // int(inputs[0].shape[-1]),
        use_bias=bias is not None,
        activation=fused_activation(operation),
    )
    context.weights(layer, kernel=(kernel, "depthwise"), bias=(bias, "plain"))
    return layer(inputs[0])


@operator("FULLY_CONNECTED")
def _fully_connected(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    kernel, bias = _weight(operation, 1), _bias(operation, 2)
    units, features = kernel.shape
    value = inputs[0]
    if int(value.shape[-1]) != features or (len(value.shape) > 2 and not operation.options.get("keepNumDims")):
        value = context.layer(keras.layers.Flatten, operation)(value)
    layer = context.layer(
        keras.layers.Dense,
        operation,
        units=units,
        use_bias=bias is not None,
        activation=fused_activation(operation),
    )
    context.weights(layer, kernel=(kernel, "dense"), bias=(bias, "plain"))
    return layer(value)


@operator("MAX_POOL_2D", "AVERAGE_POOL_2D")
def _pool_2d(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    cls = keras.layers.MaxPooling2D if operation.name == "MAX_POOL_2D" else keras.layers.AveragePooling2D
    layer = context.layer(
        cls,
        operation,
        pool_size=(operation.options["filterHeight"], operation.options["filterWidth"]),
        strides=(operation.options["strideH"], operation.options["strideW"]),
        padding=_padding(operation),
    )
    return _finish(context, operation, layer(inputs[0]))


@operator("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _reshape(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    shape = operation.outputs[0].shape
    before, after = inputs[0].shape[1:], shape[1:]
    if not shape or any(size is None for size in before) or int(np.prod(before)) != int(np.prod(after)):
        raise UnsupportedModelError(
            f"{operation.name} `{operation.outputs[0].name}` moves values across the batch axis "
            f"({tuple(inputs[0].shape)} to {shape})"
        )
    if len(after) == 1:  # says what it does whatever the width, so that a narrower twin fits together
        return context.layer(keras.layers.Flatten, operation)(inputs[0])
    return context.layer(keras.layers.Reshape, operation, target_shape=tuple(after))(inputs[0])


@operator("TRANSPOSE")
def _transpose(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    order = [int(axis) for axis in constant(operation, 1)]
    if order[0] != 0:
        raise UnsupportedModelError(f"TRANSPOSE `{operation.outputs[0].name}` moves the batch axis ({order})")
    return context.layer(keras.layers.Permute, operation, dims=tuple(order[1:]))(inputs[0])


_MERGES: dict[str, type] = {
    "ADD": keras.layers.Add,
    "SUB": keras.layers.Subtract,
    "MUL": keras.layers.Multiply,
    "MAXIMUM": keras.layers.Maximum,
    "MINIMUM": keras.layers.Minimum,
}


@operator("ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM", "DIV", "POW", "SQUARED_DIFFERENCE")
def _binary(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    fixed = [position for position in (0, 1) if inputs[position] is None]
    kind = operation.name.lower()
    if fixed:
        tensor = _weight(operation, fixed[0])
        layer = context.layer(ConstantOperand, operation, kind=kind, shape=tensor.shape, constant_first=fixed[0] == 0)
        context.weights(layer, value=(tensor, "plain"))
        return _finish(context, operation, layer(inputs[1 - fixed[0]]))
    if operation.name in _MERGES and _same_rank(inputs):
        layer = context.layer(_MERGES[operation.name], operation)
        return _finish(context, operation, layer([inputs[0], inputs[1]]))
    functions = {
        "ADD": keras.ops.add, "SUB": keras.ops.subtract, "MUL": keras.ops.multiply, "DIV": keras.ops.divide,
        "POW": keras.ops.power, "MAXIMUM": keras.ops.maximum, "MINIMUM": keras.ops.minimum,
        "SQUARED_DIFFERENCE": lambda a, b: keras.ops.square(keras.ops.subtract(a, b)),
    }  # fmt: skip
    return _finish(context, operation, functions[operation.name](inputs[0], inputs[1]))


def _same_rank(inputs: Sequence[Any]) -> bool:
    return len({len(value.shape) for value in inputs}) == 1


@operator("CONCATENATION")
def _concatenation(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    axis = int(operation.options["axis"])
    rank = len(operation.outputs[0].shape)
    if axis % rank == 0 or any(value is None for value in inputs):
        raise UnsupportedModelError(
            f"CONCATENATION `{operation.outputs[0].name}` joins along the batch axis or with a constant"
        )
    return _finish(context, operation, context.layer(keras.layers.Concatenate, operation, axis=axis)(inputs))


@operator("PAD", "PADV2")
def _pad(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    paddings = np.asarray(constant(operation, 1)).tolist()
    fill = float(constant(operation, 2).reshape(())) if operation.name == "PADV2" else 0.0
    return context.layer(Pad, operation, paddings=paddings, fill=fill)(inputs[0])


@operator("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN")
def _reduce(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    rank = len(inputs[0].shape)
    axes = sorted(int(axis) % rank for axis in np.atleast_1d(constant(operation, 1)))
    keep = bool(operation.options.get("keepDims"))
    if operation.name in ("MEAN", "REDUCE_MAX") and rank == 4 and axes == [1, 2]:
        cls = keras.layers.GlobalAveragePooling2D if operation.name == "MEAN" else keras.layers.GlobalMaxPooling2D
        return context.layer(cls, operation, keepdims=keep)(inputs[0])
    function = {
        "MEAN": keras.ops.mean, "SUM": keras.ops.sum, "REDUCE_MAX": keras.ops.max, "REDUCE_MIN": keras.ops.min,
    }[operation.name]  # fmt: skip
    return function(inputs[0], axis=tuple(axes), keepdims=keep)


@operator("SOFTMAX")
def _softmax(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    value, beta = inputs[0], operation.options.get("beta", 1.0)
    if beta != 1.0:
        value = keras.ops.multiply(value, beta)
    return context.layer(keras.layers.Activation, operation, activation="softmax")(value)


_UNARY: dict[str, str] = {
    "RELU": "relu", "RELU6": "relu6", "LOGISTIC": "sigmoid", "TANH": "tanh", "ELU": "elu",
    "LOG_SOFTMAX": "log_softmax", "HARD_SWISH": "hard_swish",
}  # fmt: skip


@operator(*_UNARY)
def _activation(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    return context.layer(keras.layers.Activation, operation, activation=_UNARY[operation.name])(inputs[0])


@operator("GELU")
def _gelu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    return keras.ops.gelu(inputs[0], approximate=bool(operation.options.get("approximate")))


@operator("LEAKY_RELU")
def _leaky_relu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    slope = float(operation.options["alpha"])
    return context.layer(keras.layers.LeakyReLU, operation, negative_slope=slope)(inputs[0])


@operator("PRELU")
def _prelu(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    slope = _weight(operation, 1)
    layer = context.layer(ConstantOperand, operation, kind="prelu", shape=slope.shape)
    context.weights(layer, value=(slope, "plain"))
    return layer(inputs[0])


_ELEMENTWISE = {
    "ABS": keras.ops.abs, "EXP": keras.ops.exp, "LOG": keras.ops.log, "SQRT": keras.ops.sqrt, "RSQRT": keras.ops.rsqrt,
    "NEG": keras.ops.negative, "SQUARE": keras.ops.square, "SIN": keras.ops.sin, "COS": keras.ops.cos,
    "FLOOR": keras.ops.floor, "CEIL": keras.ops.ceil, "SIGN": keras.ops.sign,
}  # fmt: skip


@operator(*_ELEMENTWISE)
def _elementwise(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    return _ELEMENTWISE[operation.name](inputs[0])


@operator("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
def _resize(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    size = [int(v) for v in constant(operation, 1)]
    if operation.options.get("alignCorners") or not operation.options.get("halfPixelCenters"):
        before = [int(v) for v in inputs[0].shape[1:3]]
        whole = all(new % old == 0 for new, old in zip(size, before, strict=True))
        if operation.name == "RESIZE_BILINEAR" or not whole:
            raise UnsupportedModelError(
                f"{operation.name} `{operation.outputs[0].name}` does not sample at half-pixel centres, "
                "which has no entry yet"
            )
    method = "bilinear" if operation.name == "RESIZE_BILINEAR" else "nearest"
    return context.layer(keras.layers.Resizing, operation, height=size[0], width=size[1], interpolation=method)(
        inputs[0]
    )


@operator("GATHER")
def _gather(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    if inputs[0] is not None or operation.options.get("axis", 0) != 0:
        raise UnsupportedModelError(
            f"GATHER `{operation.outputs[0].name}` reads from an activation; "
            "only look-up in a constant table has an entry"
        )
    table = _weight(operation, 0)
    layer = context.layer(Gather, operation, rows=table.shape[0], width=tuple(table.shape[1:]))
    context.weights(layer, embeddings=(table, "plain"))
    return layer(inputs[1])


@operator("SPLIT", "SPLIT_V")
def _split(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    del context
    first = operation.name == "SPLIT"
    value = inputs[1] if first else inputs[0]
    axis = int(constant(operation, 0 if first else 2).reshape(()))
    sizes = [tensor.shape[axis] for tensor in operation.outputs]
    return list(keras.ops.split(value, np.cumsum(sizes)[:-1].tolist(), axis=axis))


@operator("STRIDED_SLICE")
def _strided_slice(context: Context, operation: Operation, inputs: list[Any]) -> Any:
    options = operation.options
    begin, end, step = (constant(operation, position).tolist() for position in (1, 2, 3))
    if options.get("ellipsisMask") or options.get("newAxisMask"):
        raise UnsupportedModelError(
            f"STRIDED_SLICE `{operation.outputs[0].name}` has an ellipsis or a new axis, which has no entry yet"
        )
    parts: list[Any] = []
    for axis in range(len(begin)):
        if options.get("shrinkAxisMask", 0) >> axis & 1:
            parts.append([int(begin[axis]), None, None])
            continue
        low = None if options.get("beginMask", 0) >> axis & 1 else int(begin[axis])
        high = None if options.get("endMask", 0) >> axis & 1 else int(end[axis])
        parts.append([low, high, int(step[axis])])
    if parts and parts[0][:2] not in ([None, None], [0, None], [0, 1]):
        raise UnsupportedModelError(f"STRIDED_SLICE `{operation.outputs[0].name}` cuts the batch axis")
    shrink = [axis for axis in range(len(begin)) if options.get("shrinkAxisMask", 0) >> axis & 1]
    return context.layer(Slice, operation, parts=parts[1:], shrink=shrink)(inputs[0])
