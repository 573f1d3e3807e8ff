"""The command ``dwindle``: one thin function a subcommand, over the same functions that the library offers."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dwindle import __version__
from dwindle.errors import DataError, DwindleError

MET, BAD_INPUT, NOT_MET, INTERRUPTED = 0, 2, 3, 130
SCHEME_NAMES = ("float32", "float16", "int8", "int8-dynamic", "int8-weights", "int16x8", "int4", "int4-dynamic",
                "int2-dynamic", "pow2-8")  # fmt: skip
# Options of `convert` that `quantize` carries out, where one of them is not as here.
UNREFINED = {"clipping": "none", "rounding": "nearest", "equalize": False, "correct_bias": False, "budget": None,
             "max_drop": None}  # fmt: skip
FOLDER_SCHEMES = ("float32", "float16", "float8-e4m3", "float8-e5m2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status.

    0: done, goals met. 2: bad input, one line says what. 3: finished, but the goals are not met. 130: interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    _quiet_frameworks()
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except DwindleError as error:
        print(f"dwindle: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        where = f"`{error.filename}`: " if error.filename else ""
        print(f"dwindle: {where}{error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("dwindle: interrupted", file=sys.stderr)
        return INTERRUPTED


def _quiet_frameworks() -> None:
    """Keep TensorFlow's start-up lines off the screen; what the user set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def _start_keras() -> None:
    """Import Keras without the lines that its backend prints as it starts."""
    from dwindle.measuring.litert import quiet_stderr

    with quiet_stderr():
        import keras  # noqa: F401


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dwindle",
        description="Make a trained neural network small and fast, and prove it on the file that ships.",
        epilog="Exit status: 0 done and goals met, 2 bad input, 3 goals not met, 130 interrupted (--resume goes on).",
    )
    parser.add_argument("--version", action="version", version=f"dwindle {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compress(commands)
    _add_convert(commands)
    _add_measure(commands)
    _add_blame(commands)
    _add_sensitivity(commands)
    _add_inspect(commands)
    _add_pack(commands)
    _add_demo(commands)
    return parser


def _add_compress(commands: Any) -> None:
    sub = commands.add_parser("compress", help="find the smallest file that meets goals")
    sub.set_defaults(run=_compress)
    sub.add_argument("model", metavar="MODEL", help=".keras, .h5, .tflite or a SavedModel folder")
    _data_options(sub, required=True)
    sub.add_argument("--max-drop", metavar="DROP", help="largest loss of the metric, such as 0.5%% or 0.005")
    sub.add_argument("--max-size", metavar="SIZE", help="largest file, such as 45KB (1 KB = 1000 bytes)")
    sub.add_argument(
        "--max-latency", metavar="TIME", help="largest median latency, such as 2ms, or 0.5x of the original's"
    )
    sub.add_argument("--max-ram", metavar="SIZE", help="largest RAM while it runs, such as 64KB")
    sub.add_argument("--target", choices=["litert"], default="litert", help="what the file runs on (default litert)")
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--epochs", type=int, default=20, help="epochs of a student's training (default 20)")
    sub.add_argument("--plan", metavar="FILE", help="run the plan in this YAML file instead of the search")
    sub.add_argument("--dry-run", action="store_true", help="check everything and say what would be tried")
    _run_options(sub, "dwindle-out")


def _run_options(sub: argparse.ArgumentParser, out: str) -> None:
    sub.add_argument("--out", metavar="DIR", default=out, help=f"folder for the results (default {out})")
    sub.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    sub.add_argument("--force", action="store_true", help="write over the run in the folder")
    sub.add_argument("--seed", type=int, default=0, help="fixes the result on one machine (default 0)")
    sub.add_argument("--threads", type=int, default=1, help="threads of the latency measurement (default 1)")
    sub.add_argument("--json", action="store_true", help="print report.json to standard output")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers)")


def _data_options(sub: argparse.ArgumentParser, *, required: bool) -> None:
    sub.add_argument(
        "--data", metavar="DATA", required=required,
        help=".npz with x_train, y_train (x_val, y_val, x_test, y_test), a folder of images, or module:function",
    )  # fmt: skip
    sub.add_argument("--rescale", metavar="FACTOR", default="1", help="multiply the inputs, such as 1/255 (default 1)")


