"""The server, as OpenAI's own client and a plain one see it."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from jaxgpt.config import Compute, Model, Sampling
from jaxgpt.data import tokenizers
from jaxgpt.generation import api, rates, texts
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.texts import Batch
from jaxgpt.generation.worker import Job, Worker
from jaxgpt.models import gpt2

MISSING = "not installed: the extra test has it"
openai = pytest.importorskip("openai", reason=f"openai is {MISSING}")
pytest.importorskip("uvicorn", reason=f"uvicorn is {MISSING}")
connections = pytest.importorskip("jaxgpt.generation.connections", reason=f"h11 is {MISSING}")
server = pytest.importorskip("jaxgpt.generation.server", reason=f"starlette is {MISSING}")

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MODEL = Model(layers=1, heads=2, width=16, context=64, vocabulary_size=256)
BYTES = tokenizers.make("bytes", "")
KEY = "a key"
NAME = "tiny"


@pytest.fixture(scope="module")
def params():
    """Its texts are ASCII for the most part, since only the first tokens' embeddings are large."""
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(0)))
    token = params.embedding.token.at[128:].multiply(0.1)
    return params._replace(embedding=params.embedding._replace(token=token))


@pytest.fixture(scope="module")
def worker(params):
    worker = Worker(Batch(Decoder(params, MODEL, Compute(), slots=3, capacity=64), BYTES))
    yield worker
    worker.stop()


@contextlib.contextmanager
def listening(worker, most=100, **options):
    """The address of a server of that worker's texts."""
    defaults = {"name": NAME, "vocabulary_size": 256, "limits": api.Limits(64, 60, 8), "waiting": 8, "per_minute": 0}
    chosen = server.Options(**defaults | {"key": KEY, "loopback": True} | options)
    answering = server.Server(worker, BYTES, chosen)
    running = connections.Listener(answering.app(), most, answering.end)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(worker):
    with listening(worker) as address:
        yield address


def openai_client(address: str, key: str = KEY):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def client(address):
    with openai_client(address) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client):
    """A function that asks for a text, and returns it."""

    def ask(prompt="The ", **options):
        options = {"max_tokens": 20, "seed": 1} | options
        return client.completions.create(model=NAME, prompt=prompt, **options).choices[0].text

    return ask


def test_the_text_is_the_models(params, complete):
    """What the same settings draw without a server."""
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}):
        request = texts.Request(BYTES.encode("The "), Sampling(tokens=40, **options), 1)
        expected = "".join(piece.text for piece in texts.generate(params, [request], MODEL, Compute(), BYTES))
        assert complete(max_tokens=40, **options) == expected


