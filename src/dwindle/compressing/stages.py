"""Models between the steps of plans, so that plans that begin alike share what they have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from dwindle.errors import DwindleError
from dwindle.files import save_keras

Steps = Sequence[tuple[str, Mapping[str, Any]]]


def key_of(steps: Steps) -> str:
    """Return a name for the first steps of a plan: 16 hexadecimal digits of a hash."""
    told = json.dumps([[step, dict(options)] for step, options in steps], sort_keys=True)
    return hashlib.sha256(told.encode("utf8")).hexdigest()[:16]


class Stages:
    """A folder of trained models, each by the steps that made it from the original.

    What is there belongs to one model, its data and one seed. A plan that goes on from a stage ends in the same weights
    as one that begins at the original, since every step has a seed of its own.

    Args:
        folder: Where they are.
        most: How many are kept; the one that was not used for the longest time goes first.
    """

    def __init__(self, folder: Path, most: int = 24) -> None:
        self._folder = folder
        self._most = most

    def nearest(self, steps: Steps) -> tuple[int, keras.Model | None]:
        """Return how many of the first steps are done already, and the model that they made."""
        from dwindle.loading import load

        for count in range(len(steps), 0, -1):
            path = self._path(steps[:count])
            if not path.exists():
                continue
            try:
                model = load(path)
            except DwindleError:  # a layer of the user's that can't be read back, or a file that was cut off
                continue
            path.touch()
            return count, model
        return 0, None

    def keep(self, steps: Steps, model: keras.Model) -> None:
        """Keep what some steps have made."""
        save_keras(model, self._path(steps))
        kept = sorted(self._folder.glob("[0-9a-f]*.keras"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[: -self._most]:
            path.unlink(missing_ok=True)

    def _path(self, steps: Steps) -> Path:
        return self._folder / f"{key_of(steps)}.keras"