def _add_convert(commands: Any) -> None:
    sub = commands.add_parser("convert", help="write a model as a verified .tflite or SavedModel folder")
    sub.set_defaults(run=_convert)
    sub.add_argument("model", metavar="MODEL", help=".keras, .h5, .tflite or a SavedModel folder")
    sub.add_argument("out", metavar="OUT", help="the .tflite, .keras or SavedModel folder (no suffix) to write")
    sub.add_argument(
        "--scheme", help=f"{', '.join(SCHEME_NAMES)} (default float32); in a folder {', '.join(FOLDER_SCHEMES)}"
    )
    sub.add_argument(
        "--layer", metavar="PATTERN=SCHEME", action="append", default=[],
        help="another scheme for the layers or operators that match, such as 'conv_3=int16x8'; repeatable",
    )  # fmt: skip
    _data_options(sub, required=False)
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
    sub.add_argument("--sparse", action="store_true", help="store weights with many zeros in the sparse encoding")
    sub.add_argument("--force", action="store_true", help="write over OUT if it exists")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers)")


def _add_measure(commands: Any) -> None:
    sub = commands.add_parser("measure", help="measure accuracy, bytes, latency and RAM of a .tflite")
    sub.set_defaults(run=_measure)
    sub.add_argument("file", metavar="FILE", help="a .tflite file")
    _data_options(sub, required=False)
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--threads", type=int, default=1, help="threads of the interpreter (default 1)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_blame(commands: Any) -> None:
    sub = commands.add_parser("blame", help="find out which operator of a quantized file costs how much accuracy")
    sub.set_defaults(run=_blame)
    sub.add_argument("float_file", metavar="FLOAT", help="the float .tflite")
    sub.add_argument("quantized_file", metavar="QUANTIZED", help="the .tflite quantized from it")
    _data_options(sub, required=True)
    sub.add_argument("--metric", default="accuracy", help="accuracy or another Keras metric (default accuracy)")
    sub.add_argument("--samples", type=int, default=1000, help="at most this many samples (default 1000)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("--plot", metavar="FILE", help="write a picture, an .svg")


def _add_sensitivity(commands: Any) -> None:
    sub = commands.add_parser("sensitivity", help="find out what pruning each layer by itself costs")
    sub.set_defaults(run=_sensitivity)
    sub.add_argument("model", metavar="MODEL", help=".keras, .h5, .tflite or a SavedModel folder")
    _data_options(sub, required=True)
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


def _add_inspect(commands: Any) -> None:
    sub = commands.add_parser("inspect", help="show the operators or layers of a file")
    sub.set_defaults(run=_inspect)
    sub.add_argument("file", metavar="FILE", help="a .tflite, .keras or .h5 file")
    sub.add_argument("--json", action="store_true", help="print the table as JSON")
    sub.add_argument("--trust", action="store_true", help="let code in the model file run (Lambda layers)")


def _add_pack(commands: Any) -> None:
    for name, run, text, source, out in (
        ("pack", _pack, "make a .tflite as small as it gets without a change", ".tflite", ".dwz"),
        ("unpack", _unpack, "restore the .tflite that was packed, bit for bit", ".dwz", ".tflite"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(run=run)
        sub.add_argument("file", metavar="FILE", help=f"the {source} file")
        sub.add_argument("out", metavar="OUT", help=f"the {out} to write")
        sub.add_argument("--force", action="store_true", help="write over OUT if it exists")
        sub.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_demo(commands: Any) -> None:
    sub = commands.add_parser("demo", help="train LeNet-5 on MNIST digits and compress it, in a few minutes")
    sub.set_defaults(run=_demo)
    sub.add_argument("--epochs", type=int, default=None, help="epochs of the original's training")
    _run_options(sub, "demo-out")


def _say(line: str) -> None:
    """Show progress on standard error: one line that is written over on a terminal, plain lines elsewhere."""
    passing = ": epoch " in line
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    width = shutil.get_terminal_size().columns
    text = line if not passing or len(line) < width else f"{line[: width - 2]}…"
    print(f"\r\033[K{text}", end="" if passing else "\n", file=sys.stderr, flush=True)


def _factor(text: str) -> float:
    from dwindle.errors import ConfigError

    try:
        top, _, bottom = text.partition("/")
        value = float(top) / (float(bottom) if bottom else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"`--rescale` is {text!r}; it must be a number such as 1/255 or 0.0039") from None
    return value


def _compress(options: argparse.Namespace) -> int:
    from dwindle.compressing.goals import Goals
    from dwindle.compressing.plans import read_plan
    from dwindle.compressing.store import check_out_folder

    goals = Goals(
        max_drop=options.max_drop, max_size=options.max_size, max_latency=options.max_latency, max_ram=options.max_ram
    )
    check_out_folder(options.out, resume=options.resume, force=options.force)
    plan = read_plan(options.plan) if options.plan else None
    factor = _factor(options.rescale)
    from dwindle.data import read_data
    from dwindle.loading import load

    _check_exists(options.model)
    data = read_data(options.data, rescale=factor, seed=options.seed)
    _start_keras()
    model = load(options.model, trust=options.trust)
    if options.dry_run:
        return _dry_run(model, goals, plan, options)
    from dwindle.compressing import compress

    result = compress(
        model, goals=goals, out=options.out, data=data, metric=options.metric, epochs=options.epochs,
        seed=options.seed, threads=options.threads, plan=plan, resume=options.resume, force=options.force, say=_say,
        source=str(options.model), command=_command_line(),
    )  # fmt: skip
    return _show(result, options)


def _check_exists(path: str) -> None:
    from dwindle.errors import ConfigError

    if not Path(path).exists():
        raise ConfigError(f"`{path}` does not exist; pass a model file or a SavedModel folder")


def _dry_run(model: Any, goals: Any, plan: Any, options: argparse.Namespace) -> int:
    from dwindle.compressing import candidates

    plans = [plan] if plan else [
        *candidates.after_training(False), *candidates.same_size(options.epochs),
        *(candidates.student(w, options.epochs) for w in candidates.student_widths(model, goals, _say)),
    ]  # fmt: skip
    for number, each in enumerate(plans, start=1):
        print(f"[{number}] {each.name}: {'; '.join(each.words())}")
    return MET


def _command_line() -> str:
    return shlex.join(["dwindle", *sys.argv[1:]])


def _show(result: Any, options: argparse.Namespace) -> int:
    from dwindle.reporting import terminal_summary

    if options.json:
        print(json.dumps(dict(result.report), indent=2))
    else:
        terminal_summary(result.report)
        print(f"report: {Path(options.out) / 'report.html'}")
    if result.interrupted:
        return INTERRUPTED
    return MET if result.met else NOT_MET


def _convert(options: argparse.Namespace) -> int:
    from dwindle.errors import ConfigError
    from dwindle.files import check_output_file, check_output_folder, names_folder, save_keras

    folder = names_folder(options.out)
    out = check_output_folder(options.out) if folder else check_output_file(options.out, suffixes=(".tflite", ".keras"))
    if out.exists() and not options.force:
        raise ConfigError(f"`{out}` exists; write over it with --force, or name another")
    factor = _factor(options.rescale)
    scheme = _scheme(options, folder=folder)
    from dwindle.loading import load

    _start_keras()
    model = load(options.model, trust=options.trust)
    if out.suffix.lower() == ".keras":
        if scheme is not None and not (isinstance(scheme, str) and scheme == "float32"):
            raise ConfigError(f"`--scheme` is {options.scheme}, and a .keras file is float; name a .tflite")
        print(f"{save_keras(model, out)}: {out.stat().st_size:,} bytes")
        return MET
    from dwindle.exporting import export

    data = _fitted(options, model, factor)
    refined = {name: getattr(options, name) for name in UNREFINED}
    if refined != UNREFINED:
        if folder:
            raise ConfigError("--clipping, --rounding, --equalize, --correct-bias, --budget and --max-drop are for "
                              "integers, and a SavedModel folder holds floats; name a .tflite")  # fmt: skip
        from dwindle.quantization import quantize

        model = quantize(
            model, scheme or "float32", data, calibration=options.calibration, progress=_progress("steps"), **refined
        )
        scheme = None
    artefact = export(
        model, options.out, scheme=scheme, data=data, io_type=options.io_type, calibration=options.calibration,
        sparse=options.sparse,
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


def _scheme(options: argparse.Namespace, *, folder: bool) -> Any:
    """Return the scheme that the options stand for, checked before a framework is imported."""
    from dwindle.errors import ConfigError, check_choice
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


def _fitted(options: argparse.Namespace, model: Any, factor: float) -> Any:
    if options.data is None:
        return None
    import keras

    from dwindle.data import fit_to_model, read_data

    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in model.inputs]
    units = model.outputs[0].shape[-1] if len(model.outputs) == 1 and len(model.outputs[0].shape) == 2 else None
    return fit_to_model(read_data(options.data, rescale=factor), shapes, units, input_dtypes=dtypes)


def _measure(options: argparse.Namespace) -> int:
    from dwindle.data import read_data
    from dwindle.measuring import measure
    from dwindle.reporting import format_bytes

    if options.threads < 1:
        raise DataError(f"`--threads` is {options.threads}; it must be at least 1")
    data = None if options.data is None else read_data(options.data, rescale=_factor(options.rescale))
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


def _blame(options: argparse.Namespace) -> int:
    from dwindle.data import read_data
    from dwindle.files import check_output_file, write_text
    from dwindle.reporting import blame_svg, print_blame

    if options.samples < 1:
        raise DataError(f"`--samples` is {options.samples}; it must be at least 1")
    for name in (options.float_file, options.quantized_file):
        _check_exists(name)
    plot = None if options.plot is None else check_output_file(options.plot, suffixes=(".svg",))
    data = read_data(options.data, rescale=_factor(options.rescale))
    from dwindle.blaming import blame

    found = blame(
        options.float_file, options.quantized_file, data, metric=options.metric, samples=options.samples,
        progress=_progress("operators"),
    ).to_dict()  # fmt: skip
    if plot is not None:
        write_text(plot, blame_svg(found))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_blame(found)
    return MET


def _sensitivity(options: argparse.Namespace) -> int:
    from dwindle.data import read_data
    from dwindle.files import check_output_file, write_text
    from dwindle.reporting import print_sensitivity, sensitivity_svg

    _check_exists(options.model)
    plot = None if options.plot is None else check_output_file(options.plot, suffixes=(".svg",))
    data = read_data(options.data, rescale=_factor(options.rescale))
    _start_keras()
    from dwindle.layer_sensitivity import sensitivity
    from dwindle.loading import load

    found = sensitivity(
        load(options.model, trust=options.trust), data, sparsities=options.sparsity, structure=options.structure,
        criterion=options.criterion, layers=options.layers, metric=options.metric, samples=options.samples,
        cache=None if options.no_cache else options.cache, progress=_progress("figures"),
    ).to_dict()  # fmt: skip
    if plot is not None:
        write_text(plot, sensitivity_svg(found))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_sensitivity(found)
    return MET


def _progress(what: str) -> Callable[[int, int], None] | None:
    """Return a function that shows progress on one line of a terminal; None where standard error is none."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, every: int) -> None:
        print(f"\r{what} {done}/{every}", end="\n" if done == every else "", file=sys.stderr, flush=True)

    return show


def _inspect(options: argparse.Namespace) -> int:
    from dwindle.measuring import inspect_file, inspect_model
    from dwindle.reporting import print_inspection

    _check_exists(options.file)
    if Path(options.file).suffix.lower() == ".tflite":
        found = inspect_file(options.file)
    else:
        from dwindle.loading import load

        _start_keras()
        found = inspect_model(load(options.file, trust=options.trust))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        told = found.to_dict()
        print_inspection(told["rows"], {key: value for key, value in told.items() if key != "rows"})
    return MET


def _pack(options: argparse.Namespace) -> int:
    from dwindle.packing import pack

    _check_free(options, ".dwz")
    found = pack(options.file, options.out, progress=_progress("bytes"))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(f"{found.file}: {found.packed_bytes:,} bytes, {found.times_smaller:.2f} times smaller than "
              f"{options.file} ({found.model_bytes:,} bytes); restored and compared")  # fmt: skip
    return MET


def _unpack(options: argparse.Namespace) -> int:
    from dwindle.packing import unpack

    _check_free(options, ".tflite")
    found = unpack(options.file, options.out, progress=_progress("bytes"))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(f"{found.file}: {found.model_bytes:,} bytes, sha256 {found.model_sha256}")
    return MET


def _check_free(options: argparse.Namespace, suffix: str) -> None:
    from dwindle.errors import ConfigError
    from dwindle.files import check_output_file

    out = check_output_file(options.out, suffixes=(suffix,))
    if out.exists() and not options.force:
        raise ConfigError(f"`{out}` exists; write over it with --force, or name another")


def _demo(options: argparse.Namespace) -> int:
    from dwindle.compressing.store import check_out_folder

    check_out_folder(options.out, resume=options.resume, force=options.force)
    _start_keras()
    from dwindle.demo import run_demo

    result = run_demo(
        out=options.out, epochs=options.epochs, seed=options.seed, threads=options.threads, resume=options.resume,
        force=options.force, say=_say, command=_command_line(),
    )  # fmt: skip
    return _show(result, options)


if __name__ == "__main__":
    sys.exit(main())
