"""Conversations, tools, constrained answers and log-probabilities, as OpenAI's own client sees them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data import chat_templates, tokenizers
from jaxgpt.generation import api, batching, chat_api, tool_calls
from jaxgpt.generation.batching import ContinuousBatch
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.worker import Worker
from jaxgpt.options.config import Compute, Model, Sampling
from tests import whole
from tests.generation.servers import BYTES, KEY, MISSING, NAME, listening, params_of

openai = pytest.importorskip("openai", reason=f"openai is {MISSING}")
pytest.importorskip("llguidance", reason=f"llguidance is {MISSING}")


MODEL = Model(layers=1, heads=2, width=16, context=1536, vocabulary_size=256)
CHATML = chat_templates.built_in("chatml")
SERVED = api.Served(NAME, BYTES, 256, api.Limits(MODEL.context, 400, 8))
USER = [{"role": "user", "content": "2 + 2?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2, 3]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def params():
    return params_of(MODEL)


@pytest.fixture(scope="module")
def address(params):
    worker = Worker(ContinuousBatch(Decoder(params, MODEL, Compute(), slots=3, capacity=MODEL.context), BYTES))
    with listening(worker, served=SERVED, waiting=32) as address:
        yield address
    worker.stop()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client):
    """A function that asks for the next message."""

    def ask(messages=USER, **options):
        options = {"max_completion_tokens": 20, "seed": 1, "temperature": 1} | options
        return client.chat.completions.create(model=NAME, messages=messages, **options)

    return ask


def test_the_answer_goes_on_with_the_conversation_as_the_template_writes_it(chat, params):
    prompt = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    request = batching.Request(BYTES.encode(prompt), Sampling(tokens=20, temperature=1.0), 1)
    expected = "".join(piece.text for piece in batching.generate(params, [request], MODEL, Compute(), BYTES))
    answer = chat()
    assert answer.choices[0].message.content == expected
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 20


def test_a_stream_joined_is_the_message(chat):
    *chunks, usage = chat(stream=True, stream_options={"include_usage": True})
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == chat().choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert usage.usage.completion_tokens == 20


def test_several_answers_have_following_seeds(chat):
    answers = [choice.message.content for choice in chat(n=3).choices]
    assert answers == [chat(seed=seed).choices[0].message.content for seed in (1, 2, 3)]


def test_a_stop_text_and_the_end_of_the_turn(chat):
    text = chat().choices[0].message.content
    stopped = chat(stop=text[7:9])
    assert stopped.choices[0].message.content == text[: text.index(text[7:9])]
    assert stopped.choices[0].finish_reason == "stop"
    ends, stop = chat_api.turn_ends(CHATML, BYTES)
    assert (ends, stop) == (frozenset(), ("<|im_end|>",))


def test_every_way_to_write_a_conversation(chat):
    """Parts of text, a developer's message, an earlier answer of the client's own objects."""
    plain = chat([{"role": "system", "content": "Be brief."}, *USER]).choices[0].message
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    other = chat([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert other.choices[0].message.content == plain.content
    assert chat([*USER, plain, {"role": "user", "content": "So?"}]).choices[0].message.content


def test_markers_in_a_message_are_characters():
    """Messages are encoded with GPT-2's tokenizer and with one that has ChatML's markers as tokens."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "<|endoftext|>"}]}
    tokens = tokenizers.make("gpt2", "")
    asked = chat_api.chat_completion(body, api.Served(NAME, tokens, 50257, api.Limits(64, 60, 8)), CHATML)
    assert tokens.end_of_text not in asked.requests[0].prompt.tolist()
    assert asked.requests[0].ends == {tokens.end_of_text}


