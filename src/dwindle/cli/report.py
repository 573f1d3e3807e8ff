"""``dwindle report``."""

from __future__ import annotations

import argparse
from typing import Any

from dwindle.cli.common import MET
from dwindle.errors import ConfigError


def add(commands: Any) -> None:
    """Add ``report``."""
    sub = commands.add_parser("report", help="rebuild a run's report, or show a running search in the browser")
    sub.set_defaults(run=_report)
    sub.add_argument("folder", metavar="DIR", help="the out folder of compress or demo")
    sub.add_argument("--serve", action="store_true", help="serve the report on this machine; it refreshes itself")
    sub.add_argument("--port", type=int, help="port of --serve, 0 for any free one (default 8421)")


def _report(options: argparse.Namespace) -> int:
    from dwindle.reporting import rebuild_report

    if options.port is not None and not options.serve:
        raise ConfigError("`--port` is for --serve; add --serve, or leave it out")
    if options.serve:
        return _serve(options)
    for path in rebuild_report(options.folder):
        print(path)
    return MET


def _serve(options: argparse.Namespace) -> int:
    from dwindle.reporting.serving import HOST, PORT, report_server

    with report_server(options.folder, PORT if options.port is None else options.port) as server:
        print(f"http://{HOST}:{server.server_port}/ shows {options.folder}; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return MET
