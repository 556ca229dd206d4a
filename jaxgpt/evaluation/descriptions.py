"""Descriptions of tasks whose answers are drawn and compared with the right ones, and the examples of such a task.

A description is a TOML or JSON file:

    data = "capitals.jsonl"                    # JSON lines, beside the description; NAME.toml=FILE names another
    prompt = "Question: {question}\\nAnswer:"  # fields of a line in braces
    answer = "{capital}"                       # the right one; a field that is a list has several
    match = "normalised"                       # exact, normalised, number, or regex
    stop = ["\\n"]

Its fields are those of `Description`. GSM8K (Cobbe et al. 2021, arXiv:2110.14168) is one of them, and has its prompts
from lm-evaluation-harness: an answer ends with "#### 18".
"""

import dataclasses
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.evaluation import expressions
from jaxgpt.evaluation.generative import Question
from jaxgpt.evaluation.task_files import read_lines
from jaxgpt.evaluation.tasks import Malformed, Row
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.command_line import nearest

Match = Literal["exact", "normalised", "number", "regex"]
MOST_TOKENS, MOST_SHOTS = 1 << 16, 1000


@dataclass(frozen=True)
class Description:
    """A task.

    Attributes:
        data: Its file of JSON lines.
        prompt: What a base model goes on with; {field} stands for a field of the line, or the first of its list.
        answer: The right answer, in the same form. Where it is one field that is a list, each of it is right.
        message: What an assistant is asked; empty for the prompt.
        shown_answer: The answer of an example that is shown; empty for a space and the answer.
        separator: What stands between shown examples.
        answer_pattern: A regular expression that takes the right answer out of `answer`.
        pattern: A regular expression whose first match in what was drawn, or its first group, is the answer; empty for
            all of it.
        last_pattern: Another one, whose last match counts as an answer for `accuracy_last`.
        match: How they are compared: as they are, but for white space around them (exact); without case, punctuation,
            articles and more than one space (normalised, as SQuAD does it); without commas, $ and a point at the end
            (number); or the right one is a regular expression that is to be found (regex).
        stop: Texts that end an answer.
        tokens: The most tokens of an answer.
        shots: Answered examples that are shown before each.
        examples: The file that they are from; empty for `data`, of which a question is never shown before itself.
    """

    data: str = ""
    prompt: str = ""
    answer: str = ""
    message: str = ""
    shown_answer: str = ""
    separator: str = "\n\n"
    answer_pattern: str = ""
    pattern: str = ""
    last_pattern: str = ""
    match: Match = "exact"
    stop: tuple[str, ...] = ()
    tokens: int = 64
    shots: int = 0
    examples: str = ""


GSM8K = Description(
    prompt="Question: {question}\nAnswer:",
    message="{question}",
    answer="{answer}",
    answer_pattern=r"####\s*(-?\$?[0-9][0-9.,]*)",
    pattern=r"####\s*(-?\$?[0-9][0-9.,]*)",
    last_pattern=r"-?\$?[0-9][0-9,]*(?:\.[0-9]+)?",
    match="number",
    stop=("Question:",),
    tokens=256,
)
BUILT_IN = {"gsm8k": GSM8K}
SUFFIXES = (".toml", ".json")


class Example(NamedTuple):
    """A question, and the answers that are right."""

    question: Question
    right: tuple[str, ...]


