"""What a search says while it runs: one event at a time, for a line, a live display or a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: ``note``: something to know; ``begin`` and ``end``: of a trial; ``progress``: within one; ``best``: a better file.
KINDS = ("note", "begin", "progress", "end", "best")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        kind: One of `KINDS`.
        text: The same in words, one line.
        trial: Number of the trial; None where it belongs to none.
        facts: Plain data: of ``progress`` the ``epoch`` and ``epochs``, of ``end`` and ``best`` the trial's figures.
    """

    kind: str
    text: str
    trial: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"event": self.kind, "trial": self.trial, "text": self.text, **self.facts}


Tell = Callable[[Event], None]