def test_log_probabilities_are_the_models(chat, params):
    """Every token's and its runners-up's are those of a forward pass over the whole text."""
    answer = chat(logprobs=True, top_logprobs=3).choices[0]
    prompt = b"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    drawn = bytes(byte for token in answer.logprobs.content for byte in token.bytes)
    assert drawn.decode("utf-8", "replace") == answer.message.content
    tokens = jnp.array([*(prompt + drawn)])[None]
    expected = np.asarray(jax.nn.log_softmax(whole.logits(params, tokens, MODEL, Compute())))[0, len(prompt) - 1 : -1]
    found = answer.logprobs.content
    for place, token in enumerate(found):
        assert token.logprob == pytest.approx(expected[place, drawn[place]], abs=1e-4)
        best = np.argsort(-expected[place], kind="stable")[:3]
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(expected[place, best].tolist(), abs=1e-4)
        assert [bytes(one.bytes) for one in token.top_logprobs] == [bytes([one]) for one in best]
    streamed = [token for chunk in chat(logprobs=True, top_logprobs=3, stream=True) if chunk.choices[0].logprobs
                for token in chunk.choices[0].logprobs.content]  # fmt: skip
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in found])


def test_log_probabilities_of_a_text(client):
    options = {"model": NAME, "prompt": "The ", "max_tokens": 30, "seed": 1}
    answer = client.completions.create(logprobs=2, **options).choices[0]
    assert len(answer.logprobs.tokens) == 30
    assert all(len(one) == 2 for one in answer.logprobs.top_logprobs)
    assert answer.logprobs.text_offset[:1] == [0]
    stop = answer.text[10:12]
    cut = client.completions.create(logprobs=0, stop=stop, **options).choices[0]
    assert cut.text == answer.text[: answer.text.index(stop)]
    assert all(offset < len(cut.text) for offset in cut.logprobs.text_offset)
    assert cut.logprobs.token_logprobs == pytest.approx(answer.logprobs.token_logprobs[: len(cut.logprobs.tokens)])
    pieces = client.completions.create(logprobs=2, stream=True, **options)
    streamed = [name for chunk in pieces if chunk.choices[0].logprobs for name in chunk.choices[0].logprobs.tokens]
    assert streamed == answer.logprobs.tokens


def test_the_best_of_some_texts_is_the_likeliest(client):
    options = {"model": NAME, "prompt": "The ", "max_tokens": 12, "seed": 1, "logprobs": 0}
    each = client.completions.create(n=5, **options).choices
    best = client.completions.create(best_of=5, n=2, **options)
    order = sorted(each, key=lambda choice: -np.mean(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best.choices] == [choice.text for choice in order[:2]]
    assert best.usage.completion_tokens == 60


def test_an_answer_of_a_schema(chat):
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        answer = chat(response_format=wanted, seed=seed, max_completion_tokens=200).choices[0]
        found = json.loads(answer.message.content)
        assert answer.finish_reason == "stop"
        assert set(found) == {"answer", "sure"}
        assert 0 <= found["answer"] <= 99
        assert isinstance(found["sure"], bool)


def test_constrained_and_free_texts_side_by_side_are_those_drawn_alone(chat):
    from concurrent.futures import ThreadPoolExecutor

    wanted = {"type": "regex", "regex": "[a-f]{30}"}
    asked = [
        {"extra_body": {"response_format": wanted}, "max_completion_tokens": 60},
        {"max_completion_tokens": 60},
    ] * 2
    asked = [options | {"seed": seed} for seed, options in enumerate(asked)]
    alone = [chat(**options).choices[0].message.content for options in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda options: chat(**options).choices[0].message.content, asked))
    assert found == alone
    assert all(re.fullmatch("[a-f]{30}", text) for text in alone[::2])


def test_any_object_and_a_grammar(chat, client):
    answer = chat(response_format={"type": "json_object"}, max_completion_tokens=400, seed=3).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    grammar = {"type": "grammar", "grammar": 'start: "(" start ")" | "x"'}
    text = client.completions.create(
        model=NAME, prompt="a", max_tokens=200, seed=1, extra_body={"response_format": grammar}
    ).choices[0].text  # fmt: skip
    assert re.fullmatch(r"(\(*)x(\)*)", text)
    assert text.count("(") == text.count(")")


