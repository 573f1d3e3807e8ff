"""The page on pruning single weights does what it says, and lists what there is."""

from __future__ import annotations

import re
from pathlib import Path

from dwindle.pruning import CRITERIA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pruning.md"


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    assert 2 * len(blocks) == text.count("```")
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "pruning.md", "exec"), names)
    assert (tmp_path / "rounds" / "rounds.json").exists()


def test_every_criterion_is_listed():
    assert re.findall(
        r'^\| `"(\w+)"` \| [^|]* \| [^|]*\|$', PAGE.read_text(encoding="utf8").split("## What goes first")[1], re.M
    ) == list(CRITERIA)
