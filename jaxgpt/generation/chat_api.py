"""Requests to `/v1/chat/completions`: a conversation becomes a prompt by the chat template, and the answer's texts.

The parameters are OpenAI's (https://platform.openai.com/docs/api-reference/chat), and top_k, min_p and
repetition_penalty besides. A message's content is text; markers of the template that it spells out are characters.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxgpt.data import chat_templates
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json, quoted, shown
from jaxgpt.generation import tool_calls
from jaxgpt.generation.answers import ChatAnswers
from jaxgpt.generation.api import ApiError, Asked, Served, Taker, check_model, promised
from jaxgpt.generation.batching import Request, end_of_text
from jaxgpt.generation.constrained import Constraint
from jaxgpt.generation.sampling import MOST_RUNNERS_UP
from jaxgpt.generation.tool_calls import Tool

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_TOOLS = 128
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# Parts of an answer that the client's objects carry, which may be sent back empty.
EMPTY = ("refusal", "audio", "function_call", "annotations", "name")


def chat_completion(body: Any, served: Served, template: Template) -> Asked:
    """Returns what a JSON body asks of the model. ApiError where it can't be answered."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    take, tokenizer, limits = Taker(body), served.tokenizer, served.limits
    check_model(take, served)
    offered, must = _chosen(_tools(take("tools", list, [])), take("tool_choice", (str, dict), None))
    several = take("parallel_tool_calls", bool, True)
    prompt = _prompt(_messages(take("messages", list, None)), offered, served, template)
    max_tokens = _max_tokens(take, len(prompt), limits.max_tokens, limits.context)
    n = take.number("n", int, 1, 1, limits.texts)
    logprobs = take.number("top_logprobs", int, 0, 0, MOST_RUNNERS_UP)
    scored = take("logprobs", bool, False)
    if logprobs and not scored:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    sampling, first, stream = take.sampling(max_tokens), take.seed(), take("stream", bool, False)
    ends, stop = turn_ends(template, tokenizer)
    constraint = served.constraint(take("response_format", dict, None), ends)
    if offered and constraint:
        raise ApiError(400, "response_format and tools are not offered together", param="response_format")
    if offered:
        constraint = _call_constraint(offered, served, ends, must, several)
    include_usage = take.include_usage()
    take.refuse_others()
    sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *stop))
    requests = [Request(prompt, sampling, first + number, ends, constraint, scored) for number in range(n)]
    answers = ChatAnswers(tokenizer, logprobs if scored else -1, bool(offered), n)
    return Asked(requests, answers, len(prompt), stream, include_usage, n, n)


