"""Fake quantization: values stay float, but only those that the quantized file can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras

from dwindle.weights import Transform

# A quantized bias is kept within half of what an accumulator of 32 bits holds.
LARGEST_BIAS = 2.0**30


def quantized_range(bits: int, *, narrow: bool = False) -> tuple[int, int]:
    """Return the smallest and largest integer of a signed width; ``narrow`` leaves out the smallest."""
    return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1


class FakeQuantizedWeight(Transform):
    """Round a weight to the symmetric grid that the file stores it in.

    ``w' = clip(round(w / s), q_min, q_max) s`` with ``s = max |w| / q_max`` per output channel, and the gradient
    of the identity (straight-through). Where the channel's bias would not fit the 32-bit accumulator, as in a
    channel whose weights are all pruned, ``s`` is the smallest scale with which it does.

    Args:
        bits: Width, 2 to 16. At 8 and more the grid is narrow (-127 to 127), as LiteRT's kernels expect.
        channel_axes: Axes of the output channels; empty for one scale for the whole tensor.
        input_scale: Scale of the layer's input where its bias is an integer in the file; None where it is not.

    References:
        Jacob et al. 2018, arXiv 1712.05877; Bengio et al. 2013 (straight-through), arXiv 1308.3432.
    """

    kind: ClassVar[str] = "fake_quantize"
    order: ClassVar[int] = 30

    def __init__(self, *, bits: int, channel_axes: Sequence[int] = (), input_scale: float | None = None) -> None:
        self.bits = bits
        self.channel_axes = tuple(channel_axes)
        self.input_scale = input_scale

    def scales(self, weight: Any, layer: Any) -> Any:
        """Return the scales, of the weight's rank, 1 on every axis that they do not run along."""
        ops = keras.ops
        axes = tuple(axis for axis in range(len(weight.shape)) if axis not in self.channel_axes)
        largest = ops.max(ops.abs(ops.cast(weight, "float32")), axis=axes, keepdims=True)
        high = quantized_range(self.bits)[1]
        if self.input_scale is not None:
            bias = ops.abs(ops.cast(layer.effective("bias", order=self.order), "float32"))
            bias = ops.reshape(bias, largest.shape) if self.channel_axes else ops.max(bias)
            largest = ops.maximum(largest, ops.stop_gradient(bias) * (high / self.input_scale / LARGEST_BIAS))
        return ops.maximum(largest, 1e-9) / high

    def apply(self, weight: Any, state: Mapping[str, Any], layer: Any) -> Any:
        """Return the rounded weight."""
        del state
        ops = keras.ops
        low, high = quantized_range(self.bits, narrow=self.bits >= 8)
        raw = ops.stop_gradient(ops.cast(weight, "float32"))
        scale = self.scales(raw, layer)
        rounded = ops.clip(ops.round(raw / scale), low, high) * scale
        return weight + ops.cast(rounded - raw, weight.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return width, axes and the input's scale."""
        return {"bits": self.bits, "channel_axes": list(self.channel_axes), "input_scale": self.input_scale}


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
        rounder = next(t for t in layer.transforms(self.kernel) if isinstance(t, FakeQuantizedWeight))
        kernel = ops.stop_gradient(layer.effective(self.kernel, order=self.order))
        scales = ops.reshape(rounder.scales(kernel, layer), (-1,)) * self.input_scale
        raw = ops.stop_gradient(ops.cast(weight, "float32"))
        return weight + ops.cast(ops.round(raw / scales) * scales - raw, weight.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the input's scale and the kernel's key."""
        return {"input_scale": self.input_scale, "kernel": self.kernel}


@keras.saving.register_keras_serializable("dwindle")
class FakeQuantize(keras.layers.Layer):
    """Round an activation to the asymmetric grid of a tensor of the file.

    ``x' = (clip(round(x / s) + z, q_min, q_max) - z) s``; the gradient is 1 inside the range and 0 outside.

    Args:
        scale: ``s``, above 0.
        zero_point: ``z``, an integer of the width.
        bits: 8 or 16.
        half_away: Whether halves are rounded away from zero, as LiteRT's average pooling does, not to even.
        input_scale: Scale of the input where it lies on a grid already and is only moved to another. LiteRT's kernel
            does that with the ratio of the scales in steps of 1/256.
        in_training: Whether training rounds too. It does not at the probabilities that a model ends in: one that is
            rounded to 0 has a loss without a gradient, and nothing downstream could learn from the rounding.
        name: The layer's name.
    """

    def __init__(
        self,
        *,
        scale: float,
        zero_point: int,
        bits: int = 8,
        half_away: bool = False,
        input_scale: float | None = None,
        in_training: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.scale = scale
        self.zero_point = zero_point
        self.bits = bits
        self.half_away = half_away
        self.input_scale = input_scale
        self.in_training = in_training

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the rounded tensor, of the same shape."""
        if training and not self.in_training:
            return inputs
        ops = keras.ops
        low, high = quantized_range(self.bits)
        values = ops.cast(inputs, "float32")
        inside = ops.clip(values, (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale)
        steps = ops.round(values / self.scale) + self.zero_point
        if self.half_away:
            # Means of integers: the margin takes up float rounding, and is far below the distance between two means.
            means = values / self.scale + self.zero_point
            steps = ops.sign(means) * ops.floor(ops.abs(means) + 0.5 + 1e-3)
        ratio = 0.0 if self.input_scale is None else self.input_scale / self.scale
        if self.input_scale is not None and 1 / 256 <= ratio < 128:
            moved = ops.round(values / self.input_scale) * (round(256 * ratio) / 256)
            steps = ops.floor(moved + 0.5) + self.zero_point
        rounded = (ops.clip(steps, low, high) - self.zero_point) * self.scale
        return ops.cast(inside + ops.stop_gradient(rounded - inside), inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the grid."""
        grid = {
            "scale": self.scale, "zero_point": self.zero_point, "bits": self.bits, "half_away": self.half_away,
            "input_scale": self.input_scale, "in_training": self.in_training,
        }  # fmt: skip
        return {**super().get_config(), **grid}
