"""The page on clustering runs, and names every beginning."""

from __future__ import annotations

import re
from pathlib import Path

from dwindle.clustering import INITS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clustering.md"


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.S):
        exec(compile(block, "clustering.md", "exec"), names)
    assert names["packed"].packed_bytes < names["made"].size_bytes / 2


def test_the_page_names_every_beginning():
    text = PAGE.read_text(encoding="utf8")
    for name in INITS:
        assert f'"{name}"' in text
