"""Tables of operators, filled by a decorator at each entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Entry = TypeVar("Entry")


def registrar(table: dict[str, Entry]) -> Callable[..., Callable[[Entry], Entry]]:
    """Return a decorator that takes names of operators and puts what it decorates into a table under each."""

    def operator(*names: str) -> Callable[[Entry], Entry]:
        def register(entry: Entry) -> Entry:
            table.update(dict.fromkeys(names, entry))
            return entry

        return register

    return operator
