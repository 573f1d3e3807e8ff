"""``dwindle pack`` and ``dwindle unpack``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dwindle.cli.common import MET, check_free, progress


def add(commands: Any) -> None:
    """Add ``pack`` and ``unpack``."""
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


def _pack(options: argparse.Namespace) -> int:
    from dwindle.packing import pack

    check_free(options, ".dwz")
    found = pack(options.file, options.out, progress=progress("bytes"))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(f"{found.file}: {found.packed_bytes:,} bytes, {found.times_smaller:.2f} times smaller than "
              f"{options.file} ({found.model_bytes:,} bytes); restored and compared")  # fmt: skip
    return MET


def _unpack(options: argparse.Namespace) -> int:
    from dwindle.packing import unpack

    check_free(options, ".tflite")
    found = unpack(options.file, options.out, progress=progress("bytes"))
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(f"{found.file}: {found.model_bytes:,} bytes, sha256 {found.model_sha256}")
    return MET
