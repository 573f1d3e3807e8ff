"""What training in rounds shares: settings made anew for each, the data, the requirement, the folder to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dwindle.data import Data, Split, fit_to_model
from dwindle.errors import ConfigError, DataError
from dwindle.measuring.accuracy import check_metric, evaluate, higher_is_better
from dwindle.model_samples import fitted


@dataclass(frozen=True)
class Requirement:
    """What a metric has to reach.

    Attributes:
        metric: As in `dwindle.measure`.
        max_drop: How much worse than the baseline it may be, or None.
        at_least: What it has to reach (at most, where lower is better), or None.

    Raises:
        ConfigError: If not exactly one of the two is given, or the metric is unknown.
    """

    metric: Any
    max_drop: float | None
    at_least: float | None

    def __post_init__(self) -> None:
        if (self.max_drop is None) == (self.at_least is None):
            raise ConfigError("pass one of `max_drop`, such as 0.01, and `at_least`, such as 0.97")
        check_metric(self.metric)

    def value(self, baseline: float | None) -> float:
        """Return what the metric has to reach, given that of the model to compare with."""
        if self.at_least is not None or baseline is None:
            return float(self.at_least or 0.0)
        return baseline - (self._sign * self.max_drop if self.max_drop is not None else 0.0)

    def met(self, value: float, required: float) -> bool:
        """Whether a value is good enough."""
        return self._sign * (value - required) >= 0

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another."""
        return self._sign * (value - other) > 0

    @property
    def _sign(self) -> float:
        return 1.0 if higher_is_better(self.metric) else -1.0


def check_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise unless a folder's rounds were made with these settings.

    Raises:
        ConfigError: With the setting that differs.
    """
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigError(
                f"`folder` {folder} holds rounds with another {key}: {found.get(key)!r}, and here it is {value!r}; go "
                "on with the settings that it was begun with, or choose another folder"
            )


def weights_hash(model: keras.Model) -> str:
    """Return a hash of a model's weights."""
    digest = hashlib.sha256()
    for variable in model.weights:
        digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return digest.hexdigest()[:16]


def fresh_settings(given: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Return a function that makes fresh settings for ``compile``: optimizers and metrics keep a state."""
    if not isinstance(given, Mapping):
        return lambda: dict(given())

    def fresh(value: Any) -> Any:
        if isinstance(value, keras.optimizers.Optimizer | keras.metrics.Metric):
            return type(value).from_config(value.get_config())
        return [fresh(one) for one in value] if isinstance(value, list | tuple) else value

    return lambda: {name: fresh(value) for name, value in given.items()}


def fit_arguments(model: keras.Model, train: Any) -> tuple[Any, ...]:
    """Return the positional arguments of ``fit``."""
    if isinstance(train, tuple):
        return train
    if isinstance(train, Data):
        shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
        split = fit_to_model(train, shapes, None).train
        if split is None:
            raise DataError(f"data `{train.source}` has no training samples")
        return (split.x[0] if len(split.x) == 1 else list(split.x), split.y)
    return (train,)


def labelled_samples(model: keras.Model, validation: Any) -> Split:
    """Return the samples to measure on, in any form that `dwindle.read_data` takes.

    Raises:
        DataError: If they have no labels.
    """
    found = fitted(model, validation)
    split = found.val or found.test or found.train
    if split is None or split.y is None:
        raise DataError(f"data `{found.source}` has no labels, and `validation` needs them")
    return split


def measured(model: keras.Model, split: Split, metric: Any) -> float:
    """Return the metric of a model's predictions."""
    outputs = model.predict(split.x[0] if len(split.x) == 1 else list(split.x), batch_size=256, verbose=0)
    return float(evaluate(np.asarray(outputs), np.asarray(split.y), metric))
