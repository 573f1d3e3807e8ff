"""Fake quantization: values stay float, but only those that the quantized file can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from dwindle.weights import Transform, quotient

# A quantized bias is kept within half of what an accumulator of 32 bits holds.
LARGEST_BIAS = 2.0**30


def quantized_range(bits: int, *, narrow: bool = False) -> tuple[int, int]:
    """Return the smallest and largest integer of a signed width; ``narrow`` leaves out the smallest."""
    return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1


def next_power_of_two(scale: Any) -> Any:
    """Return the smallest power of two that is not below; the gradient is that of a constant factor."""
    ops = keras.ops
    fixed = ops.stop_gradient(scale)
    return ops.exp2(ops.ceil(ops.log2(fixed) - 1e-6)) * (1.0 + (scale - fixed) / fixed)


class FakeQuantizedWeight(Transform):
    """Round a weight to the symmetric grid that the file stores it in.

    ``w' = clip(round(w / s), q_min, q_max) s`` with ``s = max |w| / q_max`` per output channel, per tensor or per
    block of inputs, and the gradient of the identity (straight-through). Where the channel's bias would not fit the
    32-bit accumulator, as in a channel whose weights are all pruned, ``s`` is the smallest scale with which it does.

    Args:
        bits: Width, 2 to 16. At 8 and more the grid is narrow (-127 to 127), as LiteRT's kernels expect.
        channel_axes: Axes of the output channels; empty for one scale for the whole tensor.
        input_scale: Scale of the layer's input where its bias is an integer in the file; None where it is not.
        block: Entries of axis 0 of a ``(inputs, outputs)`` kernel that share a scale; 0 for all of them.
        power_of_two: Whether ``s`` is the next power of two.
        asymmetric: Whether it has a zero point at 8 bits, as an activation has.
        own_bound: Whether the largest magnitude ``q_max s`` is a variable of its own, not ``max |w|``.
        learned: Whether training moves that variable (learned step size, LSQ).
        counted: Scale of the layer's input where the layer computes on integers outside training, as its 8-bit kernel
            does; None where it does not.
        bound: The variable's initial value, of a shape that broadcasts against the weight; not part of the config.

    References:
        Jacob et al. 2018, arXiv 1712.05877; Bengio et al. 2013 (straight-through), arXiv 1308.3432; Esser et al. 2020
        (LSQ), arXiv 1902.08153.
    """

    kind: ClassVar[str] = "fake_quantize"
    order: ClassVar[int] = 30

    def __init__(
        self,
        *,
        bits: int,
        channel_axes: Sequence[int] = (),
        input_scale: float | None = None,
        block: int = 0,
        power_of_two: bool = False,
        asymmetric: bool = False,
        own_bound: bool = False,
        learned: bool = False,
        counted: float | None = None,
        bound: np.ndarray | None = None,
    ) -> None:
        self.bits = bits
        self.counted = counted
        self.channel_axes = tuple(channel_axes)
        self.input_scale = input_scale
        self.block = block
        self.power_of_two = power_of_two
        self.asymmetric = asymmetric
        self.own_bound = own_bound or learned
        self.learned = learned
        self.bound = bound
        self.trained = ("bound",) if learned else ()
        self.leader: Any = None  # the bound of the layer whose weight this one shares

    def state(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the bound, where it is a variable."""
        if not self.own_bound:
            return {}
        kept = tuple(size if axis in self.channel_axes else 1 for axis, size in enumerate(shape))
        if self.bound is None:
            return {"bound": np.ones(kept, np.float32)}
        return {"bound": np.broadcast_to(np.asarray(self.bound, np.float32), kept)}

    def scales(self, weight: Any, layer: Any, state: Mapping[str, Any]) -> Any:
        """Return the scales, of the weight's rank, 1 on every axis that they do not run along."""
        ops = keras.ops
        high = quantized_range(self.bits)[1]
        if self.own_bound:
            largest = ops.abs(ops.convert_to_tensor(state["bound"] if self.leader is None else self.leader))
            if self.learned:
                # The step's gradient sums over all weights that share it; this brings it to a weight's size.
                share = float((np.prod(weight.shape) / max(1, np.prod(largest.shape)) * high) ** -0.5)
                largest = share * largest + ops.stop_gradient((1 - share) * largest)
        else:
            axes = tuple(axis for axis in range(len(weight.shape)) if axis not in self.channel_axes)
            largest = ops.max(ops.abs(ops.cast(weight, "float32")), axis=axes, keepdims=True)
        if self.input_scale is not None:
            bias = ops.abs(ops.cast(layer.effective("bias", order=self.order), "float32"))
            bias = ops.reshape(bias, largest.shape) if self.channel_axes else ops.max(bias)
            largest = ops.maximum(largest, ops.stop_gradient(bias) * (high / self.input_scale / LARGEST_BIAS))
        scale = quotient(ops.maximum(largest, 1e-9), high)
        return next_power_of_two(scale) if self.power_of_two else scale

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the rounded weight."""
        ops = keras.ops
        low, high = quantized_range(self.bits, narrow=self.bits >= 8)
        if self.block:
            return self._in_blocks(weight, low, high)
        if self.asymmetric and self.bits == 8:
            return self._with_zero_point(weight)
        if self.own_bound:
            scale = self.scales(weight, layer, state)
            steps = ops.clip(ops.cast(weight, "float32") / scale, low, high)
            rounded = (steps + ops.stop_gradient(ops.round(steps) - steps)) * scale
            return ops.cast(rounded, weight.dtype)
        raw = ops.stop_gradient(ops.cast(weight, "float32"))
        scale = self.scales(raw, layer, state)
        rounded = ops.clip(ops.round(raw / scale), low, high) * scale
        return weight + ops.cast(rounded - raw, weight.dtype)

    def counts(self, weight: Any, state: Mapping[str, Any], layer: Any) -> tuple[Any, Any] | None:
        """Return the weight in steps of its grid, zero at zero, and the steps; None in blocks."""
        ops = keras.ops
        if self.block:
            return None
        raw = ops.cast(weight, "float32")
        if self.asymmetric and self.bits == 8:
            return self._counts_with_zero_point(raw)
        low, high = quantized_range(self.bits, narrow=self.bits >= 8)
        scale = self.scales(raw, layer, state)
        return ops.clip(ops.round(raw / scale), low, high), scale

    def _counts_with_zero_point(self, raw: Any) -> tuple[Any, Any]:
        ops = keras.ops
        low, high = quantized_range(self.bits)
        smallest, largest = ops.minimum(ops.min(raw), 0.0), ops.maximum(ops.max(raw), 0.0)
        if self.power_of_two:
            scale = next_power_of_two(quotient(ops.maximum(ops.maximum(-smallest, largest), 1e-9), high))
            point = ops.zeros_like(scale)
        else:
            scale = quotient(ops.maximum(largest - smallest, 1e-9), high - low)
            point = ops.round(low - smallest / scale)
        return ops.clip(ops.round(raw / scale) + point, low, high) - point, scale

    def _with_zero_point(self, weight: Any) -> Any:
        raw = keras.ops.stop_gradient(keras.ops.cast(weight, "float32"))
        steps, scale = self._counts_with_zero_point(raw)
        return weight + keras.ops.cast(steps * scale - raw, weight.dtype)

    def _in_blocks(self, weight: Any, low: int, high: int) -> Any:
        ops = keras.ops
        inputs, outputs = weight.shape
        raw = ops.stop_gradient(ops.cast(weight, "float32"))
        blocks = ops.reshape(raw, (inputs // self.block, self.block, outputs))
        scale = quotient(ops.maximum(ops.max(ops.abs(blocks), axis=1, keepdims=True), 1e-9), high)
        # The file stores such scales in 16 bits with a mantissa of 7.
        scale = ops.cast(ops.cast(ops.cast(scale, "bfloat16"), "float16"), "float32")
        rounded = ops.clip(ops.round(blocks / ops.maximum(scale, 1e-9)), low, high) * scale
        return weight + ops.cast(ops.reshape(rounded, weight.shape) - raw, weight.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return width, axes and the input's scale."""
        return {
            "bits": self.bits, "channel_axes": list(self.channel_axes), "input_scale": self.input_scale,
            "block": self.block, "power_of_two": self.power_of_two, "asymmetric": self.asymmetric,
            "own_bound": self.own_bound, "learned": self.learned, "counted": self.counted,
        }  # fmt: skip


