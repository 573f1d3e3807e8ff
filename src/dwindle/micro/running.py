"""Running a file in TensorFlow Lite Micro's interpreter, in a process of its own.

``python -m dwindle.micro.running FOLDER`` runs ``FOLDER/model.tflite`` on ``FOLDER/inputs.npz``, writes
``FOLDER/outputs.npz`` and prints one JSON line. The interpreter aborts the process on some files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dwindle.errors import MissingDependencyError, UnsupportedModelError
from dwindle.lifting.flatbuffer import Graph, layer_name, read_graph

_SECONDS = 1800


@dataclass(frozen=True, kw_only=True)
class MicroRun:
    """What TensorFlow Lite Micro gave.

    Attributes:
        outputs: One array for each output, of the file's own types, shape ``(n, ...)``; ``(n, steps, ...)`` where
            states are carried.
        arena_bytes: Bytes of the tensor arena that are used.
        needed_bytes: The smallest arena, in steps of 16 bytes, in which the tensors can be allocated: planning where
            they lie takes room that is free again when they are used.
        persistent_bytes: Those of them that hold the interpreter's own structures, which are smaller on 32-bit devices.
    """

    outputs: tuple[np.ndarray, ...]
    arena_bytes: int
    needed_bytes: int
    persistent_bytes: int


def check_installed() -> None:
    """Check that the interpreter is there.

    Raises:
        MissingDependencyError: If it is not.
    """
    if importlib.util.find_spec("tflite_micro") is None:
        raise MissingDependencyError(
            "TensorFlow Lite Micro's interpreter is not installed; install dwindle[micro] (Linux, x86-64)"
        )


def run_micro(
    content: bytes, inputs: Sequence[np.ndarray], *, states: Mapping[int, int] | None = None, named: bytes | None = None
) -> MicroRun:
    """Run a file in TensorFlow Lite Micro.

    Args:
        content: The file.
        inputs: One array of the file's own type for each input, shape ``(n, ...)`` with the file's shape but its batch
            of one behind ``n``. Where states are carried: only for the other inputs, shape ``(n, steps, ...)``.
        states: Number of an input to the number of the output that is its next value. It begins as the integers that
            stand for 0 with each of the ``n`` sequences.
        named: A file with the same operators whose tensors have names, for messages.

    Raises:
        MissingDependencyError: If ``tflite-micro`` is not installed.
        UnsupportedModelError: If the interpreter can't run the file; what it said is passed on, with the layer's name.
    """
    check_installed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.tflite").write_bytes(content)
        arrays = {f"x{number}": array for number, array in enumerate(inputs)}
        np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]
        (folder / "states.json").write_text(json.dumps(dict(states or {})), encoding="utf8")
        found = _ask(folder)
        if "arena" not in found:
            reason = _explained(str(found.get("note")), read_graph(named or content))
            raise UnsupportedModelError(f"TensorFlow Lite Micro can't run the file: {reason}")
        with np.load(folder / "outputs.npz") as made:
            outputs = tuple(made[f"y{number}"] for number in range(len(made.files)))
    return MicroRun(
        outputs=outputs, arena_bytes=found["arena"], needed_bytes=found["needed"], persistent_bytes=found["persistent"]
    )  # fmt: skip


def _ask(folder: Path) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "dwindle.micro.running", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"note": f"it did not end within {_SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = (folder / "log").read_text("utf8", "replace") if (folder / "log").exists() else ""
        return {"note": f"{said}\nit ended with status {done.returncode}"}
    return found


def _explained(said: str, graph: Graph) -> str:
    """Return what the interpreter said, in one sentence with the layer's name in it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = next((line for line in lines if re.search(r"Node \S+ \(number \d+\)", line)), None)
    if told is None:
        return " ".join(lines[:2]) or "it did not say why"
    number = int(re.search(r"\(number (\d+)\)", told).group(1))  # type: ignore[union-attr]
    why = [line for line in lines if line is not told and "failed" not in line]
    because = f" ({'; '.join(why[:2])})" if why else ""
    if number >= len(graph.operations):
        return f"{told}{because}"
    operation = graph.operations[number]
    types = ", ".join(np.dtype(t.dtype).name for t in operation.inputs if t is not None)
    return f"operator `{operation.name}` of layer `{layer_name(operation)}`, on {types}, is refused{because}"


