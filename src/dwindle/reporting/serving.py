"""A running search in the browser: one folder's report, on this machine only, which refreshes itself."""

from __future__ import annotations

import hashlib
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, DwindleError
from dwindle.reporting.page import render_html
from dwindle.reporting.state import read_state, stamp

HOST = "127.0.0.1"
PORT = 8421


def report_server(folder: str | Path, port: int = PORT) -> ThreadingHTTPServer:
    """Return a server of one folder's report on 127.0.0.1; ``serve_forever`` runs it.

    It answers ``/`` with the page, ``/report.json`` with the facts and ``/state`` with a mark that changes with them.
    There is nothing else: no path of a request is ever one of a file.

    Args:
        folder: The out folder of `compress`.
        port: Where to listen; 0: any free port.

    Raises:
        ConfigError: If the port is not valid or taken.
        DataError: If the folder has neither a report nor trials.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"`port` is {port}; it must lie between 0 and 65535")
    read_state(folder)
    handler = type("_FolderHandler", (_Handler,), {"folder": Path(folder).resolve()})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise ConfigError(
            f"`port` {port} can't be had: {error.strerror or error}; choose another, or 0 for any"
        ) from None
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    server_version = "dwindle"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer without the content."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        # A page of another site must not read this one under a name of its own that leads here.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "only for this machine\n", body)
            return
        try:
            status, kind, text = self._content(self.path.partition("?")[0])
        except DwindleError as error:
            status, kind, text = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n"
        self._send(status, kind, text, body)

    def _content(self, path: str) -> tuple[HTTPStatus, str, str]:
        if path in ("/", "/report.html"):
            mark = self._mark()  # before the state is read: what changes in between is shown once more, never missed
            return HTTPStatus.OK, "text/html", render_html(read_state(self.folder), live=mark)
        if path == "/report.json":
            return HTTPStatus.OK, "application/json", json.dumps(read_state(self.folder))
        if path == "/state":
            return HTTPStatus.OK, "text/plain", self._mark()
        return HTTPStatus.NOT_FOUND, "text/plain", "there is only the report, at /\n"

    def _mark(self) -> str:
        return hashlib.sha256(stamp(self.folder).encode("utf8")).hexdigest()

    def _send(self, status: HTTPStatus, kind: str, text: str, body: bool) -> None:
        content = text.encode("utf8")
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a page that asks every few seconds would fill the screen."""
