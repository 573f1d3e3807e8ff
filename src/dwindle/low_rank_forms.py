"""Which two layers can stand in for one: the forms of a low-rank factorization, layer class by layer class.

A form lays a kernel out as a matrix ``M (rows, columns)``. A product ``A B`` of rank ``r`` in its place is two layers:
the first has the kernel ``A``, the second ``B``. In all forms nothing but the kernel changes, so that at full rank the
two layers compute what the one did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwindle.errors import UnsupportedModelError

# What the first of two layers does not have: all that comes after the product.
_BARE: dict[str, Any] = {
    "activation": "linear", "use_bias": False, "bias_regularizer": None, "activity_regularizer": None,
    "bias_constraint": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to write a layer as two.

    Attributes:
        name: What the two layers are.
        matrix: The kernel laid out, float64 ``(rows, columns)``.
        parameters_per_rank: Of both kernels, for each unit of rank.
        macs_per_rank: Multiplications of both for each output position and unit of rank.
        macs: Multiplications of the one layer for each output position.
        split: Turns ``A (rows, r)`` and ``B (r, columns)`` into the two kernels.
        configs: Turns a rank into the changes of the two layers' configs.
        rows_of: Turns inputs of the layer ``(n, ...)`` into those that one row of the matrix meets, ``(..., rows)``;
            None where every column of the matrix is one output, so that the outputs themselves can be compared.
    """

    name: str
    matrix: np.ndarray
    parameters_per_rank: int
    macs_per_rank: float
    macs: float
    split: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    configs: Callable[[int], tuple[dict[str, Any], dict[str, Any]]]
    rows_of: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def full_rank(self) -> int:
        """The largest rank that the matrix can have."""
        return int(min(self.matrix.shape))

    def saves(self, rank: int) -> bool:
        """Whether two layers of this rank have fewer parameters and fewer multiplications than the one."""
        return rank * self.parameters_per_rank < self.matrix.size and rank * self.macs_per_rank < self.macs


def forms_of(class_name: str, config: Mapping[str, Any], kernel: np.ndarray) -> list[Form]:
    """Return the forms that a layer has.

    Args:
        class_name: Name of a stock layer class in `FORMS`.
        config: The layer's config.
        kernel: Its kernel.

    Raises:
        UnsupportedModelError: With the reason, if it has none.
    """
    if class_name not in FORMS:
        raise UnsupportedModelError(f"there is no low-rank form of a {class_name}")
    if config.get("kernel_constraint") is not None:
        raise UnsupportedModelError("its kernel has a constraint, which a product would not keep")
    if config.get("quantization_config") is not None or config.get("lora_rank"):
        raise UnsupportedModelError("Keras' own quantization or LoRA is on it")
    return FORMS[class_name](config, np.asarray(kernel, np.float64))


def _dense(config: Mapping[str, Any], kernel: np.ndarray) -> list[Form]:
    del config
    rows, columns = kernel.shape
    return [
        Form(
            name="two dense layers", matrix=kernel, parameters_per_rank=rows + columns, macs_per_rank=rows + columns,
            macs=kernel.size, split=lambda a, b: (a, b),
            configs=lambda rank: ({**_BARE, "units": rank}, {}),
        )
    ]  # fmt: skip