class FakeQuantizedBias(Transform):
    """Round a bias to the grid of the accumulator: the input's scale times the kernel's scales, in 32 bits.

    Args:
        input_scale: Scale of the layer's input.
        kernel: Key of the layer's kernel, which carries a `FakeQuantizedWeight`.
    """

    kind: ClassVar[str] = "fake_quantize_bias"
    order: ClassVar[int] = 30

    def __init__(self, *, input_scale: float, kernel: str = "kernel") -> None:
        self.input_scale = input_scale
        self.kernel = kernel

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the rounded bias."""
        del state
        ops = keras.ops
        scales = self._scales(layer)
        raw = ops.stop_gradient(ops.cast(weight, "float32"))
        return weight + ops.cast(ops.round(raw / scales) * scales - raw, weight.dtype)

    def counts(self, weight: Any, state: Mapping[str, Any], layer: Any) -> tuple[Any, Any] | None:
        """Return the bias in steps of the accumulator, and the steps."""
        del state
        scales = self._scales(layer)
        return keras.ops.round(keras.ops.cast(weight, "float32") / scales), scales

    def _scales(self, layer: Any) -> Any:
        ops = keras.ops
        rounder, kernel_state = next(
            (t, s) for t, s in layer.transforms_and_states(self.kernel) if isinstance(t, FakeQuantizedWeight)
        )
        kernel = ops.stop_gradient(layer.effective(self.kernel, order=self.order))
        found = ops.stop_gradient(rounder.scales(kernel, layer, kernel_state))
        return ops.reshape(found, (-1,)) * self.input_scale

    def get_config(self) -> dict[str, Any]:
        """Return the input's scale and the kernel's key."""
        return {"input_scale": self.input_scale, "kernel": self.kernel}


# What kernels do with values between two steps; all take ``(value / scale, zero point)``. Where it is not halves to
# even: the margin takes up float rounding, and is far below the distance between two values that occur.
ROUNDINGS: dict[str, Any] = {
    "even": lambda quanta, point: keras.ops.round(quanta) + point,
    # Means of integers, in average pooling.
    "away": lambda quanta, point: (
        keras.ops.sign(quanta + point) * keras.ops.floor(keras.ops.abs(quanta + point) + 0.5 + 1e-3)
    ),
    # Sums of integers times fixed-point factors, shifted.
    "up": lambda quanta, point: keras.ops.floor(quanta + 0.5 + 1e-5) + point,
    "down": lambda quanta, point: keras.ops.floor(quanta + 1e-5) + point,
}
RANGES = ("fixed", "moving", "learned")


@keras.saving.register_keras_serializable("dwindle")
class FakeQuantize(keras.layers.Layer):
    """Round an activation to the asymmetric grid of a tensor of the file.

    ``x' = (clip(round(x / s) + z, q_min, q_max) - z) s``; the gradient is 1 inside the range and 0 outside.

    Args:
        scale: ``s``, above 0; where the range moves, the one that it begins with.
        zero_point: ``z``, an integer of the width.
        bits: 8 or 16.
        rounding: A key of `ROUNDINGS`: what the operator's kernel does with values between two steps.
        snap: Number of channels of an operator that sums integers, 0 for none: values are first put on the steps of its
            accumulator, which float arithmetic leaves by a hair. The steps, in quanta, are the variable ``step``, which
            `dwindle.lifting.lifted.LiftedModel.sync` sets.
        fixed_point: Whether its kernel then rounds twice: to ``1 / first_step`` of a quantum, then to whole ones.
        mean_of: For means of stored integers: how many each is of, the scale and zero point of these. XNNPACK sums
            integers as they are stored and takes the zero points off afterwards, in float32, which can tip a half.
        input_scale: Scale of the input where it lies on a grid already and is only moved to another. LiteRT's kernel
            does that with the ratio of the scales in steps of 1/256.
        in_training: Whether training rounds too. It does not at the probabilities that a model ends in: one that is
            rounded to 0 has a loss without a gradient, and nothing downstream could learn from the rounding.
        ranges: ``"fixed"``; ``"moving"``, an exponential moving average of each batch's smallest and largest value; or
            ``"learned"``, both ends trained by gradient.
        power_of_two: Whether the scale is held at powers of two with the zero point 0 while the range moves.
        momentum: Share of the old range in a moving one.
        name: The layer's name.

    References:
        Jacob et al. 2018, arXiv 1712.05877 (moving average); Esser et al. 2020, arXiv 1902.08153 (LSQ) and Bhalgat et
        al. 2020, arXiv 2004.09576 (both ends learned).
    """

    def __init__(
        self,
        *,
        scale: float,
        zero_point: int,
        bits: int = 8,
        rounding: str = "even",
        snap: int = 0,
        fixed_point: bool = False,
        mean_of: Sequence[Any] | None = None,
        input_scale: float | None = None,
        in_training: bool = True,
        ranges: str = "fixed",
        power_of_two: bool = False,
        momentum: float = 0.99,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.scale = scale
        self.zero_point = zero_point
        self.bits = bits
        self.rounding = rounding
        self.snap = snap
        self.fixed_point = fixed_point
        self.mean_of = None if mean_of is None else list(mean_of)
        self.input_scale = input_scale
        self.in_training = in_training
        self.ranges = ranges
        self.power_of_two = power_of_two
        self.momentum = momentum

    def build(self, input_shape: Any) -> None:
        """Create the ends of the range, where they move."""
        del input_shape
        if self.snap:
            self.step, self.first_step = (
                self.add_weight(name=name, shape=(self.snap,), initializer=start, trainable=False, dtype="float32")
                for name, start in (("step", "zeros"), ("first_step", "ones"))
            )
        if self.ranges == "fixed":
            return
        low, high = quantized_range(self.bits)
        ends = ((low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale)
        self.low, self.high = (
            self.add_weight(
                name=name, shape=(), initializer=keras.initializers.Constant(end), trainable=self.ranges == "learned",
                dtype="float32",
            )
            for name, end in zip(("low", "high"), ends, strict=True)
        )  # fmt: skip

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest value that the grid holds now."""
        if self.ranges == "fixed":
            low, high = quantized_range(self.bits)
            return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale
        start, end = (float(keras.ops.convert_to_numpy(v)) for v in (self.low, self.high))
        return min(start, 0.0), max(end, 0.0, min(start, 0.0) + 1e-8)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the rounded tensor, of the same shape."""
        if training and not self.in_training:
            return inputs
        values = keras.ops.cast(inputs, "float32")
        found = self._fixed(values, training) if self.ranges == "fixed" else self._moving(values, training)
        return keras.ops.cast(found, inputs.dtype)

    def _fixed(self, values: Any, training: bool | None) -> Any:
        ops = keras.ops
        low, high = quantized_range(self.bits)
        ends = self.range
        if training and keras.backend.backend() == "tensorflow" and self.bits == 8:
            import tensorflow as tf

            # One kernel for value and gradient; it differs at halves only, which do not matter in training.
            return tf.quantization.fake_quant_with_min_max_args(values, ends[0], ends[1])
        inside = ops.clip(values, *ends)
        quanta = values / self.scale
        if self.snap:
            step = ops.convert_to_tensor(self.step)
            quanta = ops.where(step > 0, ops.round(quanta / ops.maximum(step, 1e-12)) * step, quanta)
        if self.fixed_point:
            quanta = ops.floor(quanta * self.first_step + 0.5) / self.first_step
        steps = ROUNDINGS[self.rounding](quanta, self.zero_point)
        ratio = 0.0 if self.input_scale is None else self.input_scale / self.scale
        if self.input_scale is not None and 1 / 256 <= ratio < 128 and self.bits == 8:
            moved = ops.round(values / self.input_scale) * (round(256 * ratio) / 256)
            steps = ops.floor(moved + 0.5) + self.zero_point
        if self.mean_of is not None:
            steps = self._of_mean(values)
        rounded = (ops.clip(steps, low, high) - self.zero_point) * self.scale
        return inside + ops.stop_gradient(rounded - inside)

    def _of_mean(self, values: Any) -> Any:
        """Return the stored integers of means, each step in float32 as the kernel takes it."""
        count, scale, zero_point = self.mean_of or (1, 1.0, 0)
        factor = np.float32(scale) / np.float32(self.scale) * (np.float32(1) / np.float32(count))
        shift = np.float32(self.zero_point) - np.float32(zero_point * count) * factor
        total = keras.ops.round(values * np.float32(count / scale)) + np.float32(zero_point * count)
        return keras.ops.round(total * factor + shift)

    def _moving(self, values: Any, training: bool | None) -> Any:
        ops = keras.ops
        if training and self.ranges == "moving":
            for variable, end in ((self.low, ops.min(values)), (self.high, ops.max(values))):
                old = ops.convert_to_tensor(variable)
                variable.assign(ops.stop_gradient(self.momentum * old + (1 - self.momentum) * end))
        low, high = quantized_range(self.bits)
        start = ops.minimum(ops.convert_to_tensor(self.low), 0.0)
        end = ops.maximum(ops.convert_to_tensor(self.high), 0.0)
        if self.ranges == "learned":
            # The two ends get the gradient of every clipped value; this brings it to the size of a weight's.
            share = float(np.prod([size or 1 for size in values.shape[1:]]) ** -0.5)
            start = share * start + ops.stop_gradient((1 - share) * start)
            end = share * end + ops.stop_gradient((1 - share) * end)
        if self.bits == 16 or self.power_of_two:
            bound = ops.maximum(ops.maximum(-start, end), 1e-8)
            scale = bound / high
            if self.power_of_two:
                scale = next_power_of_two(scale)
            point = ops.zeros_like(scale)
        else:
            scale = ops.maximum(end - start, 1e-8) / (high - low)
            point = ops.stop_gradient(ops.round(low - start / scale))
        steps = ops.clip(values / scale, low - point, high - point)
        return (steps + ops.stop_gradient(ops.round(steps) - steps)) * scale

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the grid."""
        grid = {
            "scale": self.scale, "zero_point": self.zero_point, "bits": self.bits, "rounding": self.rounding,
            "snap": self.snap, "fixed_point": self.fixed_point, "mean_of": self.mean_of,
            "input_scale": self.input_scale, "in_training": self.in_training, "ranges": self.ranges,
            "power_of_two": self.power_of_two, "momentum": self.momentum,
        }  # fmt: skip
        return {**super().get_config(), **grid}