@contextmanager
def _logged(log: IO[bytes]) -> Iterator[None]:
    """Send what the C++ side prints into a file."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)


def _in_folder(folder: Path) -> dict[str, Any]:
    content = (folder / "model.tflite").read_bytes()
    states = {int(key): value for key, value in json.loads((folder / "states.json").read_text("utf8")).items()}
    with np.load(folder / "inputs.npz") as given:
        inputs = [given[f"x{number}"] for number in range(len(given.files))]
    from tflite_micro import runtime

    note = None
    with (folder / "log").open("w+b") as log:
        with _logged(log):
            try:
                interpreter = runtime.Interpreter.from_bytes(content, arena_size=len(content) * 4 + 16_000_000)
                outputs = _outputs(interpreter, read_graph(content), inputs, states)
                interpreter.print_allocations()
            except (RuntimeError, ValueError, IndexError) as error:
                note = str(error)
        log.seek(0)
        text = log.read().decode("utf8", "replace")
        total = re.search(r"Arena allocation total (\d+) bytes", text)
        with _logged(log):
            needed = _needed(content, int(total.group(1))) if total else 0
    tail = re.search(r"Arena allocation tail (\d+) bytes", text)
    if note is not None or total is None or tail is None:
        return {"note": f"{text}\n{note}"}
    made = {f"y{number}": array for number, array in enumerate(outputs)}
    np.savez(folder / "outputs.npz", **made)  # type: ignore[arg-type]
    return {"arena": int(total.group(1)), "needed": needed, "persistent": int(tail.group(1))}


def _needed(content: bytes, used: int) -> int:
    """Return the smallest arena, in steps of 16 bytes, in which the tensors can be allocated."""
    from tflite_micro import runtime

    def enough(steps: int) -> bool:
        try:
            runtime.Interpreter.from_bytes(content, arena_size=steps * 16)
        except RuntimeError:
            return False
        return True

    low, high = used // 16 - 1, used // 16 + 1
    while not enough(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high * 16


def _outputs(interpreter: Any, graph: Graph, inputs: list[np.ndarray], states: Mapping[int, int]) -> list[np.ndarray]:
    free = [number for number in range(len(graph.inputs)) if number not in states]
    found: list[list[np.ndarray]] = [[] for _ in graph.outputs]
    for sample in range(len(inputs[0])):
        carried = {number: zeros(graph, number) for number in states}
        rows: list[list[np.ndarray]] = [[] for _ in graph.outputs]
        for step in range(inputs[0].shape[1]) if states else (None,):
            for number, array in zip(free, inputs, strict=True):
                value = array[sample] if step is None else array[sample, step]
                interpreter.set_input(_shaped(value, graph, number), number)
            for number, value in carried.items():
                interpreter.set_input(value, number)
            interpreter.invoke()
            made = [np.array(interpreter.get_output(number)) for number in range(len(graph.outputs))]
            carried = {number: _shaped(made[states[number]], graph, number) for number in states}
            for number, value in enumerate(made):
                rows[number].append(value.reshape(value.shape[1:] if value.shape[:1] == (1,) else value.shape))
        for number, row in enumerate(rows):
            found[number].append(np.stack(row) if states else row[0])
    return [np.stack(rows) for rows in found]


def _shaped(value: np.ndarray, graph: Graph, number: int) -> np.ndarray:
    tensor = graph.inputs[number]
    return np.ascontiguousarray(value, dtype=tensor.dtype).reshape(tensor.shape)


def zeros(graph: Graph, number: int) -> np.ndarray:
    """Return what stands for 0 in an input: its zero point everywhere."""
    tensor = graph.inputs[number]
    point = 0 if tensor.zero_point is None else int(np.ravel(tensor.zero_point)[0])
    return np.full(tensor.shape, point, tensor.dtype)


def main(arguments: list[str]) -> int:
    """Run the model in a folder and print one JSON line; return the exit status."""
    print(json.dumps(_in_folder(Path(arguments[0]))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
