"""The code in the README and in docstrings runs, and says what it claims."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import dwindle

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted({module for module in dwindle._NAMES.values()})


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    found = doctest.testmod(importlib.import_module(module), raise_on_error=False, verbose=False)
    assert found.failed == 0


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf8"), re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.tflite").exists()


def test_the_readme_names_the_test_and_demo_commands():
    text = (ROOT / "README.md").read_text(encoding="utf8")
    for command in ("make demo", "make test", "dwindle compress"):
        assert command in text


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")))
def test_every_page_is_in_the_documentation(page):
    if "decisions/" in page and not page.endswith("index.md"):
        assert Path(page).name in (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf8")
    else:
        assert page.removeprefix("docs/") in (ROOT / "mkdocs.yml").read_text(encoding="utf8")


@pytest.mark.slow
def test_the_support_table_is_what_running_it_gives():
    import runpy

    made = runpy.run_path(str(ROOT / "scripts" / "support_table.py"))["table"]()
    assert made == (ROOT / "docs" / "support.md").read_text(encoding="utf8")
