"""Peak RAM of a file, measured by running it in a process of its own.

``python -m dwindle.measuring.memory FILE`` prints one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import UnsupportedModelError
from dwindle.measuring.runners import is_onnx

_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Memory:
    """RAM of a file.

    Attributes:
        resident_bytes: Growth of the process's peak resident memory when its runtime loads and runs the file.
        arena_bytes: Tensor arena that TensorFlow Lite Micro uses; None where it can't run the file.
        arena_note: Why there is no arena, or None.
    """

    resident_bytes: int
    arena_bytes: int | None
    arena_note: str | None


def measure_memory(path: str | Path) -> Memory:
    """Measure a file in fresh processes, one for each runtime.

    Raises:
        UnsupportedModelError: If LiteRT can't run the file.
    """
    resident = _ask("onnx" if is_onnx(path) else "resident", path)
    if "bytes" not in resident:
        raise UnsupportedModelError(f"`{path}`: RAM can't be measured: {resident.get('note')}")
    if is_onnx(path):
        note = "TensorFlow Lite Micro runs .tflite files"
        return Memory(resident_bytes=resident["bytes"], arena_bytes=None, arena_note=note)
    arena = _ask("arena", path)
    return Memory(resident_bytes=resident["bytes"], arena_bytes=arena.get("bytes"), arena_note=arena.get("note"))


def _ask(kind: str, path: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "dwindle.measuring.memory", kind, str(Path(path).resolve())]
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"note": f"it did not end within {_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"note": f"the runtime ended with status {done.returncode}"}
    return found


def _resident(path: str) -> dict[str, Any]:
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    before = _begin_peak()
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        interpreter.set_tensor(details["index"], np.zeros(details["shape"], details["dtype"]))
    for _ in range(3):
        interpreter.invoke()
    return {"bytes": max(0, _peak_bytes() - before)}


def _onnx(path: str) -> dict[str, Any]:
    from dwindle.measuring.onnx_runtime import OnnxRunner, require_onnxruntime

    require_onnxruntime()
    before = _begin_peak()
    runner = OnnxRunner(path)
    for _ in range(3):
        runner.invoke()
    return {"bytes": max(0, _peak_bytes() - before)}


def _begin_peak() -> int:
    """Forget the peak so far where the system can (Linux), and return what is resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_bytes()


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _arena(path: str) -> dict[str, Any]:
    import numpy as np

    try:
        from tflite_micro import runtime
    except ImportError:
        return {"note": "not measured: install dwindle[micro] for the arena of TensorFlow Lite Micro"}
    content = Path(path).read_bytes()
    with tempfile.TemporaryFile("w+b") as log:
        saved = os.dup(2), os.dup(1)
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        note = None
        try:
            interpreter = runtime.Interpreter.from_bytes(content, arena_size=len(content) * 4 + 16_000_000)
            for number in range(_count_inputs(content)):
                details = interpreter.get_input_details(number)
                interpreter.set_input(np.zeros(details["shape"], details["dtype"]), number)
            interpreter.invoke()
            interpreter.print_allocations()
        except (RuntimeError, ValueError, IndexError) as error:
            note = str(error)
        finally:
            sys.stdout.flush()
            os.dup2(saved[0], 2)
            os.dup2(saved[1], 1)
        log.seek(0)
        text = log.read().decode("utf8", "replace")
    found = re.search(r"Arena allocation total (\d+) bytes", text)
    if note is None and found:
        return {"bytes": int(found.group(1))}
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return {"note": f"TensorFlow Lite Micro can't run the file: {first or note}"}


def _count_inputs(content: bytes) -> int:
    from dwindle.lifting.flatbuffer import read_graph

    return len(read_graph(content).inputs)


def main(arguments: list[str]) -> int:
    """Print one JSON line about a file; return the exit status."""
    kind, path = arguments
    kinds = {"resident": _resident, "arena": _arena, "onnx": _onnx}
    print(json.dumps(kinds[kind](path)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
