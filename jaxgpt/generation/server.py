"""`run.py serve`: the models of one or several runs behind OpenAI's API, and a page to talk to them.

POST /v1/chat/completions    the next message of a conversation, or with "stream" server-sent events
POST /v1/completions         text, likewise
GET  /v1/models              the models; a request names the one that it is for
GET  /health                 whether texts can be drawn; needs no key
GET  /                       the page; needs no key itself, and asks for one

Texts of all requests are drawn side by side in the slots of their model's cache, as they become free. The event loop
only reads and writes; one thread makes tokens of what is asked for (`api.py`, `chat_api.py`), another of each model
draws (`worker.py`). Needs the extra `serve` (starlette, uvicorn and llguidance).
"""

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxgpt.data.chat_templates import Template
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.generation import api, page
from jaxgpt.generation.api import ApiError, Asked
from jaxgpt.generation.chat_api import chat_completion
from jaxgpt.generation.choosing import Whole, best
from jaxgpt.generation.gate import Gate, Rate, client_name
from jaxgpt.generation.worker import Drawing, Worker

LARGEST_BODY = 1 << 20
SHORT_BODY = 1 << 14


class Hosted(NamedTuple):
    """A model of the server: what draws its texts, and how requests become prompts."""

    worker: Worker
    served: api.Served
    template: Template


@dataclass(frozen=True)
class Options:
    """Options of the server."""

    waiting: int  # texts that may be asked for and not have ended
    per_minute: int  # requests of one client; 0 for no limit
    key: str  # clients must send it; empty for none
    loopback: bool  # the server listens on this machine alone: names of other machines in Host are refused
    wrong_keys: int = 20  # of one client in a minute; 0 for no limit


