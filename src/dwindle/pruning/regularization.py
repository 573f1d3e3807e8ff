"""L1-regularized training: a penalty that drives weights that do not matter towards zero."""

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