def turn_ends(template: Template, tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """Returns the tokens and the stop texts that end an answer: the template's end of turn, and the end of text."""
    ends, token = end_of_text(tokenizer), chat_templates.end_token(template, tokenizer)
    if token is not None:
        return ends | {token}, ()
    marker = chat_templates.end_of_turn(template)
    return ends, (marker,) if marker else ()


def _prompt(messages: list[dict[str, Any]], tools: Sequence[Tool], served: Served, template: Template) -> Any:
    """Returns the conversation's tokens. ApiError where the template or the tokenizer can't express it."""
    signatures = [tool.signature() for tool in tools]
    if tools and not (template.name == "jinja" and tool_calls.OPEN in template.source):
        told = tool_calls.description(tools)
        if messages[0]["role"] == "system":
            messages = [messages[0] | {"content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
        else:
            messages = [{"role": "system", "content": told}, *messages]
        signatures = []
    try:
        encoded = chat_templates.encode(
            messages, template, served.tokenizer, add_generation_prompt=True, tools=signatures or None
        )
    except UserError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    prompt = served.tokenizer.begin(encoded.ids)
    if not len(prompt) or prompt.max() >= served.vocabulary_size:
        raise ApiError(400, "messages have a token that the model doesn't know", param="messages")
    return prompt


def _max_tokens(take: Taker, prompt: int, most: int, context: int) -> int:
    """Returns the tokens of an answer: as many as asked for, or all for which there is room."""
    room = context - prompt
    if room < 1:
        said = f"the messages have {prompt} tokens, and the model's context is {context}"
        raise ApiError(400, said, param="messages", code="context_length_exceeded")
    old = take.number("max_tokens", int, min(room, most), 0, most)
    asked = take.number("max_completion_tokens", int, old, 0, most)
    if asked > room:
        said = f"the messages have {prompt} tokens: the model's context leaves {room} for the answer"
        raise ApiError(400, said, param="messages", code="context_length_exceeded")
    return asked


def _call_constraint(
    tools: Sequence[Tool], served: Served, ends: frozenset[int], must: bool, several: bool
) -> Constraint:
    grammar = tool_calls.grammar(tools, must=must, several=several)
    return promised("tools", lambda: served.vocabulary(ends).lark(grammar, open_ended=not must))


def _messages(values: list | None) -> list[dict[str, Any]]:
    """Returns the messages as a template takes them. ApiError where one is of another form."""
    if not values:
        raise ApiError(400, "messages is missing: give at least one", param="messages")
    return [_message(value, f"messages[{number}]") for number, value in enumerate(values)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object", param=where)
    role = ROLES.get(value.get("role", "")) if isinstance(value.get("role"), str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise ApiError(400, f"{where} has the role {quoted(value.get('role'))}: take one of {known}", param=where)
    fields = {"role", "content"} | {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}.get(role, set())
    for key in value.keys() - fields:
        if key not in EMPTY or value[key]:
            raise ApiError(400, f"{where}: {quoted(shown(key, 60))} is not offered", param=where)
    calls = [_call(call, where) for call in _list(value.get("tool_calls"), f"{where}: tool_calls")]
    content = _content(value.get("content"), where, optional=role == "assistant" and bool(calls))
    found = {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})
    if isinstance(value.get("tool_call_id"), str):
        found["tool_call_id"] = value["tool_call_id"]
    return found


def _content(value: Any, where: str, *, optional: bool) -> str:
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) == len(value):
            return "".join(texts)
        raise ApiError(400, f"{where}: content may have parts of type text alone", param=where)
    if isinstance(value, str) or (value is None and optional):
        return value or ""
    raise ApiError(400, f"{where}: content must be text", param=where)


def _call(value: Any, where: str) -> dict[str, Any]:
    """Returns a call that the assistant made earlier, its arguments read, as templates take them."""
    function = value.get("function") if isinstance(value, dict) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, dict) else ("", "")
    try:
        whole = {"unique": True, "digits": tool_calls.MOST_DIGITS}
        read = parse_json(arguments, **whole) if isinstance(arguments, str) else None
    except ValueError:
        read = None
    if not (isinstance(name, str) and TOOL_NAME.fullmatch(name) and isinstance(read, dict)):
        raise ApiError(400, f"{where}: a call needs a function with a name, and arguments that are JSON", param=where)
    return {"id": str(value.get("id", "")), "type": "function", "function": {"name": name, "arguments": read}}


def _tools(values: list) -> list[Tool]:
    if len(values) > MOST_TOOLS:
        raise ApiError(400, f"there are {len(values)} tools, and may be {MOST_TOOLS}", param="tools")
    tools = [_tool(value, f"tools[{number}]") for number, value in enumerate(values)]
    if len({tool.name for tool in tools}) < len(tools):
        raise ApiError(400, "two tools have the same name", param="tools")
    return tools


def _tool(value: Any, where: str) -> Tool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ApiError(400, f"{where} must be of type function, with a function", param=where)
    take = Taker(function)
    name = take("name", str, "")
    if not TOOL_NAME.fullmatch(name):
        said = f"{where} has the name {quoted(name)}: take 1 to 64 letters, digits, _ and -"
        raise ApiError(400, said, param=where)
    parameters, strict = take("parameters", dict, {}), take("strict", bool, False)
    return Tool(name, take("description", str, ""), parameters, strict)


def _chosen(tools: Sequence[Tool], choice: Any) -> tuple[list[Tool], bool]:
    """Returns the tools that the model is offered, and whether it must call one."""
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        named = [tool for tool in tools if tool.name == name]
        if choice.get("type") != "function" or not named:
            raise ApiError(400, f"tool_choice names {quoted(name)}, which is none of the tools", param="tool_choice")
        return named, True
    if choice not in (None, "none", "auto", "required"):
        said = f"tool_choice is {quoted(choice)}: take none, auto, required or a function"
        raise ApiError(400, said, param="tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")
    return [] if choice == "none" else list(tools), choice == "required"


def _list(value: Any, where: str) -> list:
    if value is not None and not isinstance(value, list):
        raise ApiError(400, f"{where} must be a list", param="messages")
    return value or []
