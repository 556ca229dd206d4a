"""The server's connections: whatever is sent to them is answered in OpenAI's form, in time, and nobody else waits."""

import asyncio
import contextlib
import json
import logging
import select
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxgpt.generation import api
from jaxgpt.generation.batching import ContinuousBatch
from jaxgpt.generation.worker import Worker
from tests.generation.servers import BYTES, KEY, NAME, POST, connections, gate, in_form, listening, post, send, server


class Repeating:
    """A decoder of one text, whose every token is an a."""

    def __init__(self):
        self._free = True

    def free(self):
        return [0] if self._free else []

    def start(self, *arguments):
        self._free = False
        return ord("a")

    def go_on(self, most):
        return {0: [ord("a")]}

    def stop(self, slot):
        self._free = True


@pytest.fixture(scope="module")
def worker():
    worker = Worker(ContinuousBatch(Repeating(), BYTES))  # type: ignore[arg-type]
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def address(worker):
    with listening(worker) as address:
        yield address


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[" * 1000, 400, "the body is not JSON: more than 64 arrays or objects"),
        (b"[]", 400, "the body must be a JSON object"),
        (b"{}", 400, "model is missing"),
        (b'{"model": "tiny"}', 400, "it is empty, and the tokenizer bytes has no end-of-text token"),
        (b'{"model": "\\ud800"}', 404, "there is no model '\\ud800'"),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400, "unknown parameter '\\ud800'"),
        (b'{"model": "tiny", "prompt": "a", "prompt": "b"}', 400, "the key 'prompt' is there twice"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "a number of 5,000 digits"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half a surrogate pair"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature is nan"),
        (b'{"prompt": [' + b"[]," * 300_000, 400, "the body has more than 1512 values"),
        (b'{"prompt": [' + b'"a",' * 200_000, 400, "the body has more than 1512 values"),
        (b'{"prompt": [' + b"-1.5e3," * 100_000, 400, "the body has more than 1512 values"),
        (b'{"prompt": "' + b'\\"' * 500_000, 400, "the body is not JSON"),  # a string without an end
        (b" " * (server.LARGEST_BODY + 1), 413, "the body is longer than"),
        (b" " * 8 * server.LARGEST_BODY, 413, "the body is longer than"),  # which it is sent to its end
    ],
)
def test_a_body_that_is_no_request(address, body, status, message):
    code, answer = post(address, body)
    assert code == status
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # without Host
        (b"GET /v1/models/ HTTP/1.0\r\n\r\n", 401),
        (b"GET /%1b%00 HTTP/1.0\r\n\r\n", 404),
        (b"GET /v1/completions/ HTTP/1.0\r\n\r\n", 404),
        (b"OPTIONS /health HTTP/1.0\r\n\r\n", 405),
        (
            b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket"
            b"\r\n\r\n",
            405,
        ),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nz\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + 5000 * b"1\r\na\r\n", 413),
        (POST + b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
        (POST + b"Content-Length: 99999999999999999999\r\n\r\n{", 413),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Expect: 100-continue\r\nContent-Length: 10000000\r\n\r\n", 413),
    ],
)
def test_whatever_comes_is_answered_in_form(worker, request_, status):
    with listening(worker, key="" if request_.startswith(POST) else KEY) as address:
        head, _, body = send(address, request_).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    in_form(body)


def test_what_a_page_in_a_browser_could_send_is_refused(address):
    """A page can't send JSON without asking first, and its requests name the host that it was loaded from."""
    body = json.dumps({"model": NAME, "prompt": "a"}).encode()
    assert post(address, body, Content_Type="text/plain")[0] == 415
    status, answer = post(address, body, Host="example.org")
    assert (status, "the Host header is 'example.org'" in answer["error"]["message"]) == (400, True)
    for host, there in [("localhost", True), ("127.0.0.2:80", True), ("[::1]", True), ("localhost.example.org", False)]:
        assert (post(address, body, Host=host)[0] == 200) is there


def test_health_needs_no_key_and_other_paths_are_not_there(address):
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer) == {"status": "ok", "texts": 0}
    status, answer = post(address, b"{}", "/v1/embeddings")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    assert post(address, b"{}", "/health")[0] == 405