def test_a_tool_must_be_called(chat):
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        answer = chat(tools=[ADD, NOW], tool_choice=choice, max_completion_tokens=400, parallel_tool_calls=False)
        assert answer.choices[0].finish_reason == "tool_calls"
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].message.content is None
        assert call.type == "function"
        if choice != "required":
            assert call.function.name == "add"
        if call.function.name == "add":
            arguments = json.loads(call.function.arguments)
            assert isinstance(arguments["a"], int)
            assert arguments["b"] in (1, 2, 3)
    chunks = list(chat(tools=[ADD], tool_choice="required", max_completion_tokens=400, stream=True,
                       parallel_tool_calls=False))  # fmt: skip
    (delta,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert (delta[0].index, delta[0].function.name) == (0, "add")
    assert json.loads(delta[0].function.arguments)["b"] in (1, 2, 3)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_and_its_result_go_into_the_conversation(chat):
    called = chat(tools=[ADD], tool_choice="required", max_completion_tokens=400, parallel_tool_calls=False)
    message = called.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4"}
    assert chat([*USER, message, result], tools=[ADD], tool_choice="auto", max_completion_tokens=5).choices
    sent = [*USER, message.model_dump(), result]
    prompt = chat_api.chat_completion({"model": NAME, "messages": sent, "tools": [ADD]}, SERVED, CHATML)
    text = BYTES.decode(prompt.requests[0].prompt)
    assert "# Tools" in text
    assert '"description": "Adds two numbers."' in text
    assert f'<tool_call>\n{{"name": "add", "arguments": {message.tool_calls[0].function.arguments}}}' in text
    assert "<tool_response>\n4\n</tool_response>" in text


def test_calls_are_read_out_of_a_text_however_it_comes():
    call = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call> <b>"}}\n</tool_call>'
    text = f"a <tool_calls <tool_call> no {{}}</tool_call> b {call}\n{call} c <tool_call>\n{{"
    for size in (1, 2, 7, len(text)):
        reader, content, calls = tool_calls.CallReader(), "", []
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        for number, piece in enumerate(pieces):
            more, found = reader(piece, last=number == len(pieces) - 1)
            content, calls = content + more, calls + found
        assert content == text.replace(call, "")
        assert calls == [("f", '{"x": "</tool_call> <b>"}')] * 2
        assert reader.count == 2


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "messages is missing"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0]", "has the role 'king'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "parts of type text"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0]", "'weight' is not offered"),
        ({"messages": [{"role": "user", "content": "a" * 1600}]}, "messages", "the model's context is 1536"),
        ({"max_completion_tokens": 401}, "max_completion_tokens", "must be from 0 to 400"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be from 0 to 20"),
        ({"response_format": {"type": "xml"}}, "response_format", "has type 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "says no schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format",
            'Unimplemented keys: ["not"]',
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///etc/passwd"}}}},
            "response_format",
            "does not fetch",
        ),
        ({"extra_body": {"response_format": {"type": "regex", "regex": "("}}}, "response_format", "can't be followed"),
        ({"extra_body": {"response_format": {"type": "grammar", "grammar": "a"}}}, "response_format", "can't be fol"),
        ({"tools": [ADD, ADD]}, "tools", "two tools have the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]", "has the name 'a b'"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "names 'f'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [ADD], "response_format": {"type": "json_object"}}, "response_format", "not offered together"),
        ({"extra_body": {"message": []}}, "message", "unknown parameter 'message'; did you mean messages?"),
    ],
)
def test_what_cannot_be_done_is_refused(chat, options, param, message):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(**options)
    assert (raised.value.param, raised.value.type) == (param, "invalid_request_error")
    assert message in raised.value.message


def test_a_grammar_that_takes_too_much_ends_its_own_text_alone(chat):
    bomb = {
        "type": "json_schema",
        "json_schema": {
            "name": "a",
            "schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        },
    }
    with pytest.raises(openai.BadRequestError, match="the grammar takes too much"):
        chat(response_format=bomb)
    assert chat().choices[0].message.content
