"""The server, as OpenAI's own client sees it."""

import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxgpt.data import tokenizers
from jaxgpt.generation import api, batching
from jaxgpt.generation.batching import ContinuousBatch
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.worker import Worker
from jaxgpt.options.config import Compute, Model, Sampling
from tests.generation.servers import BYTES, KEY, MISSING, NAME, listening, params_of

openai = pytest.importorskip("openai", reason=f"openai is {MISSING}")


MODEL = Model(layers=1, heads=2, width=16, context=64, vocabulary_size=256)


@pytest.fixture(scope="module")
def params():
    return params_of(MODEL)


@pytest.fixture(scope="module")
def worker(params):
    worker = Worker(ContinuousBatch(Decoder(params, MODEL, Compute(), slots=3, capacity=64), BYTES))
    yield worker
    worker.stop()


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
    """The server's text is the one that the same settings draw without a server."""
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}):
        request = batching.Request(BYTES.encode("The "), Sampling(tokens=40, **options), 1)
        expected = "".join(piece.text for piece in batching.generate(params, [request], MODEL, Compute(), BYTES))
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
    """The requests are more than the slots, and differ in length and settings."""
    asked = [{"prompt": "ab" * (n + 1), "seed": n, "max_tokens": 5 + 7 * n, "temperature": 0.3 * n} for n in range(6)]
    alone = [complete(**options) for options in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda options: complete(**options), asked)) == alone


def test_several_prompts_and_samples(client, complete):
    """The texts come in the order of the prompts, each prompt with its n samples, whose seeds follow each other."""
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
    """Each seed gives another text; -1 stands for no seed."""
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
        found = api.completion({"model": NAME} | body, api.Served(NAME, gpt2_tokens, 50257, api.Limits(64, 60, 8)))
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
        ({"logprobs": 6}, "logprobs", "logprobs is 6, and must be from 0 to 5"),
        ({"logprobs": 1, "echo": True}, "logprobs", "logprobs of an echoed prompt are not offered"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "logit_bias is not offered"),
        ({"suffix": "end"}, "suffix", "suffix is not offered"),
        ({"best_of": 9}, "best_of", "best_of is 9, and must be from 1 to 8"),
        ({"best_of": 1, "n": 2}, "best_of", "best_of is 1, and must be from 2 to 8"),
        ({"best_of": 2, "stream": True}, "best_of", "best_of is 2, and must be from 1 to 1"),
        ({"best_of": True}, "best_of", "wrong type"),
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


def test_the_rate_is_limited(worker):
    with listening(worker, per_minute=2) as address, openai_client(address) as client:
        for _ in range(2):
            client.completions.create(model=NAME, prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError, match="more than 2 requests in a minute") as raised:
            client.completions.create(model=NAME, prompt="a", max_tokens=1)
        assert 0 < int(raised.value.response.headers["Retry-After"]) <= 60
        client.models.list()


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


def test_a_model_that_fails_is_said_to(capsys):
    class Failing:
        def free(self):
            raise MemoryError("no room")

    worker = Worker(ContinuousBatch(Failing(), BYTES))  # type: ignore[arg-type]
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
