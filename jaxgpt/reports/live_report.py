"""The report of a run that goes on: written beside metrics.jsonl with the trackers' files, or served on this machine.

The report is written by a thread of its own, at evaluations and by the clock, and once more at the end. The thread
shares Python's lock with the training loop, so it takes at most a two-hundredth of the time: after a piece of work it
sleeps 200 times as long as that took in seconds of processor. An error here never ends a run; it is reported once.
"""

import contextlib
import http.server
import json
import os
import platform
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jax
import psutil

from jaxgpt import writing
from jaxgpt.errors import JaxgptError, UserError, reason
from jaxgpt.foreign_text import printable
from jaxgpt.models import family
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes
from jaxgpt.reports import page, trackers
from jaxgpt.reports.history import History
from jaxgpt.runs import verdict
from jaxgpt.runs.folder import RunFolder

REPORT = "report.html"
SECONDS = 30.0  # between reports by the clock, at least
SHARE = 1 / 200  # of the time that the thread may take
HOST = "127.0.0.1"  # this machine alone, since the server has no authentication


class Following:
    """Writes a run's report and its trackers' files while it trains. A context manager around the run.

    In a process that isn't the first it does nothing. `say` shows a line to the user.
    """

    def __init__(self, folder: RunFolder, config: Config, say: Callable[[str], None]):
        self.folder, self.config, self.say = folder, config, say
        self._ended, self._wake = False, threading.Event()
        self._thread: threading.Thread | None = None
        self._trackers: list[trackers.Tracker] = []
        self._report = Report(folder.path)

    def __enter__(self) -> "Following":
        if not processes.first():
            return self
        try:
            self.folder.write_json(page.MACHINE, machine(self.config))
        except Exception as error:  # metrics.jsonl will fail at the same
            self.say(f"{page.MACHINE}: {error}")
        self._trackers = trackers.start(self.config, self.folder.path)
        if self.config.run.report:
            self._thread = threading.Thread(target=self._work, name="report", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for tracker in self._trackers:
            self._carefully(tracker, tracker.close)
        if self._thread:
            self._ended = True
            self._wake.set()
            self._thread.join()
            self._report.write("finished" if error is None else f"stopped: {error or type(error).__name__}")
            if self._report.problem:
                self.say(f"{REPORT}: not written ({self._report.problem})")
            elif error is None:
                self.say(f"report           {self.folder.path / REPORT}")

    def observe(self, values: dict[str, Any]) -> None:
        """Hands the values of a line of metrics.jsonl to the trackers; at an evaluation, wakes the report's thread."""
        for tracker in list(self._trackers):
            self._carefully(tracker, lambda tracker=tracker: tracker.write(values))
        if "learning_rate" not in values:  # an evaluation
            self._wake.set()

    def _carefully(self, tracker: trackers.Tracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # another project's code, and often a network: training goes on without it
            self.say(f"{tracker.name}: {error or type(error).__name__}; nothing more is written there")
            self._trackers = [other for other in self._trackers if other is not tracker]

    def _work(self) -> None:
        """Runs the thread: reads what is new and writes the report, and sleeps after each for as long as it owes."""
        while not self._ended:
            self._wake.clear()
            while self._owe(self._report.read) and not self._ended:
                pass
            if not self._ended:
                self._owe(lambda: self._report.write("training", read=False))
            self._wake.wait(SECONDS)

    def _owe(self, work: Callable[[], Any]) -> Any:
        before, result = time.thread_time(), work()
        until = time.monotonic() + (time.thread_time() - before) / SHARE
        while not self._ended and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))  # so that the end of the run need not wait for the end of this
        return result


class Report:
    """A run's report.html. Its methods raise nothing: `problem` says why the page could not be written."""

    def __init__(self, folder: Path):
        self.folder, self.problem = folder, ""
        self._history = History(folder / "metrics.jsonl")

    def read(self) -> bool:
        """Reads a piece of what is new; returns whether there may be more."""
        try:
            return self._history.update()
        except Exception as error:
            self.problem = reason(error)
            return False

    def write(self, state: str, *, read: bool = True) -> None:
        """Replaces the page, so that nobody reads half of it; before that, with `read`, reads all that is new."""
        try:
            if read:
                self._history.read_all()
            written = page.render([page.of_run(self.folder, self._history, state)])
            with writing.replacing(self.folder / REPORT) as new:
                new.write_bytes(written)
            self.problem = ""
        except Exception as error:
            self.problem = reason(error)


def machine(config: Config) -> dict[str, Any]:
    """Returns what machine.json says: where a run trains, and what only its process knows.

    It has no names of hosts or people.
    """
    devices = jax.devices()
    try:
        memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    except Exception:  # of many types: where there is no /proc, or half of one
        memory = "unknown"
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})",
        "processes": processes.count(),
        "processors": f"{os.cpu_count()} × {platform.processor() or platform.machine()}",
        "memory": memory,
        "system": platform.platform(),
        "command": " ".join(Path(word).name if index == 0 else word for index, word in enumerate(sys.argv)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "parameters": family(config.model).parameter_count(config.model),
    }


class Runs:
    """Runs that a page shows. Of metrics.jsonl only what is new is read again."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        self._histories = [History(folder / "metrics.jsonl") for folder in folders]
        self._lock = threading.Lock()

    def version(self) -> str:
        """Returns a text that changes whenever a file that is shown changes."""
        names = ("metrics.jsonl", "samples.txt", "config.toml", "memory_plan.json", verdict.NAME)
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

    do_HEAD = do_GET  # answered without the body

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
