"""What the tests of packing share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dwindle.packing import c_sources, native


@pytest.fixture
def in_python(monkeypatch):
    """The engine in Python, even where there is a compiler."""
    monkeypatch.setenv("DWINDLE_NATIVE", "0")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler on this machine")
    return found


@pytest.fixture(scope="session")
def built(compiler, tmp_path_factory) -> Callable[..., Path]:
    """Compile the decoder and the program that tests run it with."""
    folder = tmp_path_factory.mktemp("decoder")

    def build(name: str, *flags: str) -> Path:
        header, source, _ = c_sources()
        out = folder / name
        subprocess.run(
            [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", *flags, "-I", str(header.parent), "-o",
             str(out), str(source), str(Path(__file__).parent / "restore.c")],
            check=True,
        )  # fmt: skip
        return out

    return build
