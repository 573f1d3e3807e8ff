"""What a search would try, without trying it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from dwindle.compressing.goals import Goals
from dwindle.compressing.plans import Plan
from dwindle.compressing.run import begun_search
from dwindle.targets import Target


def preview(
    model: keras.Model,
    goals: Goals,
    data: Any,
    *,
    target: str | Path | Target = "litert",
    metric: Any = "accuracy",
    epochs: int = 20,
    seed: int = 0,
    threads: int = 1,
    say: Callable[[str], None] | None = None,
) -> list[Plan]:
    """Return the plans that `dwindle.compress` tries first; what follows depends on what they reach.

    The original and the files of untrained candidates are measured for it, in a folder that is gone afterwards;
    nothing is trained. The arguments are those of `dwindle.compress`.

    Raises:
        ConfigError: As `dwindle.compress`.
        DataError: If the data does not fit the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        search, _ = begun_search(
            model, data=data, goals=goals, out=Path(folder) / "run", target=target, metric=metric, epochs=epochs,
            seed=seed, threads=threads, say=say,
        )  # fmt: skip
        try:
            search.measure_original()
            trains = search.case.bench.train is not None and search.case.bench.train.y is not None
            proposer = search.proposer()
            plans = proposer.preview() if trains else proposer.untrained(search.case.calibration is None)
        finally:
            search.store.close()
    return plans
