"""Chat templates: conversations as one text, and which of its tokens are the assistant's.

A conversation is a list of messages, each an object with a role and a content, as `conversations.py` reads them. A
template puts them between markers, such as ChatML:

    <|im_start|>user
    2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

ChatML, Llama 3's and Mistral's are built in; a Jinja template of a Hugging Face tokenizer runs in a process of its own
(`jinja_process.py`). What the model is to write itself is trained: an assistant's content and the marker that ends its
turn, and nothing else.

The markers are special tokens where the tokenizer has them. Where it has none of that name, as GPT-2's and bytes, the
markers are the characters that they are written with, and the model learns these. A message can't forge a marker: a
special token that its content spells out is encoded as characters.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import jinja_process
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json, quoted, shown

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None
LARGEST_TEMPLATE = 1 << 20  # characters of a Jinja template
BREAK = "\udfff"  # within a special token's name in a content, and taken out again; no Unicode text has it
PROBE = "answer"  # an answer, to see what ends it


class Rendered(NamedTuple):
    text: str
    trained: tuple[tuple[int, int], ...]  # where the assistant's parts begin and end, in characters


class Encoded(NamedTuple):
    ids: np.ndarray  # int32, 1-D
    mask: np.ndarray  # bool, 1-D: tokens that the model is to write itself


@dataclass(frozen=True)
class Template:
    """A built-in template by its name, or a Jinja template with the names of its tokenizer's special tokens."""

    name: str  # one of NAMES, or "jinja"
    source: str = ""
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    def state(self) -> dict[str, Any]:
        """Returns the state from which `from_state` makes the same template, as JSON can hold it."""
        return {"name": self.name} | ({"source": self.source, "variables": self.variables} if self.source else {})


def from_state(state: dict[str, Any]) -> Template:
    """Returns the template whose `state()` this is. UserError for a damaged state."""
    name, source, variables = state.get("name"), state.get("source", ""), state.get("variables", {})
    known = not source if name in NAMES else name == "jinja" and isinstance(source, str) and source
    texts = isinstance(variables, dict) and all(isinstance(text, str) for text in variables.values())
    if not (isinstance(name, str) and known and texts):
        raise UserError(f"the saved chat template {quoted(name)} is damaged, or of a later version of jaxgpt")
    if len(source) > LARGEST_TEMPLATE:
        raise UserError(f"the chat template has {len(source):,} characters, and may have {LARGEST_TEMPLATE:,}")
    return Template(name, source, variables)


def render(messages: Messages, template: Template, *, add_generation_prompt: bool = False, tools: Tools = None) -> str:
    """Returns the conversation's text; with `add_generation_prompt`, up to where the assistant's next answer begins.

    UserError where the template can't express it.
    """
    return _render(messages, template, add_generation_prompt, tools).text


def encode(
    messages: Messages,
    template: Template,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    tools: Tools = None,
) -> Encoded:
    """Returns the tokens of `render`'s text, and which of them are trained. UserError as `render`."""
    names = tokenizer.special_names
    if any(name in json.dumps([*messages], ensure_ascii=False) for name in names):
        messages = [_broken(message, names) for message in messages]
    rendered = with_spans(messages, template, add_generation_prompt=add_generation_prompt, tools=tools)
    trained = np.zeros(len(rendered.text) + 1, bool)
    for start, end in rendered.trained:
        trained[start:end] = True
    ids, mask, place = [], [], 0
    for part in rendered.text.split(BREAK):
        part_ids, starts, ends = tokenizer.encode_with_places(part, special=True)
        before = np.concatenate([[0], np.cumsum(trained[place : place + len(part)])])
        ids.append(part_ids)
        mask.append(before[np.maximum(ends, starts)] > before[starts])
        place += len(part) + 1
    return Encoded(np.concatenate(ids).astype(np.int32), np.concatenate(mask))


