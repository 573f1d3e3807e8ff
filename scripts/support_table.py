"""Write docs/support.md: what works, found by running it on the models of tests/zoo.py.

python scripts/support_table.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def outcome(action: Callable[[], object]) -> str:
    """Return ``yes``, or why not."""
    from dwindle import DwindleError

    try:
        action()
    except DwindleError as error:
        return "no: " + " ".join(str(error).split()).split(";")[0].replace("|", "/")
    return "yes"


def table() -> str:
    """Return the page."""
    import keras
    from zoo import ZOO, samples, settle

    import dwindle as dw
    from dwindle.lifting.operators import OPERATORS

    lines = [
        "# What works",
        "",
        "Made by `scripts/support_table.py`, which runs every verb on the models of `tests/zoo.py`.",
        "",
        "| model | prune | lift | quantize in training | float32 | float16 | int8 | int8-dynamic |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, build in ZOO.items():
            keras.utils.set_random_seed(0)
            model = settle(build())
            inputs = samples(model, 64)
            cells = [
                outcome(lambda model=model: dw.prune(model, 0.5)),
                outcome(lambda model=model: dw.lift(model)),
                outcome(lambda model=model, inputs=inputs: dw.quantize(model, "int8", inputs)),
            ]
            for scheme in ("float32", "float16", "int8", "int8-dynamic"):
                path = Path(folder) / "model.tflite"
                cells.append(outcome(lambda m=model, p=path, s=scheme, i=inputs: dw.export(m, p, scheme=s, data=i)))
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    listed = ", ".join(f"`{name}`" for name in sorted(OPERATORS))
    lines += ["", f"Operators of LiteRT that can be made trainable ({len(OPERATORS)}): {listed}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs" / "support.md").write_text(table(), encoding="utf8")
