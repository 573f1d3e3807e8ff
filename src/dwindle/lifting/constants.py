"""Layers that lifting needs and Keras does not have: arithmetic with constants and on integers, cuts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.weights import WeightSpec, quotient


@keras.saving.register_keras_serializable("dwindle")
class ConstantOperand(keras.layers.Layer):
    """Combine the input with a constant: ``x + c``, ``x - c``, ``x * c``, ``x / c`` and so on.

    It is trainable unless it is a single number without axes: that is a part of a formula, such as the epsilon below a
    root, which a step of training would make negative.

    Args:
        kind: ``add``, ``sub``, ``mul``, ``div``, ``pow``, ``maximum``, ``minimum``, ``squared_difference``, ``prelu``.
        shape: Shape of the constant; it broadcasts against the input.
        constant_first: Whether the constant is the left operand.
        scales: Scales of the input and of the result where a sum is computed on 8-bit integers outside training, as
            long as the constant lies on a grid of its own; see `integer_sum`.
    """

    weight_specs: ClassVar[tuple[WeightSpec, ...]] = (WeightSpec(weight="value", channel_axes=(-1,), prunable=False),)

    def __init__(
        self, *, kind: str, shape: Sequence[int], constant_first: bool = False, scales: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.kind = kind
        self.shape = tuple(shape)
        self.constant_first = constant_first
        self.scales = None if scales is None else tuple(scales)

    def build(self, input_shape: Any) -> None:
        """Create the constant."""
        del input_shape
        learned = self.kind == "prelu" or bool(self.shape)
        self.value = self.add_weight(name="value", shape=self.shape, initializer="zeros", trainable=learned)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the combination, broadcast to the larger shape."""
        ops = keras.ops
        if self.scales is not None and not training and hasattr(self, "counts_of"):
            found = self.counts_of("value")
            if found is not None:
                signs = (1, 1) if self.kind == "add" else (-1, 1) if self.constant_first else (1, -1)
                steps = ops.round(inputs / self.scales[0])
                return integer_sum((steps, found[0]), (self.scales[0], found[1]), self.scales[1], signs=signs)
        value = ops.convert_to_tensor(self.value)
        if self.kind == "add":
            # `ops.add` would take a constant such as (4, 1) for a bias of the last axis if that has 4 entries.
            return inputs + value
        if self.kind == "prelu":
            return ops.maximum(inputs, 0.0) + value * ops.minimum(inputs, 0.0)
        a, b = (value, inputs) if self.constant_first else (inputs, value)
        functions = {
            "sub": ops.subtract, "mul": ops.multiply, "div": ops.divide, "pow": ops.power, "maximum": ops.maximum,
            "minimum": ops.minimum,
        }  # fmt: skip
        if self.kind == "squared_difference":
            return ops.square(a - b)
        return functions[self.kind](a, b)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        own = {"kind": self.kind, "shape": list(self.shape), "constant_first": self.constant_first,
               "scales": None if self.scales is None else list(self.scales)}  # fmt: skip
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("dwindle")
class Pad(keras.layers.Layer):
    """Pad every axis but the batch.

    Args:
        paddings: ``[[before, after], ...]``, one pair an axis, the batch axis first (and zero).
        fill: The value, in mode ``constant``.
        mode: ``constant``, ``reflect`` or ``symmetric``.
    """

    def __init__(
        self, *, paddings: Sequence[Sequence[int]], fill: float = 0.0, mode: str = "constant", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.paddings = [list(pair) for pair in paddings]
        self.fill = fill
        self.mode = mode

    def call(self, inputs: Any) -> Any:
        """Return the padded tensor."""
        if self.mode != "constant":
            return keras.ops.pad(inputs, self.paddings, mode=self.mode)
        if keras.backend.backend() == "tensorflow" and self.fill == 0 and any(self.paddings[-1]):
            return _padded_channels(inputs, self.paddings)
        return keras.ops.pad(inputs, self.paddings, constant_values=self.fill)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        return {**super().get_config(), "paddings": self.paddings, "fill": self.fill, "mode": self.mode}


def _padded_channels(inputs: Any, paddings: Sequence[Sequence[int]]) -> Any:
    """Return the tensor padded with zeros by the operator that is told what to pad with.

    TensorFlow 2.21 crashes where its graph optimizer makes one operator of a convolution and the sum of its result and
    of a ``Pad``, as in residual blocks that add channels; of ``PadV2`` it makes none.
    """
    import tensorflow as tf

    return tf.raw_ops.PadV2(input=inputs, paddings=paddings, constant_values=tf.zeros((), inputs.dtype))


@keras.saving.register_keras_serializable("dwindle")
class Slice(keras.layers.Layer):
    """Cut every axis but the batch with ``[begin, end, step]``, then drop axes.

    Args:
        parts: One triple an axis after the batch, None for an open end.
        shrink: Axes (batch counted) of which only the first kept entry stays, without the axis.
    """

    def __init__(self, *, parts: Sequence[Sequence[Any]], shrink: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = [list(part) for part in parts]
        self.shrink = list(shrink)

    def call(self, inputs: Any) -> Any:
        """Return the cut tensor."""
        index: list[Any] = [slice(None)]
        for axis, (begin, end, step) in enumerate(self.parts, start=1):
            index.append(begin if axis in self.shrink else slice(begin, end, step))
        return inputs[tuple(index)]

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        return {**super().get_config(), "parts": self.parts, "shrink": self.shrink}


@keras.saving.register_keras_serializable("dwindle")
class Gather(keras.layers.Layer):
    """Look rows up in a trainable table, as `keras.layers.Embedding` does, for rows of any shape.

    Args:
        rows: Number of rows.
        width: Shape of one row.
    """

    weight_specs: ClassVar[tuple[WeightSpec, ...]] = (
        WeightSpec(weight="embeddings", channel_axes=(0,), prunable=False),
    )

    def __init__(self, *, rows: int, width: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows = rows
        self.width = tuple(width)

    def build(self, input_shape: Any) -> None:
        """Create the table."""
        del input_shape
        self.embeddings = self.add_weight(name="embeddings", shape=(self.rows, *self.width), initializer="uniform")

    def call(self, inputs: Any) -> Any:
        """Return the rows, of shape ``(*inputs.shape, *width)``."""
        return keras.ops.take(self.embeddings, keras.ops.cast(inputs, "int32"), axis=0)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        return {**super().get_config(), "rows": self.rows, "width": list(self.width)}


@keras.saving.register_keras_serializable("dwindle")
class Repeated(keras.layers.Layer):
    """A trainable constant, once for every sample of the input, such as the class token of a vision transformer.

    Args:
        shape: Shape of the constant, without the samples.
        samples: False for the constant as it is, whatever the input.
    """

    weight_specs: ClassVar[tuple[WeightSpec, ...]] = (WeightSpec(weight="value", channel_axes=(-1,), prunable=False),)

    def __init__(self, *, shape: Sequence[int], samples: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(shape)
        self.samples = samples

    def build(self, input_shape: Any) -> None:
        """Create the constant."""
        del input_shape
        trainable = "float" in keras.backend.standardize_dtype(self.dtype)
        self.value = self.add_weight(name="value", shape=self.shape, initializer="zeros", trainable=trainable)

    def call(self, inputs: Any) -> Any:
        """Return the constant, of shape ``(samples, *shape)``."""
        value = keras.ops.convert_to_tensor(self.value)
        if not self.samples:
            return value
        return keras.ops.broadcast_to(value[None], (keras.ops.shape(inputs)[0], *self.shape))

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the result's shape and type."""
        front = (inputs.shape[0],) if self.samples else ()
        return keras.KerasTensor((*front, *self.shape), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        return {**super().get_config(), "shape": list(self.shape), "samples": self.samples}


@keras.saving.register_keras_serializable("dwindle")
class FixedOperand(keras.layers.Layer):
    """Combine an integer input with a constant that is not trained.

    Args:
        kind: As in `ConstantOperand`.
        value: The constant, nested lists.
        dtype_name: Its type.
        constant_first: Whether the constant is the left operand.
    """

    def __init__(
        self, *, kind: str, value: Any, dtype_name: str, constant_first: bool = False, **kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.kind = kind
        self.value = value
        self.dtype_name = dtype_name
        self.constant_first = constant_first
        self.autocast = False

    def call(self, inputs: Any) -> Any:
        """Return the combination."""
        ops = keras.ops
        value = ops.convert_to_tensor(self.value, dtype=self.dtype_name)
        a, b = (value, inputs) if self.constant_first else (inputs, value)
        functions = {
            "add": operator.add, "sub": ops.subtract, "mul": ops.multiply, "div": ops.floor_divide,
            "maximum": ops.maximum, "minimum": ops.minimum, "pow": ops.power,
        }  # fmt: skip
        if self.kind == "squared_difference":
            return ops.square(ops.subtract(a, b))
        return ops.cast(functions[self.kind](a, b), self.dtype_name)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        own = {"kind": self.kind, "value": self.value, "dtype_name": self.dtype_name,
               "constant_first": self.constant_first}  # fmt: skip
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("dwindle")
class MatMul(keras.layers.Layer):
    """Multiply matrices in the last two axes, of two tensors or of a tensor and a trainable constant.

    Args:
        transpose_a: Whether the left operand's last two axes are swapped first.
        transpose_b: The same for the right one.
        constant: Shape of the constant; None for two tensors.
        constant_first: Whether the constant is the left operand.
        scales: Scale of the left operand, of the right one and of the product where an 8-bit kernel multiplies two
            tensors; outside training the product is then computed on integers, see `integer_product`.
    """

    weight_specs: ClassVar[tuple[WeightSpec, ...]] = (WeightSpec(weight="kernel", channel_axes=(-1,)),)

    def __init__(
        self, *, transpose_a: bool = False, transpose_b: bool = False, constant: Sequence[int] | None = None,
        constant_first: bool = False, scales: Sequence[float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.transpose_a = transpose_a
        self.transpose_b = transpose_b
        self.constant = None if constant is None else tuple(constant)
        self.constant_first = constant_first
        self.scales = None if scales is None else tuple(scales)

    def build(self, input_shape: Any) -> None:
        """Create the constant."""
        del input_shape
        if self.constant is not None:
            self.kernel = self.add_weight(name="kernel", shape=self.constant, initializer="zeros")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the product; on the grid of the result outside training, but not clipped, where it has scales."""
        if self.scales is not None and not training:
            steps = [keras.ops.round(value / scale) for value, scale in zip(inputs, self.scales[:2], strict=True)]
            return integer_product(self._product(steps), self.scales)
        return self._product(inputs)

    def _product(self, inputs: Any) -> Any:
        if self.constant is not None:
            kernel = keras.ops.convert_to_tensor(self.kernel)
            a, b = (kernel, inputs) if self.constant_first else (inputs, kernel)
        else:
            a, b = inputs
        a = keras.ops.swapaxes(a, -1, -2) if self.transpose_a else a
        b = keras.ops.swapaxes(b, -1, -2) if self.transpose_b else b
        return keras.ops.matmul(a, b)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        own = {"transpose_a": self.transpose_a, "transpose_b": self.transpose_b,
               "constant": None if self.constant is None else list(self.constant),
               "constant_first": self.constant_first,
               "scales": None if self.scales is None else list(self.scales)}  # fmt: skip
        return {**super().get_config(), **own}


def integer_product(total: Any, scales: Sequence[float]) -> Any:
    """Scale a sum of products as LiteRT's own 8-bit kernel does: times 31 bits, rounded, shifted, rounded again.

    The first rounding takes halves up, the second away from zero. Parts of the product are summed, so that 64-bit
    floats hold each exactly.

    Args:
        total: Sums of products of whole steps, below ``2^24``.
        scales: Scale of the left operand, of the right one and of the result.

    Returns:
        The result on its grid, not clipped, as float32.
    """
    ops = keras.ops
    mantissa, exponent = np.frexp(float(np.float32(scales[0]) * np.float32(scales[1])) / float(np.float32(scales[2])))
    high, low = divmod(round(mantissa * 2.0**31), 2**16)
    total = ops.cast(total, "float64") * 2.0 ** max(int(exponent), 0)
    first = ops.floor((total * high + ops.floor((total * low + 2.0**30) / 2.0**16)) / 2.0**15)
    found = ops.sign(first) * ops.floor(ops.abs(first) * 2.0 ** min(int(exponent), 0) + 0.5)
    return ops.cast(found, "float32") * float(np.float32(scales[2]))


def integer_sum(steps: Sequence[Any], scales: Sequence[Any], result: float, *, signs: Sequence[int]) -> Any:
    """Add as an 8-bit kernel does: ``(a m_a + b m_b + 2^(k-1)) >> k`` with ``m = round(2^k s / s_out)``.

    ``k`` gives the larger factor 21 bits.

    Args:
        steps: Both operands in whole steps of their grids, zero at zero.
        scales: Their steps.
        result: Step of the result.
        signs: 1 or -1 for each operand.

    Returns:
        The sum on the result's grid, not clipped, as float32.
    """
    ops = keras.ops
    ratios = [quotient(ops.convert_to_tensor(scale, "float32"), float(np.float32(result))) for scale in scales]
    exponent = ops.floor(ops.log2(ops.maximum(ratios[0], ratios[1])))
    unit = ops.power(ops.convert_to_tensor(2.0, "float32"), 20.0 - exponent)
    total = ops.cast(unit / 2, "int32")
    for value, ratio, sign in zip(steps, ratios, signs, strict=True):
        total = total + ops.cast(value, "int32") * (sign * ops.cast(ops.round(ratio * unit), "int32"))
    return ops.cast(ops.floor_divide(total, ops.cast(unit, "int32")), "float32") * float(result)


@keras.saving.register_keras_serializable("dwindle")
class Sum(keras.layers.Layer):
    """Add or subtract two tensors on 8-bit grids, outside training on integers; see `integer_sum`.

    Args:
        scales: Scale of the first operand, of the second, and of the result.
        subtract: Whether the second is subtracted.
    """

    def __init__(self, *, scales: Sequence[float], subtract: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scales = tuple(scales)
        self.subtract = subtract

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the sum, broadcast; outside training it lies on the result's grid already, but is not clipped."""
        signs = (1, -1 if self.subtract else 1)
        if training:
            return inputs[0] + signs[1] * inputs[1]
        steps = [keras.ops.round(value / scale) for value, scale in zip(inputs, self.scales[:2], strict=True)]
        return integer_sum(steps, self.scales[:2], self.scales[2], signs=signs)

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer."""
        return {**super().get_config(), "scales": list(self.scales), "subtract": self.subtract}