@keras.saving.register_keras_serializable("dwindle")
class DynamicQuantize(keras.layers.Layer):
    """Round an activation to 8 bits as LiteRT does for dynamic schemes: on the range of each sample or row.

    ``s = (max - min) / 255`` over the last ``axes`` axes, zero included, and the zero point that lies nearest;
    symmetric, ``s = max |x| / 127``.

    Args:
        axes: How many of the last axes share a range: 1 for a fully connected operator, 3 for a convolution.
        symmetric: Whether there is no zero point: LiteRT's own kernel rounds so, where XNNPACK has none.
        name: The layer's name.
    """

    def __init__(self, *, axes: int = 1, symmetric: bool = False, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.axes = axes
        self.symmetric = symmetric

    def call(self, inputs: Any) -> Any:
        """Return the rounded tensor, of the same shape; its gradient is that of the identity."""
        ops = keras.ops
        values = ops.stop_gradient(ops.cast(inputs, "float32"))
        axes = tuple(range(len(values.shape) - self.axes, len(values.shape)))
        if self.symmetric:
            largest = ops.max(ops.abs(values), axis=axes, keepdims=True)
            steps = ops.where(largest > 0, 127.0 / ops.maximum(largest, 1e-30), ops.ones_like(largest))
            rounded = ops.clip(ops.round(values * steps), -127.0, 127.0) / steps
            return inputs + ops.cast(rounded - values, inputs.dtype)
        low = ops.minimum(ops.min(values, axis=axes, keepdims=True), 0.0)
        high = ops.maximum(ops.max(values, axis=axes, keepdims=True), 0.0)
        steps = ops.where(high > low, 255.0 / ops.maximum(high - low, 1e-30), ops.ones_like(low))
        from_low, from_high = -128.0 - low * steps, 127.0 - high * steps
        point = ops.where((-128.0 + low * steps) + (127.0 + high * steps) > 0, from_low, from_high)
        point = ops.round(ops.clip(point, -128.0, 127.0))
        rounded = (ops.clip(ops.round(values * steps) + point, -128.0, 127.0) - point) / steps
        return inputs + ops.cast(rounded - values, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the number of axes, and whether there is no zero point."""
        return {**super().get_config(), "axes": self.axes, "symmetric": self.symmetric}
