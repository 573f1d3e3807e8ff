"""C++ sources of a model: its bytes, a program that runs it, and how to build that."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.lifting.flatbuffer import Tensor, operator_name, parse, read_graph
from dwindle.micro.operators import operators_of, resolver_calls
from dwindle.micro.running import MicroRun

_LINE = 20
_MARGIN_BYTES = 1024
# What the folder may hold; one with anything else holds something of the user's.
FILES = ("CMakeLists.txt", "README.md", "main.cc", "model.cc", "model.h", "model.tflite", "sample.h")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a device runs to see that it computes the same.

    Attributes:
        inputs: One array for each input that is no state, of the file's own types, shape ``(steps, ...)``.
        outputs: One array for each output, shape ``(steps, ...)``.
        said: Where it came from, in words.
    """

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    said: str


def arena_with_margin(needed_bytes: int) -> int:
    """Return a tenth more, at least 1,024 bytes more, up to a multiple of 16."""
    return -(-(needed_bytes + max(_MARGIN_BYTES, needed_bytes // 10)) // 16) * 16


def render(
    content: bytes,
    *,
    title: str,
    run: MicroRun,
    sample: Sample,
    states: Mapping[int, int],
    names: tuple[Sequence[str], Sequence[str]],
    checked: Sequence[str],
    notes: Sequence[str],
    sketch: str,
) -> dict[str, str]:
    """Return the sources of a file by name.

    Args:
        content: The file.
        title: Name of the model.
        run: What was measured.
        sample: What the program runs.
        states: Number of an input to the number of the output that is its next value.
        names: Names of the inputs and of the outputs.
        checked: What the file was compared with, and what was found, in sentences.
        notes: What the user should know.
        sketch: Name of the folder.
    """
    import dwindle

    graph = read_graph(content)
    inputs = [_described(tensor, name) for tensor, name in zip(graph.inputs, names[0], strict=True)]
    outputs = [_described(tensor, name) for tensor, name in zip(graph.outputs, names[1], strict=True)]
    calls = resolver_calls(content)
    common = {"title": _plain(title), "version": dwindle.__version__, "size": len(content), "run": run,
              "arena_with_margin": arena_with_margin(run.needed_bytes), "calls": calls, "sketch": sketch,
              "sha256": hashlib.sha256(content).hexdigest()}  # fmt: skip
    kept = [
        {"input": number, "output": output, "byte": _byte_of_zero(graph.inputs[number])}
        for number, output in sorted(states.items())
    ]
    free = [number for number in range(len(inputs)) if number not in states]
    float_outputs = any(tensor.dtype == np.float32 for tensor in graph.outputs)
    found: dict[str, dict[str, Any]] = {
        "model.h": {"inputs": inputs, "outputs": outputs},
        "model.cc": {"data": _literal(content)},
        "sample.h": {
            "said": sample.said, "steps": len(sample.outputs[0]),
            "inputs": [_literal(array.tobytes()) for array in sample.inputs],
            "outputs": [_literal(array.tobytes()) for array in sample.outputs],
        },
        "main.cc": {
            "states": kept, "free": free, "outputs": len(outputs), "variables": _variables(content),
            "tolerance": 100 if float_outputs else 1,
        },
        "CMakeLists.txt": {},
        "sketch.ino": {},
        "README.md": {
            "operators": operators_of(content), "checked": checked, "notes": notes,
            "state_bytes": sum(inputs[number]["bytes"] for number in states), "flash_source": _flash(content),
        },
    }  # fmt: skip
    made = {name: _rendered(name, {**common, **values}) for name, values in found.items()}
    made[f"{sketch}.ino"] = made.pop("sketch.ino")
    return made


def _rendered(name: str, values: Mapping[str, Any]) -> str:
    import jinja2

    # What is rendered is C++ and Markdown, from names that `_plain` has cleaned.
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    template = files("dwindle.micro").joinpath("templates", f"{name}.jinja").read_text(encoding="utf8")
    return environment.from_string(template).render(**values) + "\n"


def _plain(text: str) -> str:
    """Return a name that can stand in a comment."""
    return re.sub(r"[^\w .:/-]", "_", text)[:100]


def _described(tensor: Tensor, name: str) -> dict[str, Any]:
    scaled = tensor.scale is not None and tensor.zero_point is not None
    return {
        "name": _plain(name), "dtype": np.dtype(tensor.dtype).name, "shape": list(tensor.shape),
        "bytes": int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize,
        "scale": repr(float(np.ravel(tensor.scale)[0])) if scaled else None,  # type: ignore[arg-type]
        "zero_point": int(np.ravel(tensor.zero_point)[0]) if scaled else None,  # type: ignore[arg-type]
    }  # fmt: skip


def _byte_of_zero(tensor: Tensor) -> int:
    """Return the byte that a state is filled with at first; integers of more than 8 bits have zero point 0."""
    return 0 if tensor.zero_point is None else int(np.ravel(tensor.zero_point)[0])


def _literal(content: bytes) -> str:
    lines = (content[start : start + _LINE] for start in range(0, len(content), _LINE))
    return "\n".join("    " + ", ".join(str(byte) for byte in line) + "," for line in lines)


def _variables(content: bytes) -> int:
    """Return how many resource variables a file has."""
    model = parse(content)
    return len({
        (operation.builtinOptions.container, operation.builtinOptions.sharedName)
        for graph in model.subgraphs
        for operation in graph.operators or []
        if operator_name(model, operation) == "VAR_HANDLE"
    })  # fmt: skip


def _flash(content: bytes) -> str:
    """Return how the flash of the model was found."""
    found = compiled_bytes(content)
    if found is None:
        return "bytes of the constant array; no compiler for Arm was there to measure with"
    return f"measured: `.rodata` of `model.cc` for Cortex-M4 has {found:,} bytes"


def compiled_bytes(content: bytes, compiler: str = "arm-none-eabi-g++") -> int | None:
    """Return the bytes of constants in a compiled ``model.cc``; None where there is no such compiler."""
    tool, size = shutil.which(compiler), shutil.which(compiler.replace("g++", "size"))
    if tool is None or size is None:
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = f"alignas(16) extern const unsigned char kModelData[] = {{\n{_literal(content)}\n}};\n"
        (folder / "model.cc").write_text(source, encoding="ascii")
        command = [tool, "-mcpu=cortex-m4", "-mthumb", "-Os", "-c", "model.cc", "-o", "model.o"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
            told = subprocess.run([size, "-A", "model.o"], cwd=folder, check=True, capture_output=True, text=True)
        except (subprocess.SubprocessError, OSError):
            return None
    return sum(int(line.split()[1]) for line in told.stdout.splitlines() if line.startswith(".rodata"))
