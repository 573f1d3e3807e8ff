"""The page on distillation runs, and names every objective."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distillation.md"


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "distillation.md", "exec"), names)
    assert (tmp_path / "said" / "recording.json").exists()
    assert len(names["found"].rounds) >= 2


def test_the_page_names_every_objective():
    from dwindle.distillation.objectives import _table

    text = PAGE.read_text(encoding="utf8")
    for kind, objective in _table().items():
        assert f'`"{kind}"`' in text or f"`{objective.__name__}`" in text
