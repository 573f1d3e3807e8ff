"""The errors that dwindle raises: one tree, one clear sentence each.

DwindleError
├── ConfigError              an argument or option that is not valid (also a ``ValueError``)
├── DataError                the user's data does not fit or can't be read
├── UnsupportedModelError    a model or file that can't be read or treated
├── ConversionError          a converter or writer failed
├── VerificationError        a file does not predict what the model predicts
└── MissingDependencyError   an optional package is not installed (also an ``ImportError``)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DwindleError(Exception):
    """The root of every error that dwindle raises on purpose."""


class ConfigError(DwindleError, ValueError):
    """An argument, option or goal has a value that is not accepted."""


class DataError(DwindleError):
    """The user's data can't be read, or does not fit the model."""


class UnsupportedModelError(DwindleError):
    """A model or file can't be read, or nothing in it can be treated."""


class ConversionError(DwindleError):
    """Writing a file failed."""


class VerificationError(DwindleError):
    """A written file does not predict what the model predicts."""


class MissingDependencyError(DwindleError, ImportError):
    """An optional package is missing; the message says what to install."""


def did_you_mean(value: object, accepted: Iterable[object]) -> str:
    """Return ``"; did you mean `x`?"`` for a near miss, else an empty string.

    Args:
        value: What the user wrote.
        accepted: The names that would have been accepted.
    """
    near = difflib.get_close_matches(str(value), [str(item) for item in accepted], n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``accepted``.

    Args:
        name: The argument's name, as the user typed it.
        value: What the user passed.
        accepted: The accepted values.

    Raises:
        ConfigError: With the accepted names and the nearest one.
    """
    accepted = list(accepted)
    if value not in accepted:
        listed = ", ".join(f"`{item}`" for item in accepted)
        raise ConfigError(f"`{name}` is {value!r}; it must be one of {listed}{did_you_mean(value, accepted)}")
