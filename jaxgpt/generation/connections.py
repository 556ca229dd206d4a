"""Connections of the server: uvicorn's, with limits on time and number, and errors in OpenAI's form.

A client has `HEADER_SECONDS` to send a request's head and `BODY_SECONDS` for its body, however few bytes at a time it
sends, and may stop reading its answer for `STALLED_SECONDS`. Beyond the largest number of connections, further ones
are answered with status 503.
"""

import asyncio
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import printable
from jaxgpt.generation import api

HEADER_SECONDS = 10
BODY_SECONDS = 30
STALLED_SECONDS = 30
CLOSING_SECONDS = 5  # for the last bytes of an answer to be taken
LAST_SECONDS = 30  # in which requests must end once the server is told to
LARGEST_HEAD = 1 << 14
LONGEST_QUEUE = 1024  # connections that the system keeps until they are accepted
SMALL_PIECE, MOST_SMALL_PIECES = 64, 1024  # bytes of a body's chunk, and how many chunks may have fewer
SPARE_FILES = 12  # left for whatever else the process opens
CROWD = 8  # connections beyond the limit that are still told so in an answer
AT_ONCE = 2  # connections that are accepted in one turn of the event loop
ON_THE_WAY = 4 * (AT_ONCE + 1)  # until one that is too many is closed, the loop has made four turns


class Requests(h11.Connection):
    """The requests of a connection. Long heads are errors, and so are bodies in very many small chunks.

    Such bodies would take seconds to parse.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, LARGEST_HEAD)
        self._small_pieces = 0

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE and len(received := self.trailing_data[0]) > LARGEST_HEAD:
            ends = re.search(rb"\n\r?\n", received[:LARGEST_HEAD])
            if not ends:  # h11 raises the same, but only of a head that has not come whole
                raise h11.RemoteProtocolError("long head", error_status_hint=431)
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._small_pieces = 0
        elif isinstance(event, h11.Data) and len(event.data) < SMALL_PIECE:
            self._small_pieces += 1
            if self._small_pieces > MOST_SMALL_PIECES:
                raise h11.RemoteProtocolError("small chunks", error_status_hint=413)
        return event


class Connection(H11Protocol):
    """A client's connection. `config.limit_concurrency` is the largest number of them."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.conn = Requests()
        self._most, self.limit_concurrency = self.limit_concurrency or sys.maxsize, None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._awaited = ""  # what the client has to send: "header", "body", or nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = self.app_state | {"crowded": len(self.connections) > self._most}
        if len(self.connections) > self._most + CROWD:
            self._refuse(503, "too many connections: try again later")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Sets a timer where the client has to send something else than before; more of the same doesn't renew it."""
        awaited = {h11.IDLE: "header", h11.SEND_BODY: "body"}.get(self.conn.their_state, "")
        if self.transport.is_closing():
            awaited = ""
            self._set("closing", CLOSING_SECONDS, self.transport.abort)
        if awaited != self._awaited:
            self._awaited = awaited
            self._unset("awaited")
            if awaited:
                self._set("awaited", HEADER_SECONDS if awaited == "header" else BODY_SECONDS, self._late)

    def _late(self) -> None:
        if self._awaited == "header" and not self.conn.trailing_data[0]:  # nothing that could be answered
            self._close()
        else:
            seconds = HEADER_SECONDS if self._awaited == "header" else BODY_SECONDS
            self._refuse(408, f"the request's {self._awaited} took more than {seconds} seconds")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set("stalled", STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unset("stalled")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch()

    def _should_upgrade(self) -> bool:
        return False

    def send_400_response(self, msg: str) -> None:
        """Answers what isn't HTTP; called while h11's error is handled."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        match status:
            case 431:
                message = f"the request's header is longer than {LARGEST_HEAD} bytes"
            case 413:
                message = f"the body has more than {MOST_SMALL_PIECES} chunks of less than {SMALL_PIECE} bytes"
            case 501:
                message = "the body's Transfer-Encoding is not offered: it may be chunked"
            case _:
                message = "the request is not HTTP/1.1 as RFC 9112 has it"
        self._refuse(status, message)

    def _refuse(self, status: int, message: str) -> None:
        """Answers with an error, where no answer has begun, and closes."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = api.rendered(api.ApiError(status, message).body())
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            headers.append((b"connection", b"close"))
            reason = HTTPStatus(status).phrase.encode()
            answer = (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=body))
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in answer))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._watch()

    def _set(self, name: str, seconds: float, call: Callable[[], object]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, call)

    def _unset(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


class Listener(uvicorn.Server):
    """Listens until it is told to end. What has begun then has `LAST_SECONDS`; after them `end` is called."""

    def __init__(self, app: Any, connections: int, end: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                limit_concurrency=connections,
                backlog=AT_ONCE,
                timeout_graceful_shutdown=LAST_SECONDS + CLOSING_SECONDS,
                proxy_headers=False,
                server_header=False,
            )
        )
        self._end = end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:  # the event loop goes on to accept a few of them at once
            listening.listen(LONGEST_QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(LAST_SECONDS, self._end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


class _Log(logging.StreamHandler):
    """Logs in printable text, since clients' text may be in it, and nothing of tasks that ended with the server."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def log_to_stderr() -> None:
    """Logs errors of uvicorn and asyncio to stderr. Warnings, which are of clients' mistakes, are left out."""
    handler = _Log()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.ERROR)


def most_connections(asked: int) -> int:
    """Returns how many connections the process can have at once: `asked`, or what its limit of open files leaves.

    UserError where it leaves none.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return asked
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return asked
    left = files - _open_files() - SPARE_FILES - CROWD - ON_THE_WAY
    if left < 1:
        raise UserError(f"the limit of open files is {files}, which leaves none for connections: raise it by ulimit -n")
    return min(asked, left)


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 32