def test_the_answer_has_what_openais_has(client):
    answer = client.completions.create(model=NAME, prompt="abc", max_tokens=5)
    assert (answer.object, answer.model, len(answer.choices)) == ("text_completion", NAME, 1)
    assert answer.id.startswith("cmpl-")
    assert abs(answer.created - time.time()) < 600
    assert (answer.choices[0].index, answer.choices[0].finish_reason, answer.choices[0].logprobs) == (0, "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)


def test_a_stream_joined_is_the_text(client, complete):
    chunks = list(
        client.completions.create(
            model=NAME, prompt="The ", max_tokens=20, seed=1, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == complete()
    assert len(pieces) > 1
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert usage.choices == []
    assert usage.usage.total_tokens == 24


def test_requests_at_once_have_the_same_texts_as_alone(complete):
    """More than there are slots, of other lengths and settings."""
    asked = [{"prompt": "ab" * (n + 1), "seed": n, "max_tokens": 5 + 7 * n, "temperature": 0.3 * n} for n in range(6)]
    alone = [complete(**options) for options in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda options: complete(**options), asked)) == alone


def test_several_prompts_and_samples(client, complete):
    """In the order of the prompts, each with its n samples, of following seeds."""
    answer = client.completions.create(model=NAME, prompt=["one", "two"], n=2, max_tokens=9, seed=4)
    expected = [complete(prompt, seed=seed, max_tokens=9) for prompt in ("one", "two") for seed in (4, 5)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 36


def test_prompts_as_tokens(client, complete):
    assert complete(list(b"The ")) == complete("The ")
    answer = client.completions.create(model=NAME, prompt=[[65], [66, 67]], max_tokens=4, seed=0)
    assert [choice.text for choice in answer.choices] == [complete(p, max_tokens=4, seed=0) for p in ("A", "BC")]


def test_echo(client, complete):
    assert complete(extra_body={"echo": True}) == "The " + complete()
    chunks = client.completions.create(model=NAME, prompt="The ", max_tokens=20, seed=1, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The " + complete()
    assert complete(max_tokens=0, extra_body={"echo": True}) == "The "


def test_stop_texts(client, complete):
    text = complete(max_tokens=40)
    for stop in (text[7:9], [text[20:22], text[12:15]]):
        first = min(text.index(one) for one in ([stop] if isinstance(stop, str) else stop))
        answer = client.completions.create(model=NAME, prompt="The ", max_tokens=40, seed=1, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[:first], "stop")
        chunks = client.completions.create(model=NAME, prompt="The ", max_tokens=40, seed=1, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[:first]


def test_more_settings_than_openais(complete):
    assert complete(extra_body={"top_k": 1}) == complete(temperature=0)
    assert complete(extra_body={"min_p": 1.0}) == complete(temperature=0)
    assert complete(top_p=0) == complete(temperature=0)
    assert complete(extra_body={"repetition_penalty": 50.0}, temperature=0) != complete(temperature=0)


def test_without_a_seed_texts_differ(client):
    one, other = (client.completions.create(model=NAME, prompt="a", max_tokens=30, temperature=2) for _ in range(2))
    assert one.choices[0].text != other.choices[0].text


def test_seeds_have_64_bits(complete):
    """Each another text; -1 is as none."""
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -2]
    assert len({complete(seed=seed, temperature=2) for seed in seeds}) == len(seeds)
    assert complete(seed=-(2**63)) == complete(seed=-(2**63))
    assert complete(seed=-1, temperature=2) != complete(seed=-1, temperature=2)
    assert complete(extra_body={"seed": None}, temperature=2) != complete(extra_body={"seed": None}, temperature=2)


def test_settings_at_their_ends(complete):
    for options in ({"temperature": 1e-40}, {"temperature": 1, "top_p": 1e-300}):
        assert complete(**options) == complete(temperature=0)


def test_as_many_of_the_best_as_there_are_texts_is_all_of_them(client, complete):
    answer = client.completions.create(model=NAME, prompt="The ", n=2, best_of=2, seed=1, max_tokens=20)
    assert answer.choices[0].text == complete()


def test_special_tokens_and_empty_prompts():
    """GPT-2's tokenizer, as the model is asked for a text."""
    gpt2_tokens = tokenizers.make("gpt2", "")
    end = gpt2_tokens.end_of_text

    def asked(**body):
        found = api.completion({"model": NAME} | body, NAME, gpt2_tokens, 50257, api.Limits(64, 60, 8))
        return [request.prompt.tolist() for request in found.requests]

    assert asked(prompt="a<|endoftext|>b", allow_special=True) == [[64, end, 65]]
    assert end not in asked(prompt="a<|endoftext|>b")[0]
    for empty in ("", [""], None, [[]]):
        assert asked(prompt=empty) == [[end]]
    assert asked() == [[end]]
    assert asked(prompt=["", "a"], echo=True) == [[end], [64]]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "jaxgpt"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-7'"):
        client.models.retrieve("gpt-7")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "temperature is 3, and must be from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot', which is of the wrong type"),
        ({"top_p": -1}, "top_p", "top_p is -1, and must be from 0 to 1"),
        ({"max_tokens": 61}, "max_tokens", "max_tokens is 61, and must be from 0 to 60"),
        ({"max_tokens": True}, "max_tokens", "wrong type"),
        ({"max_tokens": 1.5}, "max_tokens", "wrong type"),
        ({"n": 0}, "n", "n is 0, and must be from 1 to 8"),
        ({"n": 3, "prompt": ["a", "b", "c"]}, "n", "3 texts for each of 3 prompts are more than 8 at once"),
        ({"prompt": ["a"] * 9}, "prompt", "1 texts for each of 9 prompts are more than 8 at once"),
        ({"seed": 2**63}, "seed", "must be from -9223372036854775808 to 9223372036854775807"),
        ({"stop": ["a"] * 1000}, "stop", "stop must be a text, or up to 4 texts"),
        ({"stop": list("abcde")}, "stop", "stop must be a text, or up to 4 texts"),
        ({"stop": ""}, "stop", "stop must be a text"),
        ({"prompt": ""}, "prompt", "it is empty, and the tokenizer bytes has no end-of-text token"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": [256]}, "prompt", "lists of tokens from 0 to 255"),
        ({"prompt": ["a", 3]}, "prompt", "prompt must be text, a list of texts"),
        (
            {"prompt": "a" * 60},
            "prompt",
            "the prompt's 60 characters are too many: the model's context leaves 59 tokens",
        ),
        ({"prompt": [1] * 60}, "prompt", "the prompt's 60 tokens are too many: the model's context leaves 59 tokens"),
        ({"logprobs": 2}, "logprobs", "logprobs is not offered"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "logit_bias is not offered"),
        ({"suffix": "end"}, "suffix", "suffix is not offered"),
        ({"best_of": 2}, "best_of", "best_of is not offered"),
        ({"best_of": True}, "best_of", "best_of is not offered"),
        ({"extra_body": {"stream": 1}}, "stream", "stream is 1, which is of the wrong type"),
        ({"extra_body": {"stream_options": {"include_usage": 1}}}, "include_usage", "wrong type"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not offered"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown parameter 'temprature'; did you mean temperature?"),
        ({"extra_body": {"\x1b[31m": 1}}, "\\x1b[31m", "unknown parameter '\\x1b[31m'."),
    ],
)
def test_what_cannot_be_done_is_refused(client, options, param, message):
    options = {"prompt": "a", "max_tokens": 5} | options
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=NAME, **options)
    assert raised.value.param == param
    assert message in raised.value.message
    assert raised.value.type == "invalid_request_error"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="gpt-7", prompt="a")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_without_the_key_there_is_no_answer(address):
    with openai_client(address, "another key") as client:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            client.completions.create(model=NAME, prompt="a")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


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


