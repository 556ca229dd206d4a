"""Parses rows of JSON, one on each line or in one list, in a piece of a file."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt import foreign_text
from jaxgpt.foreign_text import quoted, shown

# A whole string, or the quotation mark of one that doesn't end; brackets and braces; a comma.
_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)


class Row(NamedTuple):
    offset: int  # in the piece
    text: str  # empty where the field is null
    wrong: str = ""  # why it has no text


def of_lines(data: bytes, field: str) -> Iterator[Row]:
    """Yields the rows of JSON lines. Lines end at newlines alone, and blank lines are passed over."""
    offset = 0
    for line in data.split(b"\n"):
        if line.strip():
            yield _row(line, offset, field)
        offset += len(line) + 1


def of_list(data: bytes, field: str) -> Iterator[Row]:
    """Yields the rows of a part of a list, up to the list's end."""
    start = 0
    for place, closes in _ends(data):
        yield from _row_between(data, start, place, field)
        start = place + 1
        if closes:
            return
    yield from _row_between(data, start, len(data), field)


def last_end(data: bytes) -> tuple[int, bool]:
    """Returns the place behind the last row that is whole, 0 where there is none, and whether the list ends there."""
    last = 0
    for place, closes in _ends(data):
        last = place + 1
        if closes:
            return last, True
    return last, False


def _ends(data: bytes) -> Iterator[tuple[int, bool]]:
    """Yields the place of each comma between a list's rows, with False, and of its closing bracket, with True."""
    depth = 0
    for mark in _MARKS.finditer(data):
        match mark[0]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}" if depth:
                depth -= 1
            case b"]":
                yield mark.start(), True
                return
            case b"," if not depth:
                yield mark.start(), False
            case b'"':  # the beginning of a string that doesn't end
                return


def _row_between(data: bytes, start: int, end: int, field: str) -> Iterator[Row]:
    row = data[start:end]
    if row.strip():
        yield _row(row, start + len(row) - len(row.lstrip()), field)


def _row(data: bytes, offset: int, field: str) -> Row:
    try:
        value = foreign_text.parse_json(data)
    except ValueError as error:
        return Row(offset, "", f"no JSON: {shown(error)}")
    if not isinstance(value, dict):
        return Row(offset, "", f"{quoted(value)}, where an object is expected")
    if field not in value:
        fields = ", ".join(shown(name, 40) for name in sorted(value)[:20])
        return Row(offset, "", f"an object without a field '{shown(field)}' (--field). Its fields: {fields or 'none'}")
    text = value[field]
    if text is None:
        return Row(offset, "")
    if not isinstance(text, str):
        return Row(offset, "", f"an object whose field '{shown(field)}' is {quoted(text)}, and no text (--field)")
    return Row(offset, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
