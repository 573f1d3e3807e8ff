"""The page on channels: each block runs, and each criterion is in its table."""

from __future__ import annotations

import re
from pathlib import Path

from dwindle.pruning.channel_importance import CHANNEL_CRITERIA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "channels.md"


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf8"), re.S | re.M)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "channels.md", "exec"), names)
    assert (tmp_path / "small.tflite").exists()


def test_every_criterion_is_in_the_table():
    text = PAGE.read_text(encoding="utf8")
    assert {name for name in CHANNEL_CRITERIA if f'`"{name}"`' in text} == set(CHANNEL_CRITERIA)
