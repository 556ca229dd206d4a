"""The gate of the server's application: what is done with every request before and after it is answered.

It refuses names of other machines in Host, by which a page in a browser could reach a server of this machine alone, and
requests beyond the number of connections. Where an answer comes before a request's body has been read, the rest
of the body is read first: a connection that is closed on a client that still sends takes the answer with it. What a
client may do in a minute (`Rate`) is for the handlers to ask.
"""

import asyncio
import collections
import ipaddress
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxgpt.foreign_text import quoted
from jaxgpt.generation.api import ApiError

DROPPED_SECONDS = 5
DROPPED_BYTES = 1 << 24
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?", re.IGNORECASE)

Answer = Callable[[ApiError], ASGIApp]


class Gate:
    """Wraps an application of a server that listens on this machine alone (`loopback`) or not."""

    def __init__(self, app: ASGIApp, loopback: bool, answer: Answer):
        self._app, self._loopback, self._answer = app, loopback, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(scope, receive, send)
        error = self._refusal(scope)
        await (self._answer(error) if error else self._app)(scope, body.receive, body.send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        host = _header(scope, b"host")
        if self._loopback and host is not None and not is_this_machine(host):  # HTTP/1.0 needs none; browsers send it
            return ApiError(400, f"the Host header is {quoted(host)}: call the server localhost, or by its address")
        if scope.get("state", {}).get("crowded") and scope["path"] != "/health":
            return ApiError(503, "too many connections: try again later", retry_after=1)
        return None


def is_this_machine(host: str) -> bool:
    """Returns whether a Host header names localhost or an address of the loopback interface."""
    found = _HOST.fullmatch(host)
    if not found:
        return False
    name = (found[1] or found[2]).lower()
    return name == "localhost" or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Returns whether an address is one of this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class _Body:
    """A request's body on its way in, and its answer on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]):
        self._receive, self._send = receive, send
        self._crowded = bool(scope.get("state", {}).get("crowded"))
        # Such a client hasn't begun to send, and waits to be asked for it.
        self._waits = (_header(scope, b"expect") or "").lower() == "100-continue"
        self._endless = int(_header(scope, b"content-length") or 0) > DROPPED_BYTES
        self._more = True

    async def receive(self) -> Message:
        message = await self._receive()
        self._waits = False
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            whole = await self._drop_rest()
            if self._crowded or not whole:
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        await self._send(message)

    async def _drop_rest(self) -> bool:
        """Reads what is left of the body. False where that is too much, or takes too long."""
        left = 0 if self._endless else DROPPED_BYTES
        try:
            async with asyncio.timeout(DROPPED_SECONDS):
                while self._more and not self._waits and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            return False
        return not self._more


class Rate:
    """Counts what clients have done in the last minute: `what`, in the plural, and at most so often; 0 for no limit."""

    def __init__(self, most: int, what: str):
        self._most, self._what = most, what
        self._times: dict[str, collections.deque[float]] = {}
        self._next_cleaning = 0.0

    def check(self, client: str, now: float) -> None:
        """Raises an ApiError where the client has to wait."""
        times = self._times.get(client)
        while times and times[0] <= now - 60:
            times.popleft()
        if self._most and times and len(times) >= self._most:
            wait = max(1, math.ceil(times[0] + 60 - now))
            message = f"more than {self._most} {self._what} in a minute: wait {wait} seconds"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)

    def count(self, client: str, now: float) -> None:
        """Notes that the client has done it once more."""
        if not self._most:
            return
        if now >= self._next_cleaning:
            self._times = {name: times for name, times in self._times.items() if times and times[-1] > now - 60}
            self._next_cleaning = now + 1
        self._times.setdefault(client, collections.deque(maxlen=self._most)).append(now)


def client_name(address: str) -> str:
    """Returns what an address is counted as: itself, or of IPv6 the network of 64 bits, which one machine may have."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip.packed[:8] + bytes(8), 64))) if ip.version == 6 else address