def test_head_has_no_body(address):
    head, _, body = send(address, b"HEAD /health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert (head.split()[1], body) == (b"200", b"")


def test_chunks_and_several_requests_on_one_connection(worker):
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])) + b"0\r\n\r\n"
    first = POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    with listening(worker, key="") as address:
        answers = send(address, 2 * first + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 OK") == 3


def test_slow_clients_are_not_waited_for(worker, monkeypatch):
    """Twenty that send a byte now and then, of a header or of a body."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.5)
    begun = POST + b"Content-Length: 1000\r\n\r\n"

    def slow(first: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(first)
            with contextlib.suppress(ConnectionError):  # closed between the look and the byte
                while not select.select([connection], [], [], 0.1)[0]:
                    connection.sendall(b"a")
            return connection.recv(1 << 16)

    with listening(worker, key="") as address, ThreadPoolExecutor(20) as pool:
        port = int(address.rpartition(":")[2])
        started = time.monotonic()
        answers = list(pool.map(slow, 10 * [b"GET /", begun]))
        assert time.monotonic() - started < 10  # one after another would take 10
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    for answer in answers:
        in_form(answer.partition(b"\r\n\r\n")[2])


def test_a_client_that_leaves_within_its_request_is_nothing_to_log(worker, caplog):
    with listening(worker, key="") as address:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        assert post(address, json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode())[0] == 200
    assert not caplog.records


def test_connections_that_are_too_many_are_told_so(worker):
    with listening(worker, most=2) as address:
        port = int(address.rpartition(":")[2])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        time.sleep(0.2)
        status, answer = post(address, b"{}")
        assert (status, answer["error"]["message"]) == (503, "too many connections: try again later")
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert answer.status == 200
        for connection in held:
            connection.close()
        time.sleep(0.2)
        assert post(address, b"{}")[0] == 400


def test_health_is_answered_while_a_request_is_read(worker, monkeypatch):
    """The request may take long: here it takes until health has been answered."""
    answered = threading.Event()

    def slow(body, *arguments):
        assert answered.wait(60)
        raise api.ApiError(400, "read to its end")

    monkeypatch.setattr(api, "completion", slow)
    with listening(worker, key="") as address, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, address, b"{}")
        time.sleep(0.1)
        with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
            assert answer.status == 200
        assert not asked.done()
        answered.set()
        assert asked.result()[1]["error"]["message"] == "read to its end"


def test_wrong_keys_are_limited_in_rate(worker):
    with listening(worker, wrong_keys=2) as address:
        body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode()
        answers = [post(address, body, Authorization=f"Bearer {key}")[0] for key in (KEY, "b", "é", "c", KEY)]
    assert answers == [200, 401, 401, 429, 429]


def test_a_minute_later_a_client_may_ask_again():
    rate = gate.Rate(2, "requests")
    for now in (0.0, 30.0):
        rate.count("a", now)
    for client, now, passes in (("a", 59.0, False), ("b", 59.0, True), ("a", 61.0, True), ("a", 62.0, False)):
        with contextlib.nullcontext() if passes else pytest.raises(api.ApiError, match="more than 2 requests"):
            rate.check(client, now)
            rate.count(client, now)


def test_one_network_of_ipv6_is_one_client():
    assert gate.client_name("2001:db8::1") == gate.client_name("2001:db8::2:3") != gate.client_name("2001:db9::1")
    assert gate.client_name("192.0.2.1") != gate.client_name("192.0.2.2")


def test_what_has_begun_is_ended_when_its_time_is_over(worker, monkeypatch):
    """The stream says so in its last event, and a whole answer by its status."""
    monkeypatch.setattr(worker, "ask", lambda request, listener: None)  # never drawn
    with ThreadPoolExecutor(2) as pool, listening(worker, key="") as address:
        body = {"model": NAME, "prompt": "a"}
        whole = pool.submit(post, address, json.dumps(body).encode())
        streamed = json.dumps(body | {"stream": True}).encode()
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(streamed)
        stream = pool.submit(send, address, head + streamed)
        while worker.waiting < 2:
            time.sleep(0.01)
        monkeypatch.setattr(connections, "LAST_SECONDS", 0.1)
    assert whole.result()[0] == 503
    assert b'data: {"error": {"message": "the server is ending"' in stream.result()
    assert worker.waiting == 0


def test_what_clients_send_is_written_out_in_the_log(capsys):
    before = {
        name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in ("uvicorn", "asyncio")
    }
    try:
        connections.log_to_stderr()
        logging.getLogger("uvicorn.error").error("a client sent %s", "\x1b[31mred")
        logging.getLogger("uvicorn.error").error("cancelled", exc_info=asyncio.CancelledError())
        logging.getLogger("asyncio").warning("a warning")
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
    assert capsys.readouterr().err == "ERROR: a client sent \\x1b[31mred\n"
