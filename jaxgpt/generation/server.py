"""`run.py serve`: a run's model behind OpenAI's completions API.

POST /v1/completions     text, or with "stream" server-sent events
GET  /v1/models          the one model
GET  /health             whether texts can be drawn; needs no key

Texts of all requests are drawn side by side in the slots of one cache, as they become free. The event loop only reads
and writes; a thread draws (`worker.py`). Needs the extra `serve` (starlette and uvicorn).
"""

import asyncio
import collections
import contextlib
import hmac
import json
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.generation import api
from jaxgpt.generation.api import ApiError, Completion
from jaxgpt.generation.worker import Event, Worker

LARGEST_BODY = 1 << 20
LOOK_SECONDS = 0.5  # between looks whether a client that waits for its whole answer is still there


@dataclass(frozen=True)
class Options:
    """How the server behaves."""

    name: str
    """The model's."""
    vocabulary_size: int
    limits: api.Limits
    waiting: int
    """Texts that may be asked for and not have ended."""
    per_minute: int
    """Requests of one client in a minute; 0 for no limit."""
    key: str
    """What clients must send; empty for none."""
    loopback: bool
    """Whether the server listens on this machine alone: then names of other machines in Host are refused, with which a
    page in a browser could reach it."""


class Rate:
    """Counts requests of the last minute, by client."""

    def __init__(self, per_minute: int):
        self._per_minute = per_minute
        self._times: dict[str, collections.deque[float]] = {}

    def check(self, client: str, now: float) -> None:
        """ApiError for one too many."""
        if not self._per_minute:
            return
        self._times = {name: times for name, times in self._times.items() if times[-1] > now - 60}
        times = self._times.setdefault(client, collections.deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self._per_minute:
            wait = math.ceil(times[0] + 60 - now)
            raise ApiError(
                429, f"more than {self._per_minute} requests in a minute: wait {wait} seconds", code=f"{wait}"
            )
        times.append(now)


class Server:
    """The handlers of the routes."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, options: Options):
        self._worker, self._tokenizer, self._options = worker, tokenizer, options
        self._rate = Rate(options.per_minute)
        self._started = int(time.time())

    def app(self) -> Starlette:
        hosts = ["localhost", "127.0.0.1", "[::1]", "::1"] if self._options.loopback else ["*"]
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
            exception_handlers={ApiError: _error, HTTPException: _http_error, Exception: _failure},  # type: ignore[dict-item]
        )

    async def health(self, request: Request) -> Response:
        failed = self._worker.failed
        return JSONResponse(
            {"status": "failed" if failed else "ok", "texts": self._worker.waiting}, status_code=503 if failed else 200
        )

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        model = {"id": self._options.name, "object": "model", "created": self._started, "owned_by": "jaxgpt"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self._options.name:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return JSONResponse(model)

    async def completions(self, request: Request) -> Response:
        self._check_key(request)
        self._rate.check(request.client.host if request.client else "", time.monotonic())
        options = self._options
        body = await _json(request)
        asked = api.completion(body, options.name, self._tokenizer, options.vocabulary_size, options.limits)
        if self._worker.failed:
            raise ApiError(500, "the model failed; the server's log says why")
        if self._worker.waiting + len(asked.requests) > options.waiting:
            raise ApiError(429, "too many texts are waiting: try again later", code="1")
        answer = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": options.name,
        }
        if asked.stream:
            events = self._stream(asked, answer)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(await self._whole(asked, answer, request))

    def _check_key(self, request: Request) -> None:
        if not self._options.key:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._options.key.encode()):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def _events(self, asked: Completion, request: Request | None = None) -> AsyncGenerator[tuple[int, Event]]:
        """Pieces of all texts as they come, until all have ended; with `request`, until its client has left."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def listener(number: int):
            return lambda event: loop.call_soon_threadsafe(events.put_nowait, (number, event))

        jobs = {number: self._worker.ask(one, listener(number)) for number, one in enumerate(asked.requests)}
        self._worker.waiting += len(jobs)
        try:
            while jobs:
                try:
                    number, event = await asyncio.wait_for(events.get(), LOOK_SECONDS if request else None)
                except TimeoutError:
                    if request and await request.is_disconnected():
                        return
                    continue
                if event.ended == "failed":
                    raise ApiError(500, "the model failed; the server's log says why")
                if event.ended:
                    del jobs[number]
                    self._worker.waiting -= 1
                yield number, event
        finally:
            self._worker.waiting -= len(jobs)
            for job in jobs.values():
                self._worker.cancel(job)

    async def _whole(self, asked: Completion, answer: dict[str, Any], request: Request) -> dict[str, Any]:
        said, tokens, ends = list(asked.prompts), [0] * len(asked.requests), [""] * len(asked.requests)
        async with contextlib.aclosing(self._events(asked, request)) as events:
            async for number, event in events:
                said[number] += event.piece
                tokens[number], ends[number] = event.tokens, event.ended
        choices = [_choice(number, text, end) for number, (text, end) in enumerate(zip(said, ends, strict=True))]
        return answer | {"choices": choices, "usage": _usage(asked, sum(tokens))}

    async def _stream(self, asked: Completion, answer: dict[str, Any]) -> AsyncIterator[str]:
        tokens = [0] * len(asked.requests)
        for number, prompt in enumerate(asked.prompts):
            if prompt:
                yield _data(answer | {"choices": [_choice(number, prompt, "")]})
        try:
            async with contextlib.aclosing(self._events(asked)) as events:
                async for number, event in events:
                    tokens[number] = event.tokens
                    if event.piece or event.ended:
                        yield _data(answer | {"choices": [_choice(number, event.piece, event.ended)]})
        except ApiError as error:  # the answer has begun, so its status can't say so
            yield _data(error.body())
            return
        if asked.include_usage:
            yield _data(answer | {"choices": [], "usage": _usage(asked, sum(tokens))})
        yield "data: [DONE]\n\n"


async def _json(request: Request) -> Any:
    """The body. ApiError where it is none, or too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(413, f"the body is longer than {LARGEST_BODY} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None


def _choice(number: int, text: str, ended: str) -> dict[str, Any]:
    return {"text": text, "index": number, "logprobs": None, "finish_reason": ended or None}


def _usage(asked: Completion, tokens: int) -> dict[str, int]:
    total = asked.prompt_tokens + tokens
    return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _error(request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": error.code or "1"} if error.status == 429 else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return await _error(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _failure(request: Request, error: Exception) -> Response:
    return await _error(request, ApiError(500, "the server failed; its log says why"))
