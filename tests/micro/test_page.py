"""The page on microcontrollers: its code runs, and its list of operators is the table's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import dwindle as dw
from dwindle.micro.operators import RESOLVER

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "micro.md").read_text(encoding="utf8")


def test_the_code_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names: dict[str, object] = {"model": trained, "sequences": rng.normal(size=(8, 10, 40)).astype(np.float32)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "micro.md", "exec"), names)
    assert (tmp_path / "listen" / "main.cc").exists()
    assert (tmp_path / "digits" / "digits.ino").exists()


def test_the_list_of_operators_is_the_table():
    listed = re.search(r"<!-- operators -->(.*?)<!-- /operators -->", PAGE, re.S).group(1)
    names = listed.replace("\n", " ").split(", ")
    assert len(set(names)) == len(names)
    assert set(names) == {name for name in RESOLVER if not name.startswith("CUSTOM:")}


def test_the_schemes_it_names_are_there():
    assert dw.Scheme(weights=8, activations=8, granularity="tensor").is_static
