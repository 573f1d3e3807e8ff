"""``dwindle convert``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dwindle.cli.common import (
    MET,
    check_exists,
    data_options,
    fitted,
    load_source,
    progress,
    rescaling,
    source_options,
    start_keras,
)
from dwindle.errors import ConfigError, check_choice

SCHEME_NAMES = ("float32", "float16", "int8", "int8-dynamic", "int8-weights", "int16x8", "int4", "int4-dynamic",
                "int2-dynamic", "pow2-8")  # fmt: skip
# Options of `convert` that `quantize` carries out, where one of them is not as here.
UNREFINED = {"clipping": "none", "rounding": "nearest", "equalize": False, "correct_bias": False, "budget": None,
             "max_drop": None}  # fmt: skip
SUFFIXES = (".tflite", ".onnx", ".keras")
FOLDER_SCHEMES = ("float32", "float16", "float8-e4m3", "float8-e5m2")


def add(commands: Any) -> None:
    """Add ``convert``."""
    sub = commands.add_parser("convert", help="write a model as a verified .tflite, .onnx or SavedModel folder")
    sub.set_defaults(run=_convert)
    sub.add_argument("model", metavar="MODEL", help=".keras, .h5, .tflite, .onnx, .pt2 or a SavedModel folder")
    sub.add_argument("out", metavar="OUT", help="the .tflite, .onnx, .keras or folder (no suffix) to write")
    sub.add_argument(
        "--target", choices=["litert", "micro"], default="litert",
        help="what runs it; micro: OUT is a folder of C++ sources with the model, tried in TensorFlow Lite Micro",
    )  # fmt: skip
    sub.add_argument(
        "--decode", action="store_true",
        help="with --target micro: clustered and pruned weights in fewer bytes, which the device expands",
    )  # fmt: skip
    sub.add_argument(
        "--scheme", help=f"{', '.join(SCHEME_NAMES)} (default float32); in a folder {', '.join(FOLDER_SCHEMES)}"
    )
    sub.add_argument(
        "--layer", metavar="PATTERN=SCHEME", action="append", default=[],
        help="another scheme for the layers or operators that match, such as 'conv_3=int16x8'; repeatable",
    )  # fmt: skip
    data_options(sub, required=False)
    sub.add_argument(
        "--io-type", default="float32", help="inputs and outputs of an integer file: float32, int8, uint8 or int16"
    )
    sub.add_argument("--calibration", default="min-max", help="ranges: min-max, percentile, mse or entropy")
    sub.add_argument("--clipping", default="none", help="grids of weights: none, or mse (the least squared error)")
    sub.add_argument("--rounding", default="nearest", help="of weights: nearest, adaround or gptq (need --data)")
    sub.add_argument("--equalize", action="store_true", help="bring the ranges of consecutive layers together first")
    sub.add_argument("--correct-bias", action="store_true", help="let biases take up the shift that rounding makes")
    sub.add_argument("--budget", metavar="SIZE", help="fewer bits where they cost least, until the file is this small")
    sub.add_argument("--max-drop", metavar="DROP", help="fewer bits where they cost least, while it loses at most this")
    source_options(sub)
    sub.add_argument(
        "--output-layout", default="NHWC", choices=["NHWC", "NCHW"],
        help="order of the axes of images that an .onnx takes and gives (default NHWC, as the model has them)",
    )  # fmt: skip
    sub.add_argument("--sparse", action="store_true", help="store weights with many zeros in the sparse encoding")
    sub.add_argument("--compact", action="store_true", help="leave names, signatures and metadata out of a .tflite")
    sub.add_argument("--force", action="store_true", help="write over OUT if it exists")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers, .pt2)")


def _convert(options: argparse.Namespace) -> int:
    from dwindle.files import check_output_file, check_output_folder, names_folder, save_keras

    folder = names_folder(options.out)
    if options.target == "micro":
        return _micro(options, folder=folder)
    if options.decode:
        raise ConfigError("--decode is for microcontrollers; add --target micro")
    out = check_output_folder(options.out) if folder else check_output_file(options.out, suffixes=SUFFIXES)
    if out.exists() and not options.force:
        raise ConfigError(f"`{out}` exists; write over it with --force, or name another")
    if options.output_layout != "NHWC" and out.suffix.lower() != ".onnx":
        raise ConfigError(f"--output-layout is for .onnx files, and OUT is `{out}`; leave it out")
    factor = rescaling(options.rescale)
    scheme = _scheme(options, folder=folder)
    start_keras()
    refined = {name: getattr(options, name) for name in UNREFINED}
    model: Any = Path(options.model)
    if out.suffix.lower() == ".onnx" and model.suffix.lower() == ".tflite" and scheme is None and refined == UNREFINED:
        check_exists(options.model)
        return _written(options, model, None, _data_as_it_is(options, factor))
    model = load_source(options.model, options)
    if out.suffix.lower() == ".keras":
        if scheme is not None and not (isinstance(scheme, str) and scheme == "float32"):
            raise ConfigError(f"`--scheme` is {options.scheme}, and a .keras file is float; name a .tflite")
        print(f"{save_keras(model, out)}: {out.stat().st_size:,} bytes")
        return MET
    data = fitted(options, model, factor)
    if refined != UNREFINED:
        if folder:
            raise ConfigError("--clipping, --rounding, --equalize, --correct-bias, --budget and --max-drop are for "
                              "integers, and a SavedModel folder holds floats; name a .tflite")  # fmt: skip
        from dwindle.quantization import quantize

        model = quantize(
            model, scheme or "float32", data, calibration=options.calibration, progress=progress("steps"), **refined
        )
        scheme = None
    return _written(options, model, scheme, data)


def _data_as_it_is(options: argparse.Namespace, factor: float) -> Any:
    """Return the data of ``--data`` for a file that is not loaded; None where there is none."""
    from dwindle.data import read_data

    return None if options.data is None else read_data(options.data, rescale=factor)


def _written(options: argparse.Namespace, model: Any, scheme: Any, data: Any) -> int:
    """Export a model and say what was written."""
    from dwindle.exporting import export

    artefact = export(
        model, options.out, scheme=scheme, data=data, io_type=options.io_type, calibration=options.calibration,
        sparse=options.sparse, compact=options.compact, layout=options.output_layout,
    )  # fmt: skip
    found = artefact.verification
    if options.json:
        told = {"file": str(artefact.path), "scheme": artefact.scheme, "size_bytes": artefact.size_bytes,
                "sha256": artefact.sha256, "verification": found.to_dict(), "notes": artefact.notes,
                "float_error": artefact.float_error}  # fmt: skip
        print(json.dumps(told, indent=2))
        return MET
    print(f"{artefact.path}: {artefact.size_bytes:,} bytes, {artefact.scheme}")
    print(
        f"verified on {found.samples} samples against {found.reference}: {found.within:.2%} within the bound "
        f"({found.bound}), largest difference {found.max_abs_error:.3g}"
    )
    if artefact.float_error is not None:
        print(f"largest difference from the model before rounding: {artefact.float_error:.3g}")
    for note in artefact.notes:
        print(f"note: {note}")
    return MET


def _micro(options: argparse.Namespace, *, folder: bool) -> int:
    """Write the sources for a microcontroller."""
    refined = [name for name, usual in UNREFINED.items() if getattr(options, name) != usual]
    other = {"--sparse": options.sparse, "--compact": options.compact,
             "--io-type": options.io_type != "float32", "--layer": bool(options.layer),
             "--output-layout": options.output_layout != "NHWC"}  # fmt: skip
    wrong = [*(f"--{name.replace('_', '-')}" for name in refined), *(name for name, given in other.items() if given)]
    if wrong:
        raise ConfigError(f"{wrong[0]} does not go with --target micro; quantize to a .tflite first, and convert that")
    if not folder:
        raise ConfigError(f"OUT is `{options.out}`, and --target micro writes a folder; name one, without a suffix")
    if options.scheme is not None:
        check_choice("--scheme", options.scheme, ("int8", "int16x8", "float32"))
    factor = rescaling(options.rescale)
    check_exists(options.model)
    start_keras()
    from dwindle.micro import export_micro
    from dwindle.micro.exporting import check_folder

    if check_folder(options.out).exists() and any(Path(options.out).iterdir()) and not options.force:
        raise ConfigError(f"`{options.out}` exists; write over it with --force, or name another")
    model: Any = Path(options.model)
    if model.suffix.lower() == ".tflite" and options.scheme is None:
        data = _data_as_it_is(options, factor)
    else:
        model = load_source(options.model, options)
        data = fitted(options, model, factor)
    made = export_micro(model, options.out, data=data, scheme=options.scheme, decode=options.decode)
    if options.json:
        print(json.dumps(made.to_dict(), indent=2, default=str))
        return MET
    print(f"{made.folder}: a model of {made.size_bytes:,} bytes ({made.plain_bytes:,} before), main.cc, CMake, Arduino")
    print(f"arena of {made.arena_bytes:,} bytes, operators {', '.join(made.operators)}")
    for one in made.agreements:
        print(f"TensorFlow Lite Micro against {one}")
    for note in made.notes:
        print(f"note: {note}")
    return MET


def _scheme(options: argparse.Namespace, *, folder: bool) -> Any:
    """Return the scheme that the options stand for, checked before a framework is imported."""
    from dwindle.quantization.schemes import IO_TYPES, resolve_scheme

    def check(name: str, argument: str) -> None:
        if not folder:
            resolve_scheme(name, argument)
        elif name in SCHEME_NAMES and name not in FOLDER_SCHEMES:
            raise ConfigError(f"`{argument}` is {name!r}, and a SavedModel folder holds floats; name a .tflite as OUT")
        else:
            check_choice(argument, name, FOLDER_SCHEMES)

    check_choice("--io-type", options.io_type, IO_TYPES)
    if options.scheme is not None:
        check(options.scheme, "--scheme")
    if not options.layer:
        return options.scheme
    mapping = {"*": options.scheme or "float32"}
    for given in options.layer:
        pattern, separator, name = given.rpartition("=")
        if not separator or not pattern:
            raise ConfigError(f"`--layer` is {given!r}; it must be PATTERN=SCHEME, such as conv_3=int16x8")
        check(name, "--layer")
        mapping[pattern] = name
    return mapping
