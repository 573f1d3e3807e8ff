"""LiteRT files."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read(path: Path, trust: bool) -> Any:
    """Lift the file.

    Raises:
        UnsupportedModelError: If it can't be lifted, or leaves lengths of an input open.
    """
    del trust
    from dwindle.lifting import lift
    from dwindle.lifting.flatbuffer import refuse_open_lengths

    content = path.read_bytes()
    refuse_open_lengths(content)
    return lift(content, name=path.stem)
