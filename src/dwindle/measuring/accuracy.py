"""Metrics of outputs against labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dwindle.errors import ConfigError, DataError, did_you_mean

# What these measure is an error: less is better.
_LOWER = ("error", "loss", "crossentropy", "hinge", "divergence", "mse", "mae", "mape", "msle", "poisson", "deviance")


def accuracy(outputs: np.ndarray, y: np.ndarray) -> float:
    """Return the fraction of samples whose class is right.

    See `right` for the arguments and errors.
    """
    return float(right(outputs, y).mean())


def right(outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return for each sample whether its class is right.

    Args:
        outputs: ``(n, classes)``: the largest is the class; ``(n,)`` or ``(n, 1)``: class 1 from 0.5 on.
        y: Integer labels ``(n,)``, or one-hot ``(n, classes)``.

    Raises:
        DataError: If labels and outputs do not fit.
    """
    found, labels = predicted_classes(outputs), labelled_classes(y)
    if len(labels) != len(found):
        raise DataError(f"there are {len(found)} outputs and {len(labels)} labels; they must be as many")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise DataError("the labels are not whole numbers, so there is no accuracy; choose a metric such as `mae`")
    return np.asarray(found == labels)


def predicted_classes(outputs: np.ndarray) -> np.ndarray:
    """Return the class that each output ``(n, ...)`` names, as `right` reads it."""
    outputs = np.asarray(outputs)
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return np.asarray(outputs.argmax(axis=1))
    return (outputs.reshape(len(outputs), -1)[:, 0] >= 0.5).astype(np.int64)


def labelled_classes(y: np.ndarray) -> np.ndarray:
    """Return the class that each label names, as `right` reads it: of the labels' own type where not one-hot."""
    y = np.asarray(y)
    return np.asarray(y.argmax(axis=1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(len(y), -1)[:, 0])


def evaluate(outputs: np.ndarray, y: np.ndarray, metric: Any = "accuracy") -> float:
    """Return a metric of outputs ``(n, ...)`` against labels ``y``.

    Args:
        outputs: What the file predicts.
        y: Labels or targets.
        metric: ``"accuracy"``, the name of a Keras metric, a `keras.metrics.Metric` (used by its config), or a
            function ``(y, outputs) -> float``.

    Raises:
        ConfigError: For a name that Keras does not know.
    """
    if metric == "accuracy":
        return accuracy(outputs, y)
    import keras

    if isinstance(metric, keras.metrics.Metric):
        own = type(metric).from_config(metric.get_config())
    elif isinstance(metric, str):
        own = _by_name(metric)
    elif callable(metric):
        return float(metric(y, outputs))
    else:
        raise ConfigError(f"`metric` is {metric!r}; it must be a name, a keras.metrics.Metric or a function")
    if not isinstance(own, keras.metrics.Metric):
        own = keras.metrics.MeanMetricWrapper(own)
    targets = y.reshape(outputs.shape) if y.size == outputs.size else y
    own.update_state(targets, outputs)
    return float(own.result())


def check_metric(metric: Any) -> None:
    """Raise before any work is done if a metric's name is not known.

    Raises:
        ConfigError: With the nearest name that is.
    """
    if isinstance(metric, str) and metric != "accuracy":
        _by_name(metric)


def _by_name(name: str) -> Any:
    import keras

    try:
        return keras.metrics.get(name)
    except ValueError:
        known = [*sorted(n for n in dir(keras.metrics) if n[0].islower()), "accuracy", "mae", "mse"]
        raise ConfigError(
            f"`metric` is {name!r}, which Keras does not know{did_you_mean(name, known)}; "
            "use accuracy or a name from keras.metrics"
        ) from None


def higher_is_better(metric: str | Callable[..., Any] | Any) -> bool:
    """Whether a larger value of the metric is better; errors and losses are better when smaller."""
    name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", ""))
    return not any(word in str(name).lower().replace(" ", "_") for word in _LOWER)
