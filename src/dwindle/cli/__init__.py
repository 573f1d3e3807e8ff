"""The command ``dwindle``: one thin function a subcommand, over the same functions that the library offers."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from dwindle import __version__
from dwindle.cli import blame, compress, convert, measure, pack, report
from dwindle.cli.common import BAD_INPUT, INTERRUPTED
from dwindle.errors import DwindleError


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dwindle",
        description="Make a trained neural network small and fast, and prove it on the file that ships.",
        epilog="Exit status: 0 done and goals met, 2 bad input, 3 goals not met, 130 interrupted (--resume goes on).",
    )
    parser.add_argument("--version", action="version", version=f"dwindle {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compress.add(commands)
    compress.add_plan(commands)
    convert.add(commands)
    measure.add(commands)
    measure.add_compare(commands)
    blame.add(commands)
    blame.add_sensitivity(commands)
    measure.add_inspect(commands)
    report.add(commands)
    pack.add(commands)
    compress.add_demo(commands)
    return parser
