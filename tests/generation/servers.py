"""Servers that listen on a free port in the tests' own process, and what plain clients send to them."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import jax
import pytest

from jaxgpt.data import chat_templates, tokenizers
from jaxgpt.generation import api
from jaxgpt.models import gpt2
from jaxgpt.options.config import Model

MISSING = "not installed: the extra test has it"
pytest.importorskip("uvicorn", reason=f"uvicorn is {MISSING}")
connections = pytest.importorskip("jaxgpt.generation.connections", reason=f"h11 is {MISSING}")
gate = pytest.importorskip("jaxgpt.generation.gate", reason=f"starlette is {MISSING}")
server = pytest.importorskip("jaxgpt.generation.server", reason=f"starlette is {MISSING}")

BYTES = tokenizers.make("bytes", "")
KEY = "a key"
NAME = "tiny"
SERVED = api.Served(NAME, BYTES, 256, api.Limits(64, 60, 8))
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def params_of(model: Model) -> gpt2.Params:
    """Random weights whose texts are ASCII for the most part, since only the first tokens' embeddings are large."""
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(model, jax.random.key(0)))
    token = params.embedding.token.at[128:].multiply(0.1)
    return params._replace(embedding=params.embedding._replace(token=token))


@contextlib.contextmanager
def listening(worker, most=100, served=SERVED, beside=(), **options):
    """The address of a server of that worker's texts; `beside` has (worker, served) of further models."""
    chosen = server.Options(**{"waiting": 8, "per_minute": 0, "key": KEY, "loopback": True} | options)
    template = chat_templates.built_in("chatml")
    hosted = [server.Hosted(*one, template) for one in ((worker, served), *beside)]
    answering = server.Server(hosted, chosen)
    running = connections.Listener(answering.app(), most, answering.end)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def post(address: str, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = urllib.request.Request(address + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, in_form(error.read())


def in_form(body: bytes) -> dict:
    """An error as OpenAI's are."""
    answer = json.loads(body)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"].isprintable()
    return answer


def send(address: str, text: bytes, pause: float = 0.0) -> bytes:
    """Returns the server's answer to some bytes, up to the end of the connection; waits `pause` s after each byte."""
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60) as connection:
        for part in [text] if not pause else [bytes([byte]) for byte in text]:
            connection.sendall(part)
            time.sleep(pause)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
