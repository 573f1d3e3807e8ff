"""Where a quantized file rounds, told in its float file's terms."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A quantized tensor: ``(q - zero_point) * scale``."""

    scale: float
    zero_point: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class WeightGrid:
    """A quantized weight.

    Attributes:
        bits: Its width.
        per_channel: Whether each output channel has its own scale.
        block: Inputs that share a scale; 0 where the whole channel does.
        power_of_two: Whether scales are powers of two.
        asymmetric: Whether it has a zero point, as an activation has: an operand of arithmetic.
        bound: Largest magnitude of the grid, one per channel or one, where it is not the weight's own.
    """

    bits: int
    per_channel: bool
    block: int = 0
    power_of_two: bool = False
    asymmetric: bool = False
    bound: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Where the quantized file rounds, told in the float file's terms.

    Attributes:
        inputs: Model input number to the grids that it goes through.
        outputs: ``(operator, output)`` number to the grid of what is produced there.
        edges: ``(operator, input)`` number to the grids between the producer and this consumer.
        weights: Float tensor name to the grid of a quantized weight.
        operands: ``(operator, input)`` number to the grid of what the operator reads there.
        final: Model output number to the grids between its producer and the output.
        dynamic: Numbers of the operators that round their float input themselves, as they run.
    """

    inputs: dict[int, Grid] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Grid] = field(default_factory=dict)
    edges: dict[tuple[int, int], tuple[Grid, ...]] = field(default_factory=dict)
    weights: dict[str, WeightGrid] = field(default_factory=dict)
    operands: dict[tuple[int, int], Grid] = field(default_factory=dict)
    final: dict[int, tuple[Grid, ...]] = field(default_factory=dict)
    dynamic: set[int] = field(default_factory=set)