class Server:
    """The handlers of the routes."""

    def __init__(self, hosted: Sequence[Hosted], options: Options):
        self._hosted, self._options = {model.served.name: model for model in hosted}, options
        self._first = hosted[0]
        self._largest = max((model.served.limits for model in hosted), key=lambda limits: limits.texts * limits.context)
        self._rate, self._wrong_keys = Rate(options.per_minute, "requests"), Rate(options.wrong_keys, "wrong API keys")
        # Long requests may take a while to become tokens, in which health is answered, and short ones are read.
        self._short, self._long = ThreadPoolExecutor(1, "short requests"), ThreadPoolExecutor(1, "long requests")
        self._started = int(time.time())

    def app(self) -> Gate:
        app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/", self.page),
            ],
            exception_handlers=HANDLERS,
        )
        app.router.redirect_slashes = False
        return Gate(app, self._options.loopback, error_response)

    def end(self) -> None:
        """Ends the texts that are being drawn, and tells the clients that wait for them."""
        for model in self._hosted.values():
            for drawing in model.worker.drawings:
                drawing.fail(ApiError(503, "the server is ending"))

    async def health(self, request: Request) -> Response:
        failed = any(model.worker.failed for model in self._hosted.values())
        said, status = ("failed", 503) if failed else ("ok", 200)
        return _Json({"status": said, "texts": self._waiting()}, status_code=status)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        about = {"object": "model", "created": self._started, "owned_by": "jaxgpt"}
        name = request.path_params.get("name")
        if name is None:
            return _Json({"object": "list", "data": [{"id": name} | about for name in self._hosted]})
        if name not in self._hosted:
            raise ApiError(404, f"there is no model {quoted(name)}", param="model", code="model_not_found")
        return _Json({"id": name} | about)

    async def page(self, request: Request) -> Response:
        return Response(page.content(), media_type="text/html", headers=page.headers())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, lambda body, model: api.completion(body, model.served))

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, lambda body, model: chat_completion(body, model.served, model.template))

    def _waiting(self) -> int:
        """Returns the number of texts that were asked for and have not ended."""
        return sum(model.worker.waiting for model in self._hosted.values())

    def _read(self, body: bytes, read: Callable[[Any, Hosted], Asked]) -> tuple[Hosted, Asked]:
        """Returns the model that a body is for, and what it asks. ApiError where there is none, or it can't answer."""
        value = api.read(body, self._largest)
        name = value.get("model") if isinstance(value, dict) else None
        model = self._hosted.get(name, self._first) if isinstance(name, str) else self._first
        return model, read(value, model)

    async def _answer(self, request: Request, read: Callable[[Any, Hosted], Asked]) -> Response:
        self._check_key(request)
        client, now = _client(request), time.monotonic()
        self._rate.check(client, now)
        self._rate.count(client, now)
        body = await _body(request)
        executor = self._short if len(body) <= SHORT_BODY else self._long
        model, asked = await asyncio.get_running_loop().run_in_executor(executor, self._read, body, read)
        if model.worker.failed:
            raise ApiError(500, "the model failed; the server's log says why")
        if self._waiting() + len(asked.requests) > self._options.waiting:
            message = "too many texts are waiting: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=1)
        answers = asked.answers
        answer = {"id": f"{answers.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        answer["model"] = model.served.name
        answer["object"] = answers.chunk_kind if asked.stream else answers.whole_kind
        drawing = Drawing(model.worker, asked.requests)
        if asked.stream:
            return _Events(drawing, _stream(drawing, asked, answer))
        with drawing:
            return _Json(await _whole(drawing, asked, answer, request))

    def _check_key(self, request: Request) -> None:
        if not self._options.key:
            return
        client, now = _client(request), time.monotonic()
        self._wrong_keys.check(client, now)
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(_digest(key.strip()), _digest(self._options.key)):
            return
        if key:
            self._wrong_keys.count(client, now)
        raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


async def _whole(drawing: Drawing, asked: Asked, answer: dict[str, Any], request: Request) -> dict[str, Any]:
    texts = [Whole() for _ in asked.requests]
    async for number, event in drawing.events(request.is_disconnected):
        texts[number].add(event.piece, event.tokens, event.ended, event.scored)
    chosen = [
        text
        for start in range(0, len(texts), asked.best_of)
        for text in best(texts[start : start + asked.best_of], asked.n)
    ]
    choices = [asked.answers.whole(number, text.text, text.scored, text.ended) for number, text in enumerate(chosen)]
    return answer | {"choices": choices, "usage": _usage(asked, sum(text.tokens for text in texts))}


async def _stream(drawing: Drawing, asked: Asked, answer: dict[str, Any]) -> AsyncIterator[bytes]:
    tokens = [0] * len(asked.requests)
    for number in range(len(asked.requests)):
        if choice := asked.answers.begin(number):
            yield _data(answer | {"choices": [choice]})
    try:
        async for number, event in drawing.events():
            tokens[number] = event.tokens
            if choice := asked.answers.piece(number, event.piece, event.scored, event.ended):
                yield _data(answer | {"choices": [choice]})
    except ApiError as error:  # the answer has begun, so its status can't say so
        yield _data(error.body())
        return
    if asked.include_usage:
        yield _data(answer | {"choices": [], "usage": _usage(asked, sum(tokens))})
    yield b"data: [DONE]\n\n"


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return api.rendered(content)


class _Events(StreamingResponse):
    """A stream of a drawing, which ends with it, also where it has not begun."""

    def __init__(self, drawing: Drawing, content: AsyncIterator[bytes]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._drawing = drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._drawing:
            await super().__call__(scope, receive, send)


async def _body(request: Request) -> bytes:
    """Returns the body. ApiError where it is no JSON, or too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "the body must be sent as it is, without Content-Encoding")
    too_large = ApiError(413, f"the body is longer than {LARGEST_BODY} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 20 or int(length) > LARGEST_BODY):
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise too_large
    return bytes(body)


def _client(request: Request) -> str:
    return client_name(request.client.host) if request.client else ""


def _digest(key: str) -> bytes:
    """Returns bytes of one length for keys of any, so that comparing tells nothing of the length either."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _usage(asked: Asked, tokens: int) -> dict[str, int]:
    total = asked.prompt_tokens + tokens
    return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + api.rendered(value) + b"\n\n"


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an error as an answer."""
    more = dict(headers or {})
    if error.retry_after:
        more["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return _Json(error.body(), status_code=error.status, headers=more)


async def _failure(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return error_response(error)
        case ClientDisconnect():
            return Response()  # which nobody receives
        case HTTPException():
            message = f"{request.method} {shown(request.scope['path'])}: {error.detail}"
            return error_response(ApiError(error.status_code, message), error.headers)
    return error_response(ApiError(500, "the server failed; its log says why"))


HANDLERS: Any = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), _failure)
