"""Reads conversations, comparisons and problems from lines of JSON, in each form in which they are published.

Conversations become lists of messages, each an object with a role and a content:

    messages          {"messages": [{"role": "user", "content": "2 + 2?"}, ...], "tools": [...]}
    ShareGPT          {"conversations": [{"from": "human", "value": "2 + 2?"}, ...], "system": ""}
    Alpaca            {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    prompt, response  {"prompt": "2 + 2?", "response": "4"}; also completion, and question with answer

A comparison is a prompt with a better and a worse completion, as texts or as messages:

    {"prompt": ..., "chosen": ..., "rejected": ...}       without a prompt, it is what both of them begin with
    {"prompt": ..., "ranked": [...]}                      completions from the best to the worst, which make all pairs

A problem is a prompt with an answer that can be checked: {"prompt": ..., "answer": "4"}. Further keys are passed over.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxgpt import foreign_text
from jaxgpt.data import unpacking
from jaxgpt.data.documents import Rows
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
SAME_ROLES |= {"chatgpt": "assistant", "function": "tool", "observation": "tool"}
LONGEST_LINE = 16 << 20  # bytes
MOST_RANKED = 64  # completions of one prompt
AT_ONCE = 1 << 20  # bytes that are read at once

Messages = list[dict[str, Any]]
Kind = TypeVar("Kind")


class Conversation(NamedTuple):
    messages: Messages
    tools: list[dict[str, Any]] | None = None  # descriptions of tools, for templates that take them


class Comparison(NamedTuple):
    prompt: Messages
    chosen: Messages  # the completion alone, which begins with the assistant's message
    rejected: Messages


class Problem(NamedTuple):
    prompt: Messages
    answer: str


def read(paths: Iterable[Path], rows: Rows, skip_bad: int = 0) -> Iterator[tuple[str, Conversation]]:
    """Yields the conversations of files, each with its place, "FILE, line N".

    Lines that aren't one are counted in `rows`. UserError for more than `skip_bad` of them, and for a file that can't
    be read.
    """
    return _read(paths, conversation, rows, skip_bad)


def read_rankings(paths: Iterable[Path], rows: Rows, skip_bad: int = 0) -> Iterator[tuple[str, list[Comparison]]]:
    """Yields the comparisons of files by line, as `read` does: one pair, or all pairs of a ranking."""
    return _read(paths, comparisons, rows, skip_bad)


def read_problems(paths: Iterable[Path], rows: Rows, skip_bad: int = 0) -> Iterator[tuple[str, Problem]]:
    """Yields the problems of files, as `read` does."""
    return _read(paths, problem, rows, skip_bad)


def _read(
    paths: Iterable[Path], parse: Callable[[dict[str, Any]], Kind], rows: Rows, skip_bad: int
) -> Iterator[tuple[str, Kind]]:
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{shown(path)}, line {number:,}"
            try:
                value = foreign_text.parse_json(line)
                if not isinstance(value, dict):
                    raise ValueError(f"{quoted(value)}, where an object is expected")
                found = parse(value)
            except ValueError as error:
                rows.add_bad(where, error, skip_bad)
            else:
                yield where, found


def _lines(path: Path) -> Iterator[bytes]:
    """Yields a file's lines, which end at line breaks alone. UserError for a line of more than LONGEST_LINE bytes."""
    with unpacking.opened(path) as reader:
        head = reader.read(unpacking.HEAD_BYTES)
    unpacking.check_text(path, head)
    if head.lstrip().startswith(b"["):
        raise UserError(
            f"{shown(path)}: a list in JSON, where an object is expected on each line. Write it so: jq -c '.[]' OLD > "
            "NEW.jsonl"
        )
    with unpacking.opened(path) as reader:
        rest = b""
        while data := reader.read(AT_ONCE):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
            if len(rest) > LONGEST_LINE:
                raise UserError(
                    f"{shown(path)}: the line before byte offset {reader.offset:,} is longer than {LONGEST_LINE:,} "
                    "bytes. Conversations are one JSON object a line"
                )
        if rest:
            yield rest


# One line. A ValueError says what is wrong with it


def conversation(row: dict[str, Any]) -> Conversation:
    """Returns the conversation of a line in any of the forms. ValueError where it is none."""
    messages = _messages_of(row)
    if not messages:
        raise ValueError("no messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant's, so there is nothing to learn")
    tools = row.get("tools")
    if isinstance(tools, str) and tools:  # as some data sets of ShareGPT's form have it
        tools = foreign_text.parse_json(tools)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {quoted(tools)}, and no list of objects")
    return Conversation(messages, tools or None)


