"""``dwindle measure``, ``dwindle compare`` and ``dwindle inspect``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dwindle.cli.common import MET, check_exists, data_options, rescaling, start_keras
from dwindle.errors import DataError


def add(commands: Any) -> None:
    """Add ``measure``."""
    sub = commands.add_parser("measure", help="measure accuracy, bytes, latency and RAM of a .tflite or .onnx")
    sub.set_defaults(run=_measure)
    sub.add_argument("file", metavar="FILE", help="a .tflite or .onnx file")
    data_options(sub, required=False)
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--threads", type=int, default=1, help="threads of the interpreter (default 1)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def _measure(options: argparse.Namespace) -> int:
    from dwindle.data import read_data
    from dwindle.measuring import measure
    from dwindle.reporting import format_bytes

    if options.threads < 1:
        raise DataError(f"`--threads` is {options.threads}; it must be at least 1")
    data = None if options.data is None else read_data(options.data, rescale=rescaling(options.rescale))
    found = measure(options.file, data, metric=options.metric, threads=options.threads)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return MET
    if found.accuracy is not None:
        print(f"{found.metric:12} {found.accuracy:.4f} on {found.samples:,} samples")
    print(f"{'size':12} {format_bytes(found.size_bytes)} ({found.size_bytes:,} bytes)")
    latency = found.latency
    print(f"{'latency':12} p50 {latency.p50_ms:.4g} ms, p90 {latency.p90_ms:.4g} ms ({latency.threads} thread(s))")
    print(f"{'RAM':12} {format_bytes(found.ram_bytes)} ({found.ram_source})")
    print(f"{'sha256':12} {found.sha256}")
    return MET


def add_inspect(commands: Any) -> None:
    """Add ``inspect``."""
    sub = commands.add_parser("inspect", help="show the operators or layers of a file")
    sub.set_defaults(run=_inspect)
    sub.add_argument("file", metavar="FILE", help="a .tflite, .onnx, .keras or .h5 file")
    sub.add_argument("--json", action="store_true", help="print the table as JSON")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers)")


def _inspect(options: argparse.Namespace) -> int:
    from dwindle.measuring import inspect_file, inspect_model
    from dwindle.reporting import print_inspection

    check_exists(options.file)
    if Path(options.file).suffix.lower() in (".tflite", ".onnx"):
        found = inspect_file(options.file)
    else:
        from dwindle.loading import load

        start_keras()
        found = inspect_model(load(options.file, trust=options.trust))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        told = found.to_dict()
        print_inspection(told["rows"], {key: value for key, value in told.items() if key != "rows"})
    return MET


def add_compare(commands: Any) -> None:
    """Add ``compare``."""
    sub = commands.add_parser("compare", help="measure .tflite and .onnx files side by side, each against the first")
    sub.set_defaults(run=_compare)
    sub.add_argument("files", metavar="FILE", nargs="+", help="at least two .tflite or .onnx files")
    data_options(sub, required=False)
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--threads", type=int, default=1, help="threads of the interpreter (default 1)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def _compare(options: argparse.Namespace) -> int:
    from dwindle.errors import ConfigError

    if len(options.files) < 2:
        raise ConfigError(f"`compare` got one file, `{options.files[0]}`; it takes at least two")
    if options.threads < 1:
        raise DataError(f"`--threads` is {options.threads}; it must be at least 1")
    from dwindle.data import read_data
    from dwindle.measuring import compare
    from dwindle.reporting import print_comparison

    data = None if options.data is None else read_data(options.data, rescale=rescaling(options.rescale))
    found = [one.to_dict() for one in compare(options.files, data, options.metric, threads=options.threads)]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_comparison(found)
    return MET
