"""The code in the README and in docstrings runs, and says what it claims."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

import dwindle
from dwindle.cli import main
from dwindle.compressing.plans import read_plan

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


def test_every_block_of_the_quantization_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    assert 2 * len(blocks) == text.count("```")
    assert {language for language, _ in blocks} == {"python", "sh"}
    names: dict[str, object] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "quantization.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "dwindle"
            assert main(arguments) == 0, capsys.readouterr().err
    sizes = {name: (tmp_path / f"{name}.tflite").stat().st_size for name in ("float", "int8", "int4", "small")}
    assert sizes["int4"] < sizes["int8"] < sizes["float"] / 2
    assert sizes["small"] <= 10_000
    assert "Keep `" in capsys.readouterr().out  # blame's advice


def test_what_the_onnx_page_writes_is_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "onnx.md").read_text(encoding="utf8"), re.S | re.M)
    assert [language for language, _ in blocks] == ["python", "sh"]
    exec(compile(blocks[0][1], "onnx.md", "exec"), {})
    assert capsys.readouterr().out == blocks[0][1].partition("  # ")[2].partition("\n")[0] + "\n"
    for line in blocks[1][1].splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    sizes = {name: (tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "first", "int8", "small", "same")}
    assert max(sizes["int8"], sizes["small"], sizes["same"]) < 0.75 * min(sizes["float"], sizes["first"])


def test_the_quantization_page_has_every_scheme_and_option():
    from dwindle.exporting.saved_model import FORMATS
    from dwindle.quantization import IO_TYPES, SCHEMES
    from dwindle.quantization.calibration import METHODS
    from dwindle.quantization.fake_quantization import RANGES
    from dwindle.quantization.refining import ROUNDINGS

    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf8")
    table = re.findall(r"^\| (`[^|]*`) \|", text.partition("## A model")[0], re.M)
    assert set(re.findall(r"`([^`]+)`", " ".join(table))) == {*SCHEMES, *FORMATS}
    for name in (*METHODS, *RANGES, *ROUNDINGS, *IO_TYPES):
        assert f'"{name}"' in text or name in ("nearest", "float32"), name


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


def test_the_pages_name_the_operators_of_onnx_and_no_others():
    (_, _, listed) = runpy.run_path(str(ROOT / "scripts" / "support_table.py"))["operators"]()
    names = re.findall(r"`([^`]+)`", listed)
    assert {name.partition("::")[0] for name in names if "::" in name} == {"com.microsoft"}
    assert listed in (ROOT / "docs" / "support.md").read_text(encoding="utf8")
    assert f"The table has {len(names)} entries" in (ROOT / "docs" / "onnx.md").read_text(encoding="utf8")


@pytest.mark.slow
def test_the_support_table_is_what_running_it_gives():
    made = runpy.run_path(str(ROOT / "scripts" / "support_table.py"))["table"]()
    assert made == (ROOT / "docs" / "support.md").read_text(encoding="utf8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter warns about its own code
def test_the_table_of_pytorch_is_what_running_it_gives():
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    made = runpy.run_path(str(ROOT / "scripts" / "support_table.py"))["torch_table"]()
    assert made == (ROOT / "docs" / "support-pytorch.md").read_text(encoding="utf8")


def test_the_page_on_compress_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "compress.md").read_text(encoding="utf8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    exec(compile(block, "compress.md", "exec"), {})
    assert "size" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    (plan,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.S | re.M)
    (tmp_path / "plan.yaml").write_text(plan)
    assert read_plan(tmp_path / "plan.yaml").trains