def read_description(path: Path) -> Description:
    """Returns the description of a task. UserError where the file has none."""
    table = files.read_toml(path) if path.suffix == ".toml" else files.read_json(path, files.LARGEST_TOML)
    where, fields = shown(path), {field.name: field.default for field in dataclasses.fields(Description)}
    for key, value in table.items():
        if key not in fields:
            raise UserError(
                f"{where}: there is no {shown(key)} of a task{nearest(key, fields)} There are: {', '.join(fields)}"
            )
        table[key] = _value(f"{where}: {key}", fields[key], value)
    description = Description(**table)
    for key in ("prompt", "answer"):
        if not table.get(key):
            raise UserError(f"{where}: {key} is missing, which every task has")
    if description.match not in get_args(Match):
        raise UserError(
            f"{where}: match is {quoted(description.match)}, and must be one of {', '.join(get_args(Match))}"
        )
    for key, least, most in (("tokens", 1, MOST_TOKENS), ("shots", 0, MOST_SHOTS)):
        if not least <= (value := getattr(description, key)) <= most:
            raise UserError(f"{where}: {key} is {shown(value)}, and must be from {least} to {most:,}")
    if not all(description.stop):
        raise UserError(f"{where}: stop has an empty text, which would end every answer at once")
    for key in ("prompt", "answer", "message", "shown_answer"):
        _parts(getattr(description, key), f"{where}: {key}")
    for key in ("answer_pattern", "pattern", "last_pattern"):
        expressions.compiled(getattr(description, key), f"{where}: {key}")
    return description


def _value(where: str, default: Any, value: Any) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where} is {quoted(value)}, and must be a list of texts")
        return tuple(value)
    if type(value) is not type(default):
        raise UserError(f"{where} is {quoted(value)}, and must be {'a number' if type(default) is int else 'a text'}")
    return value


def read_examples(description: Description, name: str, path: Path) -> list[Example]:
    """Returns the examples in a file of JSON lines. UserError for a line that the description doesn't fit."""
    parts = {
        key: _parts(getattr(description, key), f"{shown(name)}: {key}")
        for key in ("prompt", "answer", "message", "shown_answer")
    }
    pattern = expressions.compiled(description.answer_pattern, f"{shown(name)}: answer_pattern")
    searches = expressions.Searches()

    def read(row: Row) -> Example:
        prompt, answers = _filled(parts["prompt"], row), _answers(parts["answer"], row)
        message = _filled(parts["message"], row) if description.message else prompt
        said = _filled(parts["shown_answer"], row) if description.shown_answer else f" {answers[0]}"
        right = answers
        if description.answer_pattern:
            found = [searches.first(pattern, answer) for answer in answers]
            right = tuple(one for one in found if one is not None)
            if len(right) < len(answers):
                raise Malformed(f"there is no {quoted(description.answer_pattern)} in the answer {quoted(answers[0])}")
        if description.match == "regex":
            for one in right:
                _expression(one)
        return Example(Question(prompt, said, message, said.strip()), right)

    return read_lines(path, name, read)


def _expression(text: str) -> None:
    try:
        expressions.compiled(text, "the answer")
    except UserError as error:
        raise Malformed(str(error)) from None


Parts = list[tuple[str, str | None]]  # a text, and the field after it


def _parts(template: str, where: str) -> Parts:
    """Returns the texts and fields of a template. UserError for braces that are around no field's name."""
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where} is {quoted(template)} ({error}); a brace itself is written twice") from None
    for _, field, form, conversion in found:
        if field is not None and (form or conversion or not field or re.search(r"[.\[]", field)):
            raise UserError(
                f"{where} is {quoted(template)}: in braces may be the name of a field; a brace itself is written twice"
            )
    return [(text, field) for text, field, *_ in found]


def _filled(parts: Parts, row: Row) -> str:
    return "".join(text + ("" if field is None else _text(row, field)) for text, field in parts)


def _answers(parts: Parts, row: Row) -> tuple[str, ...]:
    """Returns the right answers."""
    if [text for text, _ in parts] == [""] and isinstance(values := row.get(parts[0][1] or ""), list):
        if not values:
            raise Malformed(f"{parts[0][1]} is an empty list, and has no right answer")
        return tuple(_text({"one": value}, "one", parts[0][1]) for value in values)
    return (_filled(parts, row),)


def _text(row: Row, key: str, called: str | None = None) -> str:
    """Returns a field that is a text or a number, or of a list of them the first."""
    value = row.get(key)
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, str) or type(value) in (int, float):
        return str(value)
    name = shown(called or key)
    raise Malformed(f"{name} is missing" if value is None else f"{name} is {quoted(value)}, and must be a text")
