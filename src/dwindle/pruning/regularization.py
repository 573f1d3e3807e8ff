"""L1-regularized training: weights that do not matter go towards zero, or become zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from dwindle.weights import Transform


class L1Penalty(Transform):
    """Add ``strength * sum(|w|)`` to the training loss; the weight itself is not changed.

    Args:
        strength: Factor of the penalty, above 0; 1e-5 to 1e-3 is usual for a mean loss per sample.
    """

    kind: ClassVar[str] = "l1"
    order: ClassVar[int] = 15

    def __init__(self, *, strength: float) -> None:
        self.strength = strength

    def penalty(self, weight: Any, state: Mapping[str, Any]) -> Any:
        """Return the penalty as a scalar."""
        del state
        return self.strength * keras.ops.sum(keras.ops.abs(weight))

    def get_config(self) -> dict[str, Any]:
        """Return the strength."""
        return {"strength": self.strength}


class ProximalL1(Transform):
    """Take each weight ``strength`` nearer to zero after every step of the optimizer, and not beyond it.

    ``w <- sign(w) max(|w| - strength, 0)``: the proximal step of ``strength / learning rate * sum(|w|)``, which makes
    weights exactly zero. It is the raw variable's constraint, so that every Keras optimizer takes it, in ``fit`` and
    in loops of one's own.

    Args:
        strength: What a step takes off, above 0: the learning rate times the factor of the penalty; 1e-6 to 1e-4 is
            usual.

    References:
        Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2 (soft thresholding).
    """

    kind: ClassVar[str] = "proximal_l1"
    order: ClassVar[int] = 4

    def __init__(self, *, strength: float) -> None:
        self.strength = strength

    def prepare(self, raw: Any, state: Mapping[str, Any]) -> None:
        """Put the proximal step behind the constraint that the weight may have."""
        del state
        before = raw.constraint

        def shrunk(value: Any) -> Any:
            value = keras.ops.convert_to_tensor(value) if before is None else before(value)
            return soft_threshold(value, self.strength)

        raw.constraint = shrunk

    def get_config(self) -> dict[str, Any]:
        """Return the strength."""
        return {"strength": self.strength}


def soft_threshold(value: Any, strength: float) -> Any:
    """Return ``sign(value) max(|value| - strength, 0)``."""
    ops = keras.ops
    return ops.sign(value) * ops.maximum(ops.abs(value) - strength, 0)
