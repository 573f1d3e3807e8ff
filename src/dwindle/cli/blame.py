"""``dwindle blame`` and ``dwindle sensitivity``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dwindle.cli.common import MET, check_exists, data_options, progress, rescaling, start_keras
from dwindle.errors import DataError


def add(commands: Any) -> None:
    """Add ``blame``."""
    sub = commands.add_parser("blame", help="find out which operator of a quantized file costs how much accuracy")
    sub.set_defaults(run=_blame)
    sub.add_argument("float_file", metavar="FLOAT", help="the float .tflite")
    sub.add_argument("quantized_file", metavar="QUANTIZED", help="the .tflite quantized from it")
    data_options(sub, required=True)
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--samples", type=int, default=1000, help="at most this many samples (default 1000)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("--plot", metavar="FILE", help="write a picture, an .svg")


def _blame(options: argparse.Namespace) -> int:
    from dwindle.data import read_data
    from dwindle.files import check_output_file, write_text
    from dwindle.reporting import blame_svg, print_blame

    if options.samples < 1:
        raise DataError(f"`--samples` is {options.samples}; it must be at least 1")
    for name in (options.float_file, options.quantized_file):
        check_exists(name)
    plot = None if options.plot is None else check_output_file(options.plot, suffixes=(".svg",))
    data = read_data(options.data, rescale=rescaling(options.rescale))
    from dwindle.blaming import blame

    found = blame(
        options.float_file, options.quantized_file, data, metric=options.metric, samples=options.samples,
        progress=progress("operators"),
    ).to_dict()  # fmt: skip
    if plot is not None:
        write_text(plot, blame_svg(found))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_blame(found)
    return MET


def add_sensitivity(commands: Any) -> None:
    """Add ``sensitivity``."""
    sub = commands.add_parser("sensitivity", help="find out what pruning each layer by itself costs")
    sub.set_defaults(run=_sensitivity)
    sub.add_argument("model", metavar="MODEL", help=".keras, .h5, .tflite or a SavedModel folder")
    data_options(sub, required=True)
    sub.add_argument("--sparsity", type=float, action="append", help="a fraction to remove; repeatable")
    sub.add_argument("--structure", default="element", help="element (default), channel, a pattern such as 2:4")
    sub.add_argument("--criterion", default=None, help="what goes first (default magnitude; of channels l2)")
    sub.add_argument("--layers", action="append", metavar="PATTERN", help="only layers that match; repeatable")
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--samples", type=int, default=1000, help="at most this many samples (default 1000)")
    sub.add_argument("--cache", default=".dwindle-cache", metavar="DIR", help="where figures are kept (%(default)s)")
    sub.add_argument("--no-cache", action="store_true", help="keep nothing, and measure all anew")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("--plot", metavar="FILE", help="write a picture, an .svg")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers)")


def _sensitivity(options: argparse.Namespace) -> int:
    from dwindle.data import read_data
    from dwindle.files import check_output_file, write_text
    from dwindle.reporting import print_sensitivity, sensitivity_svg

    check_exists(options.model)
    plot = None if options.plot is None else check_output_file(options.plot, suffixes=(".svg",))
    data = read_data(options.data, rescale=rescaling(options.rescale))
    start_keras()
    from dwindle.layer_sensitivity import sensitivity
    from dwindle.loading import load

    found = sensitivity(
        load(options.model, trust=options.trust), data, sparsities=options.sparsity, structure=options.structure,
        criterion=options.criterion, layers=options.layers, metric=options.metric, samples=options.samples,
        cache=None if options.no_cache else options.cache, progress=progress("figures"),
    ).to_dict()  # fmt: skip
    if plot is not None:
        write_text(plot, sensitivity_svg(found))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_sensitivity(found)
    return MET
