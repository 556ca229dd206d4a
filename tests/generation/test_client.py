"""OpenAI's client beyond single requests: schemas of classes, streams put together, calls, several models."""

import dataclasses
import json
import random
import urllib.request
from typing import Literal

import jax
import pytest

from jaxgpt.generation import constrained, tool_calls
from jaxgpt.generation.batching import ContinuousBatch, Text
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.worker import Worker
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute
from tests.generation.servers import BYTES, KEY, MISSING, NAME, listening
from tests.generation.test_chat_server import ADD, MODEL, NOW, SERVED, USER

openai = pytest.importorskip("openai", reason=f"openai is {MISSING}")
pydantic = pytest.importorskip("pydantic", reason=f"pydantic is {MISSING}")
pytest.importorskip("llguidance", reason=f"llguidance is {MISSING}")


class Step(pydantic.BaseModel):
    number: int = pydantic.Field(ge=0, le=99, description="which step")
    kind: Literal["sum", "product"]


class Solution(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(max_length=2)
    sure: bool | None


class Saying:
    """A batch of which every text is the same, a few characters at a time: a model that says what it is told to."""

    def __init__(self, text: str):
        self._pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
        self._texts: dict[Text, int] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, request) -> Text:
        self._texts[text := Text(request)] = 0
        return text

    def remove(self, text: Text) -> None:
        self._texts.pop(text, None)

    def turn(self):
        for text, place in [*self._texts.items()]:
            text.tokens.append(0)
            self._texts[text] = place + 1
            if place + 1 == len(self._pieces):
                text.ended = "stop"
                del self._texts[text]
            yield text, self._pieces[place]


def drawing(seed: int) -> Worker:
    """Returns a worker that draws texts from a random model."""
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(seed)))
    return Worker(ContinuousBatch(Decoder(params, MODEL, Compute(), slots=3, capacity=MODEL.context), BYTES))


@pytest.fixture(scope="module")
def address():
    """The address of a server of two random models, and one that makes two tool calls."""
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    says = Saying(f"I add. {call}\n{call.replace('2', '-4')}")
    workers = [drawing(0), drawing(1), Worker(says)]  # type: ignore[arg-type]
    names = [NAME, "other", "caller"]
    models = [(one, dataclasses.replace(SERVED, name=name, beside=tuple({*names} - {name})))
              for one, name in zip(workers, names, strict=True)]  # fmt: skip
    with listening(workers[0], served=models[0][1], beside=models[1:], waiting=32) as address:
        yield address
    for worker in workers:
        worker.stop()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def test_an_answer_is_parsed_as_a_class(client):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=NAME, messages=USER, response_format=Solution, max_completion_tokens=300, seed=seed
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Solution)
        assert len(parsed.steps) <= 2


def test_a_calls_arguments_are_parsed_as_a_class(client):
    tool = openai.pydantic_function_tool(Step, name="step", description="Notes a step.")
    answer = client.chat.completions.parse(
        model=NAME, messages=USER, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=1,
        max_completion_tokens=300,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Step)


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}])
def test_a_stream_that_the_client_puts_together_is_the_whole_answer(client, options):
    asked = {"model": NAME, "messages": USER, "max_completion_tokens": 30, "seed": 3} | options
    texts = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    asked["stop"] = [text[10:12] for text in texts]  # the client takes an answer without an end for an error
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    whole = client.chat.completions.create(**asked)
    for streamed, expected in zip(found.choices, whole.choices, strict=True):
        assert streamed.message.content == expected.message.content
        assert streamed.finish_reason == expected.finish_reason
        if "logprobs" in options:
            drawn = [token.logprob for token in streamed.logprobs.content]
            assert drawn == pytest.approx([token.logprob for token in expected.logprobs.content])


def test_calls_that_the_model_chooses_are_sent_in_openais_form(client):
    asked = {"model": "caller", "messages": USER, "tools": [ADD, NOW]}
    for choice in ({}, {"tool_choice": "auto"}):
        answer = client.chat.completions.create(**asked, **choice).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content == "I add."
        assert [json.loads(call.function.arguments) for call in answer.message.tool_calls] == [
            {"a": 2, "b": 3}, {"a": -4, "b": 3},
        ]  # fmt: skip
        assert len({call.id for call in answer.message.tool_calls}) == 2
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert [call.function.arguments for call in streamed.message.tool_calls] == [
        call.function.arguments for call in answer.message.tool_calls
    ]
    assert streamed.finish_reason == "tool_calls"


def test_with_no_tool_to_choose_the_text_is_as_it_is_without_tools(client):
    """The model isn't told of them, and what looks like a call remains text."""
    asked = {"model": NAME, "messages": USER, "max_completion_tokens": 20, "seed": 1}
    plain = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tools=[ADD], tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage == plain.usage
    said = client.chat.completions.create(model="caller", messages=USER, tools=[ADD], tool_choice="none").choices[0]
    assert said.message.tool_calls is None
    assert said.message.content.startswith("I add. <tool_call>")
    assert said.finish_reason == "stop"


def test_whatever_is_drawn_behind_the_beginning_of_a_call_is_one():
    """Text up to <tool_call> is free, and behind it random tokens that the mask allows make a call of the schema."""
    tools = [tool_calls.Tool(one["function"]["name"], "", one["function"]["parameters"], True) for one in (ADD, NOW)]
    vocabulary = constrained.vocabulary(BYTES, 256, ())
    made = vocabulary.lark(tool_calls.grammar(tools, must=False, several=True), open_ended=True)
    names = set()
    for seed in range(20):
        choose, constraint, text = random.Random(seed), made.copy(), "So <tool_calls, and no call: <tool_call>"
        for token in BYTES.encode(text).tolist():
            assert constraint.mask()[token]
            constraint.take(token)
        while not text.endswith("</tool_call>"):
            token = choose.choice(constraint.mask().nonzero()[0].tolist())
            constraint.take(token)
            text += chr(token)
        _, (call,) = tool_calls.CallReader()(text, last=True)
        arguments = json.loads(call.arguments)
        names.add(call.name)
        assert call.name == "now" or (type(arguments["a"]) is int and arguments["b"] in (1, 2, 3))
        assert constraint.mask()[ord("a")]  # the text goes on
    assert names == {"add", "now"}


def test_each_of_several_models_answers_for_itself(client, address):
    assert [model.id for model in client.models.list()] == [NAME, "other", "caller"]
    assert client.models.retrieve("other").id == "other"
    asked = {"messages": USER, "max_completion_tokens": 12, "seed": 1}
    first, other = (client.chat.completions.create(model=name, **asked) for name in (NAME, "other"))
    assert (first.model, other.model) == (NAME, "other")
    assert first.choices[0].message.content != other.choices[0].message.content
    text = client.completions.create(model="other", prompt="The ", max_tokens=9, seed=1)
    assert (
        text.choices[0].text
        != client.completions.create(model=NAME, prompt="The ", max_tokens=9, seed=1).choices[0].text
    )
    with pytest.raises(openai.NotFoundError, match="there is no model 'third': it is 'tiny' or '"):
        client.chat.completions.create(model="third", **asked)
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer) == {"status": "ok", "texts": 0}
