"""What several commands share: options, progress on standard error, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError
from dwindle.loading import LAYOUTS

MET, BAD_INPUT, NOT_MET, INTERRUPTED = 0, 2, 3, 130


def start_keras() -> None:
    """Import Keras without the lines that its backend prints as it starts."""
    from dwindle.measuring.litert import quiet_stderr

    with quiet_stderr():
        import keras  # noqa: F401


def data_options(sub: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options that name data."""
    sub.add_argument(
        "--data", metavar="DATA", required=required,
        help=".npz with x_train, y_train (x_val, y_val, x_test, y_test), a folder of images, or module:function",
    )  # fmt: skip
    sub.add_argument("--rescale", metavar="FACTOR", default="1", help="multiply the inputs, such as 1/255 (default 1)")


def source_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that say how an ONNX file is read."""
    sub.add_argument(
        "--input", metavar="NAME=LENGTHS", action="append", default=[],
        help="shape of an input whose lengths are open, such as x=?,224,224,3 (not for .tflite); repeatable",
    )  # fmt: skip
    sub.add_argument(
        "--layout", default=LAYOUTS[0], choices=LAYOUTS,
        help="channels_last: inputs and outputs of an .onnx get their channels last (default: as in the file)",
    )  # fmt: skip


def load_source(path: str, options: argparse.Namespace) -> Any:
    """Return the model of a file, read as `source_options` and ``--trust`` say."""
    from dwindle.loading import load

    return load(path, _shapes(options.input), trust=options.trust, layout=options.layout)


def _shapes(given: list[str]) -> dict[str, tuple[int | None, ...]] | None:
    found: dict[str, tuple[int | None, ...]] = {}
    for text in given:
        name, _, lengths = text.rpartition("=")
        parts = [part.strip() for part in lengths.split(",")]
        if not name or not all(part == "?" or part.isdigit() for part in parts):
            raise ConfigError(f"`--input` is {text!r}; it must be NAME=LENGTH,LENGTH,... with ? for an open length")
        found[name] = tuple(None if part == "?" else int(part) for part in parts)
    return found or None


def run_options(sub: argparse.ArgumentParser, out: str) -> None:
    """Add the options of a command that writes a folder of results."""
    sub.add_argument("--out", metavar="DIR", default=out, help=f"folder for the results (default {out})")
    sub.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    sub.add_argument("--force", action="store_true", help="write over the run in the folder")
    sub.add_argument("--seed", type=int, default=0, help="fixes the result on one machine (default 0)")
    sub.add_argument("--threads", type=int, default=1, help="threads of the latency measurement (default 1)")
    sub.add_argument("--json", action="store_true", help="print report.json to standard output")
    sub.add_argument(
        "--progress", default=PROGRESS[0], choices=PROGRESS,
        help="how progress is shown on standard error (default auto: live on a terminal, else plain lines)",
    )  # fmt: skip
    sub.add_argument("--quiet", action="store_true", help="show no progress")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers, .pt2)")


PROGRESS = ("auto", "live", "plain", "json", "none")


@contextlib.contextmanager
def display(options: argparse.Namespace, goals: Any) -> Iterator[Callable[[Any], None]]:
    """Give what shows a search's events on standard error while it runs, as ``--progress`` says."""
    kind = "none" if options.quiet else options.progress
    if kind == "auto":
        kind = "live" if sys.stderr.isatty() else "plain"
    if kind == "live":
        from dwindle.reporting.live import LiveDisplay

        with LiveDisplay(goals, getattr(options, "budget", None)) as watch:
            yield watch
    else:
        yield {"plain": _plain, "json": _json_line, "none": lambda _event: None}[kind]


def _plain(event: Any) -> None:
    print(event.text, file=sys.stderr, flush=True)


def _json_line(event: Any) -> None:
    print(json.dumps(event.to_dict()), file=sys.stderr, flush=True)


def progress(what: str) -> Callable[[int, int], None] | None:
    """Return a function that shows progress on one line of a terminal; None where standard error is none."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, every: int) -> None:
        print(f"\r{what} {done}/{every}", end="\n" if done == every else "", file=sys.stderr, flush=True)

    return show


def rescaling(text: str) -> float:
    """Return the number that ``--rescale`` stands for; a ConfigError where it is none."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / (float(bottom) if bottom else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"`--rescale` is {text!r}; it must be a number such as 1/255 or 0.0039") from None
    return value


def check_exists(path: str) -> None:
    """Raise a ConfigError unless there is a file or folder."""
    if not Path(path).exists():
        raise ConfigError(f"`{path}` does not exist; pass a model file or a SavedModel folder")


def check_free(options: argparse.Namespace, suffix: str) -> None:
    """Raise a ConfigError if ``OUT`` is no name for a new file of this kind."""
    from dwindle.files import check_output_file

    out = check_output_file(options.out, suffixes=(suffix,))
    if out.exists() and not options.force:
        raise ConfigError(f"`{out}` exists; write over it with --force, or name another")


def fitted(options: argparse.Namespace, model: Any, factor: float) -> Any:
    """Return the data of ``--data`` in the shapes of a model; None where there is none."""
    if options.data is None:
        return None
    import keras

    from dwindle.data import fit_to_model, read_data

    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in model.inputs]
    units = model.outputs[0].shape[-1] if len(model.outputs) == 1 and len(model.outputs[0].shape) == 2 else None
    return fit_to_model(read_data(options.data, rescale=factor), shapes, units, input_dtypes=dtypes)


def command_line() -> str:
    """Return the command that was typed."""
    return shlex.join(["dwindle", *sys.argv[1:]])


def show(result: Any, options: argparse.Namespace) -> int:
    """Print the result of a search; return the exit status."""
    from dwindle.reporting import terminal_summary

    if options.json:
        print(json.dumps(dict(result.report), indent=2))
    else:
        terminal_summary(result.report)
        print(f"report: {Path(options.out) / 'report.html'}")
    if result.interrupted:
        return INTERRUPTED
    return MET if result.met else NOT_MET
