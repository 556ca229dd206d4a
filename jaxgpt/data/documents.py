"""Pieces of text files, the documents in them, and the rows of JSON and Parquet that have none.

- text: a file is one document, or documents with a separator between them
- jsonl: each line is a row, an object with a field that holds a document
- json: a list of such rows, or one row on each line
- parquet: each row is a document
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxgpt import foreign_text
from jaxgpt.data import parquet
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown

Kind = Literal["text", "jsonl", "json", "parquet"]
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".parquet": "parquet",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")

# A whole string, or the quotation mark of one that doesn't end; brackets and braces; a comma.
_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)


class TextLayout(NamedTuple):
    """Layout of the documents in the files."""

    field: str = "text"  # the field of a JSON object, or the column of a Parquet file, that holds the text
    separator: str = ""  # between the documents of a text file; empty: the file is one document
    whole: bool = False  # never cut within a document, for a tokenizer that needs all of it


class Position(NamedTuple):
    """The beginning of a piece."""

    file: int = 0  # index in the list of files
    offset: int = 0  # byte offset in the unpacked content; for Parquet the row number
    begins: bool = True  # a document begins here


class Chunk(NamedTuple):
    path: str
    kind: Kind
    layout: TextLayout
    position: Position
    data: bytes  # empty for a Parquet file, which has `values`
    read: int  # bytes of the file on the disk (packed) that were read up to the piece's end
    values: tuple[parquet.Value, ...] = ()

    def size(self) -> int:
        """Returns the approximate number of bytes that the piece takes in memory."""
        return len(self.data) + sum(len(value.text or "") for value in self.values)

    def emptied(self) -> "Chunk":
        """Returns the piece without its text."""
        return self._replace(data=b"", values=())


def kind_of(path: Path) -> Kind | None:
    """Returns a file's kind by its suffix, not counting that of a packed file; None for a suffix that is not known."""
    return SUFFIXES.get(unpacked_name(path).suffix.lower())


def unpacked_name(path: Path) -> Path:
    """Returns the path without the suffix that says how the file is packed."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def separators(separator: str) -> re.Pattern[str]:
    r"""Returns a pattern that finds a separator, whose line breaks may be \r\n in the text."""
    return re.compile(r"\r?\n".join(re.escape(part) for part in separator.replace("\r\n", "\n").split("\n")))


# Documents


class Document(NamedTuple):
    text: str
    begins: bool  # False for the rest of a document that began in an earlier piece


@dataclass
class Rows:
    """Counts of the rows of JSON and Parquet that gave no document."""

    empty: int = 0  # without text: null, or ""
    bad: int = 0  # damaged, or with something other than text in the field
    first_bad: str = ""  # where it is, and what is wrong with it
    option: str = "--skip-bad"  # which lets bad ones be left out

    def add(self, other: "Rows") -> None:
        """Adds the counts of `other`."""
        self.empty += other.empty
        self.bad += other.bad
        self.first_bad = self.first_bad or other.first_bad

    def add_bad(self, where: str, wrong: object, most: int) -> None:
        """Counts a bad row. UserError where more than `most` are."""
        self.add(Rows(bad=1, first_bad=f"{where}: {wrong}"))
        self.check(most)

    def check(self, most: int) -> None:
        """Raises a UserError where more than `most` rows are bad."""
        if self.bad > most:
            begun = f"more than {self.option} {most} rows are bad. The first: " if most else ""
            raise UserError(f"{begun}{self.first_bad}. Mend it, or have up to N bad rows left out with {self.option} N")


def of(piece: Chunk, rows: Rows) -> Iterator[Document]:
    """Yields the documents of a piece that are not empty, and counts the rows without one. UserError for bad UTF-8."""
    if piece.kind == "text":
        yield from _of_text(piece)
        return
    for where, text, wrong in _rows(piece):
        if wrong:
            rows.add(Rows(bad=1, first_bad=f"{shown(piece.path)}, {where}: {wrong}"))
        elif not text:
            rows.empty += 1
        else:
            yield Document(text, True)


def _rows(piece: Chunk) -> Iterator[tuple[str, str, str]]:
    """Yields the place of each row, its text, and what is wrong with it, both of which may be empty."""
    if piece.kind == "parquet":
        for value in piece.values:
            yield f"row {value.row:,}", value.text or "", value.wrong
        return
    for offset, row in (_elements if piece.kind == "json" else _lines)(piece.data):
        yield f"at byte offset {piece.position.offset + offset:,}", *_text_of(row, piece.layout.field)


def _of_text(piece: Chunk) -> Iterator[Document]:
    separator, begins = piece.layout.separator, piece.position.begins
    text = _decoded(piece)
    start = 0
    for match in separators(separator).finditer(text) if separator else ():
        document = text[start : match.end() if separator.isspace() else match.start()]
        if document:
            yield Document(document, begins)
        start, begins = match.end(), True
    if start < len(text):
        yield Document(text[start:], begins)


def _decoded(piece: Chunk) -> str:
    offset = piece.position.offset
    try:
        text = piece.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown(piece.path)} is not UTF-8 text: byte 0x{piece.data[error.start]:02x} at byte offset "
            f"{offset + error.start:,} ({error.reason}); convert it to UTF-8, or leave it out"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


# Rows of JSON


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that aren't blank, each with its offset. Lines end at newlines alone."""
    offset = 0
    for line in data.split(b"\n"):
        if line.strip():
            yield offset, line
        offset += len(line) + 1


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the rows of a part of a list up to the list's end, each with its offset."""
    start = 0
    for end, closes in itertools.chain(_ends(data), [(len(data), True)]):
        if (row := data[start:end]).strip():
            yield start + len(row) - len(row.lstrip()), row
        start = end + 1
        if closes:
            return


def last_row_end(data: bytes) -> tuple[int, bool]:
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


def _text_of(row: bytes, field: str) -> tuple[str, str]:
    """Returns the text in a row's field, empty where it is null, and why there is none."""
    try:
        value = foreign_text.parse_json(row)
    except ValueError as error:
        return "", f"no JSON: {shown(error)}"
    if not isinstance(value, dict):
        return "", f"{quoted(value)}, where an object is expected"
    if field not in value:
        fields = ", ".join(shown(name, 40) for name in sorted(value)[:20]) or "none"
        return "", f"an object without a field '{shown(field)}' (--field). Its fields: {fields}"
    text = value[field]
    if text is None:
        return "", ""
    if not isinstance(text, str):
        return "", f"an object whose field '{shown(field)}' is {quoted(text)}, and no text (--field)"
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), ""