def question(text: str, state: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens of a user's one question, up to where the answer begins, in the template of this state."""
    messages = [{"role": "user", "content": text}]
    return encode(messages, from_state(state), tokenizer, add_generation_prompt=True).ids


def with_spans(
    messages: Messages, template: Template, *, add_generation_prompt: bool = False, tools: Tools = None
) -> Rendered:
    """Returns the conversation's text, and where in it the assistant's parts are. UserError as `render`."""
    rendered = _render(messages, template, add_generation_prompt, tools)
    if template.name in NAMES or rendered.trained:
        return rendered
    return rendered._replace(trained=_spans_by_beginnings(messages, template, rendered.text, tools))


def end_of_turn(template: Template) -> str:
    """Returns the text with which the assistant ends its answer; empty where the template has none."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}]
    text = render(messages, template)
    return text[text.rindex(PROBE) + len(PROBE) :].strip() if PROBE in text else ""


def end_token(template: Template, tokenizer: Tokenizer) -> int | None:
    """Returns the special token that ends an answer; None where that is text, or nothing."""
    try:
        ids = tokenizer.encode(end_of_turn(template), special=True).tolist()
    except UserError:  # characters that the tokenizer doesn't have
        return None
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.special_ids else None


def stops(state: dict[str, Any]) -> tuple[str, ...]:
    """Returns the texts that end an answer in the template of this state; none for {}."""
    end = end_of_turn(from_state(state)) if state else ""
    return (end,) if end else ()


def _render(messages: Messages, template: Template, add_generation_prompt: bool, tools: Tools) -> Rendered:
    if template.name == "jinja":
        context = {"messages": [*messages], "tools": tools and [*tools], "documents": None}
        context["add_generation_prompt"] = add_generation_prompt
        text, spans = jinja_process.render(template.source, template.variables | context)
        return Rendered(text, tuple(spans))
    if tools:
        raise UserError(f"the chat template {template.name} has no place for tools: describe them in a system message")
    text, trained = "", []
    for piece, ours in BUILT_IN[template.name](messages, add_generation_prompt):
        if ours:
            trained.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, tuple(trained))


def _broken(value: Any, names: Sequence[str]) -> Any:
    """Returns a message in which special tokens' names have a BREAK behind their first character."""
    if isinstance(value, dict):
        return {key: _broken(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, names) for item in value]
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            value = value.replace(name, name[:1] + BREAK + name[1:])
    return value


# The assistant's parts of a Jinja template that doesn't mark them


def _spans_by_beginnings(
    messages: Messages, template: Template, text: str, tools: Tools
) -> tuple[tuple[int, int], ...]:
    """Returns where the assistant's parts are, by rendering the conversation up to each of them.

    An answer begins where the text up to the generation prompt ends, and ends where the text with it does. White space
    behind the marker that ends its turn belongs to the template. UserError where an answer isn't found.
    """
    spans = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _render(messages[:number], template, True, tools).text
        after = _render(messages[: number + 1], template, False, tools).text
        content = str(message.get("content") or "").strip()
        end = after.rindex(content) + len(content) if content in after[len(before) :] else len(after.rstrip())
        tail = after[end:].rstrip() or after[end:]
        begins = len(before) if after.startswith(before) else _common(before, after)
        if text.startswith(after):
            spans.append((begins, end + len(tail)))
            continue
        # Some templates write a later answer otherwise than an earlier one: without its reasoning, for example.
        place = text.find(content + tail, begins) if text.startswith(before) and content else -1
        if place < 0:
            raise UserError(
                f"the chat template writes message {number + 1} in other words once there are more, so what the "
                "assistant is to write can't be told: mark it in the template with {% generation %}, or name another "
                "--template"
            )
        spans.append((begins, place + len(content) + len(tail)))
    return tuple(spans)


def _common(first: str, second: str) -> int:
    """Returns the length of the longest beginning that both texts have."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


# Built in: each returns pieces of the text, and whether they are trained

Pieces = list[tuple[str, bool]]


def _chatml(messages: Messages, add_generation_prompt: bool) -> Pieces:
    """ChatML as OpenAI published it, and Qwen and SmolLM use it; calls of tools as in Hermes and Qwen."""
    pieces = []
    for message in messages:
        role, content = message["role"], _content(message)
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        calls = [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in message.get("tool_calls") or ()]
        content = "\n".join([*([content] if content or not calls else []), *calls])
        ours = role == "assistant"
        pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", ours), ("\n", False)]
    return pieces + ([("<|im_start|>assistant\n", False)] if add_generation_prompt else [])


def _llama3(messages: Messages, add_generation_prompt: bool) -> Pieces:
    """Llama 3's, as in Meta's model card."""

    def header(role: str) -> tuple[str, bool]:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n", False

    pieces: Pieces = [("<|begin_of_text|>", False)]
    for message in messages:
        _refuse_tools(message, "llama3")
        pieces += [header(message["role"]), (f"{_content(message).strip()}<|eot_id|>", message["role"] == "assistant")]
    return pieces + ([header("assistant")] if add_generation_prompt else [])


def _mistral(messages: Messages, add_generation_prompt: bool) -> Pieces:
    """Mistral 7B Instruct v0.3's, with the system message before the first question."""
    pieces: Pieces = [("<s>", False)]
    system, rest = "", list(messages)
    if rest and rest[0]["role"] == "system":
        system = f"{_content(rest.pop(0))}\n\n"
    for number, message in enumerate(rest):
        _refuse_tools(message, "mistral")
        if message["role"] != ("user", "assistant")[number % 2]:
            raise UserError(
                f"the chat template mistral takes questions and answers in turn, and a system message before them; "
                f"message {number + 1 + bool(system)} is of the role {quoted(message['role'])}"
            )
        if message["role"] == "user":
            pieces.append((f"[INST] {system if number == 0 else ''}{_content(message)}[/INST]", False))
        else:
            pieces.append((f" {_content(message).strip()}</s>", True))
    return pieces


BUILT_IN: dict[str, Callable[[Messages, bool], Pieces]] = {"chatml": _chatml, "llama3": _llama3, "mistral": _mistral}
NAMES = tuple(BUILT_IN)


def _content(message: dict[str, Any]) -> str:
    return message.get("content") or ""


def _call(call: dict[str, Any]) -> str:
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise UserError(f"the function of a tool's call is {quoted(function)}, and no object")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's form has them as JSON within a string
        try:
            arguments = parse_json(arguments)
        except ValueError:
            raise UserError(f"the arguments of a tool's call are no JSON: {quoted(arguments)}") from None
    return json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)


def _refuse_tools(message: dict[str, Any], name: str) -> None:
    if message.get("tool_calls") or message["role"] == "tool":
        raise UserError(f"the chat template {name} has no place for a tool's calls: take chatml, or a Jinja template")


def built_in(name: str) -> Template:
    """Returns the built-in template of this name. UserError where there is none."""
    if name not in NAMES:
        raise UserError(f"there is no chat template {quoted(shown(name))}: name one of {', '.join(NAMES)}")
    return Template(name)
