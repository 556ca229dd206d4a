"""`run.py report --live`: a small server on this machine alone, which the page asks for news."""

import contextlib
import http.server
import json
import socket
import sys
import threading
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import Any

from jaxgpt.errors import JaxgptError, UserError
from jaxgpt.foreign_text import printable
from jaxgpt.reports import page
from jaxgpt.reports.history import History

HOST = "127.0.0.1"  # this machine alone, since the server has no authentication


class Runs:
    """Runs that a page shows. Of metrics.jsonl only what is new is read again."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        self._histories = [History(folder / "metrics.jsonl") for folder in folders]
        self._lock = threading.Lock()

    def version(self) -> str:
        """Returns a text that changes whenever a file that is shown changes."""
        names = ("metrics.jsonl", "samples.txt", "config.toml", "memory_plan.json")
        paths = [folder / name for folder in self.folders for name in names]
        found = [path.stat() for path in paths if path.exists()]
        return "-".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in found)

    def read(self) -> list[dict[str, Any]]:
        """Returns all that the page shows. UserError for damaged files."""
        with self._lock:
            return [
                page.of_run(folder, history.read_all())
                for folder, history in zip(self.folders, self._histories, strict=True)
            ]


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, runs: Runs, port: int):
        self.runs = runs
        super().__init__((HOST, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a client that has gone away, and prints the traceback of anything else."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout: float = 30  # seconds for a request to arrive and to be answered

    def handle(self) -> None:
        """Answers the connection's request; after `timeout` cuts off even a client that sends a byte now and then."""
        timer = threading.Timer(self.timeout, self._cut_off)
        timer.daemon = True
        timer.start()
        try:
            super().handle()
        finally:
            timer.cancel()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answers with the page, or its data, or 204 where the page has the newest data already."""
        # DNS rebinding: a foreign page may point its own name to this machine, and would then read what is here.
        if self.headers.get("Host", "") not in (
            f"{HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            return self._answer(HTTPStatus.FORBIDDEN, b"this server answers to its own address only\n", "text/plain")
        try:
            parts = urllib.parse.urlsplit(self.path)
            if parts.path == "/":
                return self._answer(HTTPStatus.OK, page.render(self.server.runs.read(), live=True), "text/html")
            if parts.path == "/data.json":
                return self._data(urllib.parse.parse_qs(parts.query).get("version", [""])[0])
        except (JaxgptError, OSError) as error:
            text = printable(f"{error}\n").encode("utf-8", "backslashreplace")
            return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, text, "text/plain")
        except ValueError:  # an address that isn't one
            return self._answer(HTTPStatus.BAD_REQUEST, b"the address is not one\n", "text/plain")
        return self._answer(HTTPStatus.NOT_FOUND, b"there is nothing here but /\n", "text/plain")

    def do_HEAD(self) -> None:
        """Answers as GET does, without the body."""
        self.do_GET()

    def _data(self, known: str) -> None:
        version = self.server.runs.version()
        if version == known:
            return self._answer(HTTPStatus.NO_CONTENT, b"", "")
        data = json.dumps({"version": version, "runs": self.server.runs.read()}, allow_nan=False, default=str)
        return self._answer(HTTPStatus.OK, data.encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Prints nothing: a page that asks every two seconds would fill the terminal."""


def listen(folders: list[Path], port: int) -> Server:
    """Returns a server that listens already. UserError where it can't."""
    try:
        return Server(Runs(folders), port)
    except OSError as error:
        raise UserError(
            f"--port {port}: can't listen there ({error.strerror}). Another port may be free; 0 takes one that is"
        ) from None