def _messages_of(row: dict[str, Any]) -> Messages:
    if "messages" in row:
        return _messages(row["messages"], "messages")
    if "conversations" in row or "conversation" in row:
        name = "conversations" if "conversations" in row else "conversation"
        messages = _messages(row[name], name)
        system = _optional(row, "system")
        return [{"role": "system", "content": system}, *messages] if system else messages
    if "instruction" in row and ("output" in row or "response" in row):
        given = "\n\n".join(filter(None, [_text(row, "instruction"), _optional(row, "input")]))
        return _turns(_optional(row, "system"), given, _text(row, "output" if "output" in row else "response"))
    for prompt, answers in (("prompt", ("response", "completion")), ("question", ("answer", "response"))):
        for answer in answers:
            if prompt in row and answer in row:
                return [*_prompt(row, prompt), *_completion(row[answer], answer)]
    names = ", ".join(shown(name, 40) for name in sorted(row)[:20]) or "none"
    raise ValueError(
        "an object in none of the forms of conversations (messages; conversations; instruction and output; prompt and "
        f"response). Its fields: {names}"
    )


def comparisons(row: dict[str, Any]) -> list[Comparison]:
    """Returns the comparison of a line, or all pairs of its ranking. ValueError where it has neither."""
    if "ranked" in row:
        prompt, ranked = _prompt(row, "prompt"), row["ranked"]
        if not isinstance(ranked, list) or not 2 <= len(ranked) <= MOST_RANKED:
            raise ValueError(f"ranked is {quoted(ranked)}, and no list of 2 to {MOST_RANKED} completions")
        found = [_completion(one, "ranked") for one in ranked]
        return [Comparison(prompt, better, worse) for better, worse in itertools.combinations(found, 2)]
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"a comparison without a field '{name}'")
    if "prompt" in row:
        prompt = _prompt(row, "prompt")
        chosen, rejected = (_without(prompt, _completion(row[name], name)) for name in ("chosen", "rejected"))
    else:
        prompt, chosen, rejected = _common_beginning(row)
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return [Comparison(prompt, chosen, rejected)]


def problem(row: dict[str, Any]) -> Problem:
    """Returns the problem of a line. ValueError where it is none."""
    prompt = _prompt(row, "prompt") if "prompt" in row else _prompt(row, "question")
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer:
        raise ValueError(f"answer is {quoted(answer)}, and no text")
    return Problem(prompt, answer)


def _common_beginning(row: dict[str, Any]) -> tuple[Messages, Messages, Messages]:
    """Splits two whole conversations into the messages that they begin with alike, and the rest of each."""
    both = [_messages(row[name], name) for name in ("chosen", "rejected")]
    pairs = enumerate(zip(*both, strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(map(len, both)))
    if any(len(one) <= common or one[common]["role"] != "assistant" for one in both) or not common:
        raise ValueError("chosen and rejected don't differ in a message of the assistant's behind a common beginning")
    return both[0][:common], both[0][common:], both[1][common:]


def _without(prompt: Messages, completion: Messages) -> Messages:
    """Returns a completion without the prompt, which some data sets repeat in it."""
    rest = completion[len(prompt) :] if completion[: len(prompt)] == prompt else completion
    if not rest or rest[0]["role"] != "assistant":
        raise ValueError("a completion doesn't begin with a message of the assistant's")
    return rest


# Fields


def _prompt(row: dict[str, Any], name: str) -> Messages:
    value = row.get(name)
    if isinstance(value, list):
        found = _messages(value, name)
        if not found or found[-1]["role"] == "assistant":
            raise ValueError(f"{name} {'has no messages' if not found else 'ends with a message of the assistant'}")
        return found
    return _turns(_optional(row, "system"), _text(row, name))


def _completion(value: Any, name: str) -> Messages:
    if isinstance(value, list | dict):
        return _messages(value if isinstance(value, list) else [value], name)
    return [{"role": "assistant", "content": _text({name: value}, name)}]


def _turns(system: str, question: str, *answer: str) -> Messages:
    found = [{"role": "system", "content": system}] if system else []
    found.append({"role": "user", "content": question})
    return found + [{"role": "assistant", "content": text} for text in answer]


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {quoted(value)}, and no list of messages")
    return [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    """Returns a message with a known role and with text, and whatever else a template may read of it."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {quoted(value)}, and no object with a role and a content")
    form = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role = value.get(form[0])
    role = SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"the {form[0]} of {where} is {quoted(role)}, and should be one of {', '.join(ROLES)}")
    content, calls = value.get(form[1]), value.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"the tool_calls of {where} are {quoted(calls)}, and no list of objects")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"the {form[1]} of {where} is {quoted(content)}, and no text")
    more = {key: item for key, item in value.items() if key not in form and item is not None}
    return {"role": role, "content": _unicode(content), **more}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"the content of {where} has a part that is no text, but {quoted(kind)}")


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {quoted(value)}, and no text" if name in row else f"an object without '{name}'")
    return _unicode(value)


def _optional(row: dict[str, Any], name: str) -> str:
    return _text(row, name) if row.get(name) is not None else ""


def _unicode(text: str) -> str:
    """Returns the text with U+FFFD for each half of a surrogate pair, which JSON can write and UTF-8 can't."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