def _einsum(config: Mapping[str, Any], kernel: np.ndarray) -> list[Form]:
    equation = config["equation"].replace(" ", "")
    left, output = equation.split("->")
    given, weight = left.split(",")
    if any(label in given and label in output for label in weight):
        raise UnsupportedModelError(f"its equation `{equation}` has a kernel axis in both input and output")
    contracted = [label for label in weight if label in given]
    made = [label for label in weight if label in output]
    if not contracted or not made:
        raise UnsupportedModelError(f"its equation `{equation}` is no product of matrices")
    new = next(label for label in "rzyxwvutsqponmlkjihgfedcba" if label not in equation)
    # The rank's axis takes the place of the first contracted one.
    middle = "".join(new if label == contracted[0] else label for label in given if label not in contracted[1:])
    axes = [weight.index(label) for label in (*contracted, *made)]
    sizes = [kernel.shape[axis] for axis in axes]
    rows = int(np.prod(sizes[: len(contracted)]))
    matrix = kernel.transpose(axes).reshape(rows, -1)
    first, second = "".join(contracted) + new, new + "".join(made)

    def configs(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        shape = _middle_shape(middle, new, rank, output, config["output_shape"], given)
        bare = {key: value for key, value in _BARE.items() if key != "use_bias"}
        return (
            {**bare, "bias_axes": None, "equation": f"{given},{first}->{middle}", "output_shape": shape},
            {"equation": f"{middle},{second}->{output}"},
        )

    configs(1)  # refuses what has no such middle
    return [
        Form(
            name="two einsum layers", matrix=matrix, parameters_per_rank=sum(matrix.shape),
            macs_per_rank=sum(matrix.shape), macs=matrix.size, configs=configs,
            split=lambda a, b: (
                a.reshape(*sizes[: len(contracted)], a.shape[1]), b.reshape(b.shape[0], *sizes[len(contracted) :]),
            ),
        )
    ]  # fmt: skip


def _middle_shape(middle: str, new: str, rank: int, output: str, output_shape: Any, given: str) -> list[int | None]:
    """Return the sizes of the axes between the two layers, without the batch axis and those of an ellipsis."""
    shape = [output_shape] if isinstance(output_shape, int) else list(output_shape)
    plain = output.replace("...", "")
    # An ellipsis on the left has the batch axis in it.
    named = plain if output.startswith("...") else plain[1:]
    sizes = dict(zip(named, shape[len(shape) - len(named) :] if output.startswith("...") else shape, strict=False))
    labels = middle.replace("...", "")
    labels = labels if middle.startswith("...") else labels[1:]
    found: list[int | None] = []
    for label in labels:
        if label != new and label not in sizes:
            raise UnsupportedModelError(f"its equation sums over `{label}` of the input `{given}` without a kernel")
        found.append(rank if label == new else sizes[label])
    return found


def _convolution(config: Mapping[str, Any], kernel: np.ndarray) -> list[Form]:
    if int(config.get("groups", 1) or 1) > 1:
        raise UnsupportedModelError("it is a grouped convolution, whose kernels are small already")
    *window, channels, filters = kernel.shape
    ones = [1] * len(window)
    places = int(np.prod(window))
    strides, dilation = _each(config["strides"], len(window)), _each(config["dilation_rate"], len(window))
    kept = {"strides": strides, "dilation_rate": dilation, "padding": config["padding"]}
    single = {"kernel_size": ones, "strides": ones, "dilation_rate": ones, "padding": "valid"}
    forms = [
        Form(
            name=f"{_size(window)}, then {_size(ones)}", matrix=kernel.reshape(-1, filters),
            parameters_per_rank=places * channels + filters, macs_per_rank=places * channels + filters,
            macs=kernel.size,
            split=lambda a, b: (a.reshape(*window, channels, -1), b.reshape(*ones, *b.shape)),
            configs=lambda rank: ({**_BARE, **kept, "filters": rank}, single),
        )
    ]  # fmt: skip
    if places > 1:
        order = [len(window), *range(len(window)), len(window) + 1]
        forms.append(
            Form(
                name=f"{_size(ones)}, then {_size(window)}",
                matrix=kernel.transpose(order).reshape(channels, -1),
                parameters_per_rank=channels + places * filters,
                macs_per_rank=channels * math.prod(strides) + places * filters, macs=kernel.size,
                split=lambda a, b: (
                    a.reshape(*ones, *a.shape),
                    np.moveaxis(b.reshape(b.shape[0], *window, filters), 0, len(window)),
                ),
                configs=lambda rank: ({**_BARE, **single, "filters": rank}, kept),
                rows_of=lambda x: _channels_last(x, config).reshape(-1, channels),
            )
        )  # fmt: skip
    if len(window) == 2 and min(window) > 1:
        forms += [_separated(config, kernel, axis, strides, dilation) for axis in (0, 1)]
    return forms


def _separated(
    config: Mapping[str, Any], kernel: np.ndarray, axis: int, strides: list[int], dilation: list[int]
) -> Form:
    """Return the form of two convolutions that each go along one axis of the window; the first along ``axis``."""
    *window, channels, filters = kernel.shape
    size, other = window[axis], window[1 - axis]

    def along(which: int) -> dict[str, Any]:
        return {
            "kernel_size": [window[which] if i == which else 1 for i in (0, 1)], "padding": config["padding"],
            "strides": [strides[which] if i == which else 1 for i in (0, 1)],
            "dilation_rate": [dilation[which] if i == which else 1 for i in (0, 1)],
        }  # fmt: skip

    def split(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = a.reshape(size, channels, -1)
        second = np.moveaxis(b.reshape(-1, other, filters), 0, 1)
        return np.expand_dims(first, 1 - axis), np.expand_dims(second, axis)

    return Form(
        name=f"{_size(along(axis)['kernel_size'])}, then {_size(along(1 - axis)['kernel_size'])}",
        matrix=kernel.transpose(axis, 2, 1 - axis, 3).reshape(size * channels, -1),
        parameters_per_rank=size * channels + other * filters,
        macs_per_rank=size * channels * strides[1 - axis] + other * filters, macs=kernel.size, split=split,
        configs=lambda rank: ({**_BARE, **along(axis), "filters": rank}, along(1 - axis)),
        rows_of=lambda x: _windows(
            _channels_last(x, config), axis + 1, size, strides[axis], dilation[axis], config["padding"]
        ),
    )  # fmt: skip


def _channels_last(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if config["data_format"] == "channels_first" else x


def _windows(x: np.ndarray, axis: int, size: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """Return the windows along one axis that a convolution meets, as rows of ``size * channels`` values."""
    reach = (size - 1) * dilation + 1
    if padding == "same":
        count = -(-x.shape[axis] // stride)
        total = max((count - 1) * stride + reach - x.shape[axis], 0)
        x = np.pad(x, [(total // 2, total - total // 2) if i == axis else (0, 0) for i in range(x.ndim)])
    count = (x.shape[axis] - reach) // stride + 1
    taken = [np.take(x, np.arange(count) * stride + place * dilation, axis=axis) for place in range(size)]
    return np.concatenate(taken, axis=-1).reshape(-1, size * x.shape[-1])


def _each(value: Any, count: int) -> list[int]:
    return [int(value)] * count if isinstance(value, int) else [int(part) for part in value]


def _size(window: Sequence[int]) -> str:
    return "x".join(str(size) for size in window)


FORMS: dict[str, Callable[[Mapping[str, Any], np.ndarray], list[Form]]] = {
    "Dense": _dense, "EinsumDense": _einsum, "Conv1D": _convolution, "Conv2D": _convolution, "Conv3D": _convolution,
}  # fmt: skip
