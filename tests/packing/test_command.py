"""The commands `pack` and `unpack`: what they say, and bad input as one sentence with nothing written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from packed_files import FILES

from dwindle.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "packing.md"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model.tflite").write_bytes(FILES["int8, 90% zeros"])

    def call(*arguments: str):
        """Return exit status, standard output and error."""
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_there_and_back(run):
    status, out, error = run("pack", "model.tflite", "model.dwz")
    size = Path("model.dwz").stat().st_size
    assert (status, error) == (0, "")
    before = Path("model.tflite").stat().st_size
    assert out == (
        f"model.dwz: {size:,} bytes, {before / size:.2f} times smaller than model.tflite ({before:,} bytes); "
        "restored and compared\n"
    )
    status, out, error = run("unpack", "model.dwz", "back.tflite", "--json")
    assert (status, error) == (0, "")
    assert Path("back.tflite").read_bytes() == FILES["int8, 90% zeros"]
    assert json.loads(out)["packed_bytes"] == size
    assert json.loads(out)["model_bytes"] == before


BAD = {
    "no such model": (("pack", "no.tflite", "out.dwz"), r"`no\.tflite` does not exist"),
    "a folder": (("pack", ".", "out.dwz"), r"`\.` is a folder"),
    "text": (("pack", "text.tflite", "out.dwz"), r"`text\.tflite`: the file does not begin as a LiteRT model"),
    "cut": (("pack", "cut.tflite", "out.dwz"), r"`cut\.tflite`: .*truncated or damaged"),
    "another suffix": (("pack", "model.tflite", "out.zip"), r"it must end in \.dwz"),
    "packed exists": (("pack", "model.tflite", "old.dwz"), r"`old\.dwz` exists; write over it with --force"),
    "model exists": (("unpack", "good.dwz", "model.tflite"), r"`model\.tflite` exists; write over it with --force"),
    "not packed": (("unpack", "model.tflite", "out.tflite"), r"does not begin as a packed model"),
    "packed and cut": (("unpack", "cut.dwz", "out.tflite"), r"`cut\.dwz` can't be unpacked: it is truncated or damaged"),
    "packed and cut, over a file": (("unpack", "cut.dwz", "model.tflite", "--force"), r"truncated or damaged"),
    "newer": (("unpack", "newer.dwz", "out.tflite"), r"version 2, and this dwindle reads version 1"),
    "no packed file": (("unpack", "no.dwz", "out.tflite"), r"`no\.dwz` does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(run, name):
    run("pack", "model.tflite", "good.dwz")
    good = Path("good.dwz").read_bytes()
    Path("cut.dwz").write_bytes(good[:-9])
    Path("newer.dwz").write_bytes(good[:3] + b"\x02" + good[4:])
    Path("old.dwz").write_bytes(b"precious")
    Path("text.tflite").write_text("this is no model")
    Path("cut.tflite").write_bytes(FILES["int8, 90% zeros"][:70])
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    arguments, words = BAD[name]
    status, out, error = run(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"dwindle: .*{words}.*\n", error), error
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_force_writes_over(run):
    Path("model.dwz").write_bytes(b"old")
    assert run("pack", "model.tflite", "model.dwz", "--force")[0] == 0
    Path("back.tflite").write_bytes(b"old")
    assert run("unpack", "model.dwz", "back.tflite", "--force")[0] == 0
    assert Path("back.tflite").read_bytes() == FILES["int8, 90% zeros"]


def test_the_pages_commands_and_python_run(run):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf8"), re.S | re.M)
    assert {language for language, _ in blocks} == {"sh", "python", "c"}
    for language, block in blocks:
        if language == "sh":
            for line in block.splitlines():
                assert run(*shlex.split(line)[1:])[0] == 0
        elif language == "python":
            exec(compile(block, "packing.md", "exec"), {})
    assert Path("restored.tflite").read_bytes() == FILES["int8, 90% zeros"]