def test_what_a_page_in_a_browser_could_send_is_refused(address):
    """Without asking first it can send no JSON, and by a name of its own it comes with that name."""
    body = json.dumps({"model": NAME, "prompt": "a"}).encode()
    assert post(address, body, Content_Type="text/plain")[0] == 415
    status, answer = post(address, body, Host="example.org")
    assert (status, "the Host header is 'example.org'" in answer["error"]["message"]) == (400, True)
    for host, there in [("localhost", True), ("127.0.0.2:80", True), ("[::1]", True), ("localhost.example.org", False)]:
        assert (post(address, body, Host=host)[0] == 200) is there


def send(address: str, text: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to some bytes, up to the end of the connection; `pause` seconds after each byte."""
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60) as connection:
        for part in [text] if not pause else [bytes([byte]) for byte in text]:
            connection.sendall(part)
            time.sleep(pause)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


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
        (POST + b"Expect: 100-continue\r\nContent-Length: 10000000\r\n\r\n", 413),
    ],
)
def test_whatever_comes_is_answered_in_form(worker, request_, status):
    with listening(worker, key="" if request_.startswith(POST) else KEY) as address:
        head, _, body = send(address, request_).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    in_form(body)


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
            for _ in range(4):
                time.sleep(0.1)
                connection.sendall(b"a")
            return connection.recv(1 << 16)

    with listening(worker, key="") as address, ThreadPoolExecutor(20) as pool:
        port = int(address.rpartition(":")[2])
        started = time.monotonic()
        answers = list(pool.map(slow, 10 * [b"GET /", begun]))
        assert time.monotonic() - started < 5
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
    """However long that takes: here until health has been answered."""
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


def test_health_needs_no_key_and_other_paths_are_not_there(address):
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer) == {"status": "ok", "texts": 0}
    status, answer = post(address, b"{}", "/v1/chat/completions")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    assert post(address, b"{}", "/health")[0] == 405


def test_the_rate_is_limited(worker):
    with listening(worker, per_minute=2) as address, openai_client(address) as client:
        for _ in range(2):
            client.completions.create(model=NAME, prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError, match="more than 2 requests in a minute") as raised:
            client.completions.create(model=NAME, prompt="a", max_tokens=1)
        assert 0 < int(raised.value.response.headers["Retry-After"]) <= 60
        client.models.list()


def test_a_minute_later_a_client_may_ask_again():
    rate = rates.Rate(2, "requests")
    for now in (0.0, 30.0):
        rate.count("a", now)
    for client, now, passes in (("a", 59.0, False), ("b", 59.0, True), ("a", 61.0, True), ("a", 62.0, False)):
        with contextlib.nullcontext() if passes else pytest.raises(api.ApiError, match="more than 2 requests"):
            rate.check(client, now)
            rate.count(client, now)


def test_one_network_of_ipv6_is_one_client():
    assert rates.client_name("2001:db8::1") == rates.client_name("2001:db8::2:3") != rates.client_name("2001:db9::1")
    assert rates.client_name("192.0.2.1") != rates.client_name("192.0.2.2")


def test_too_many_waiting_texts_are_refused(worker):
    with listening(worker, waiting=2) as address, openai_client(address) as client:
        with pytest.raises(openai.RateLimitError, match="too many texts are waiting"):
            client.completions.create(model=NAME, prompt="a", n=3)
        assert client.completions.create(model=NAME, prompt="a", n=2, max_tokens=1).usage.completion_tokens == 2


def test_a_client_that_leaves_frees_its_slots(address, client, worker):
    stream = client.completions.create(model=NAME, prompt="a", n=8, max_tokens=60, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 60
    while worker.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.waiting == 0
    assert client.completions.create(model=NAME, prompt="a", max_tokens=1).usage.completion_tokens == 1


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


def test_what_has_begun_is_ended_when_its_time_is_over(worker, monkeypatch):
    """The stream says so in its last event, and a whole answer by its status."""
    monkeypatch.setattr(worker, "ask", lambda request, listener: Job(request, listener))  # never drawn
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


def test_a_model_that_fails_is_said_to(capsys):
    class Failing:
        def free(self):
            raise MemoryError("no room")

    worker = Worker(Batch(Failing(), BYTES))  # type: ignore[arg-type]
    with listening(worker, key="") as address, openai_client(address) as client:
        for _ in range(2):  # the one that it happens to, and one that comes afterwards
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                client.completions.create(model=NAME, prompt="a")
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"{address}/health")
        raised.value.close()
        assert raised.value.code == 503
    worker.stop()
    assert "MemoryError: no room" in capsys.readouterr().err
