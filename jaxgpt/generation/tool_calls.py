"""Calls of tools: how a model is told of them, what it writes to call one, and reading that back.

A call is written as Hermes, Qwen and others do, whatever the chat template:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Where the client wants a call, a grammar allows nothing else. Where the model may choose, its text is free up to
<tool_call>, and a call from there on. So the arguments are always JSON of the tool's schema, unless the text ends too
early.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxgpt.foreign_text import parse_json
from jaxgpt.generation.batching import overlap
from jaxgpt.generation.constrained import JSON

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_DIGITS = 4300  # of an integer, which Python reads; a schema may allow a model any number of them


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `strict`: its schema must be followed to the last keyword."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False

    def signature(self) -> dict[str, Any]:
        """Returns the tool as OpenAI's API has it, which models are shown."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: value for key, value in function.items() if value != ""}}


def description(tools: Sequence[Tool]) -> str:
    """Returns the words of a system message that tells of tools, which are those of Qwen's template."""
    signatures = "\n".join(json.dumps(tool.signature(), ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{OPEN}{CLOSE} XML tags:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
    )


def grammar(tools: Sequence[Tool], *, must: bool, several: bool) -> str:
    """Returns the Lark grammar of answers with calls of these tools: with `must` nothing but calls."""
    calls = [f"call_{number}" for number in range(len(tools))]
    any_call = " | ".join(calls)
    lines = ["%llguidance {}"]
    if must:
        lines.append('start: call ("\\n" call)*' if several else "start: call")
        lines.append(f'call: "{OPEN}\\n" ({any_call}) "\\n{CLOSE}"')
    else:
        lines.append(f"start: {'call*' if several else 'call?'} rest")
        lines += ["rest: TEXT", "TEXT: /(.|\\n)*/", f'opened[lazy]: TEXT "{OPEN}"']
        lines.append(f'call: opened "\\n" ({any_call}) "\\n{CLOSE}"')
    for name, tool in zip(calls, tools, strict=True):
        written = json.dumps(_options(tool) | _call_schema(tool))
        lines.append(f"{name}: %json {written}")
    return "\n".join(lines)


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = {key: value for key, value in tool.parameters.items() if key != "x-guidance"} or {"type": "object"}
    definitions = {key: arguments.pop(key) for key in ("$defs", "definitions") if key in arguments}
    return definitions | {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {"type": "object"} | arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _options(tool: Tool) -> dict[str, Any]:
    options = JSON | {"lenient": not tool.strict, "coerce_one_of": not tool.strict}
    return {"x-guidance": {key: value for key, value in options.items() if value is not None}}


class Call(NamedTuple):
    name: str
    arguments: str  # JSON


class CallReader:
    """Takes calls out of a text that comes in pieces. What looks like a call and isn't remains text."""

    def __init__(self) -> None:
        self._held = ""
        self.count = 0

    def __call__(self, piece: str, *, last: bool = False) -> tuple[str, list[Call]]:
        """Returns the further text that belongs to no call, and the further calls."""
        text, content, calls = self._held + piece, "", []
        while (start := text.find(OPEN)) >= 0:
            content, text = content + text[:start], text[start:]
            call, behind = _first_call(text)
            if call:
                calls.append(call)
                text = behind
            elif last:
                content, text = content + text[: len(OPEN)], text[len(OPEN) :]
            else:
                break
        held = 0 if last else len(text) if text.startswith(OPEN) else overlap(text, OPEN)
        self._held = text[len(text) - held :]
        self.count += len(calls)
        return content + text[: len(text) - held], calls


def _first_call(text: str) -> tuple[Call | None, str]:
    """Returns the call that the text begins with, if it does, and the text behind it. Strings in it may have CLOSE."""
    end = text.find(CLOSE)
    while end >= 0:
        try:
            value = parse_json(text[len(OPEN) : end], unique=True, digits=MOST_DIGITS)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
            return Call(value["name"], json.dumps(value["arguments"], ensure_ascii=False)), text[end + len(CLOSE) :]
        end = text.find(CLOSE, end + 1)
    return None, text
