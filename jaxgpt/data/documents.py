"""Extracts the documents of a piece of a file, and counts the rows that have none."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxgpt.data import chunks, json_rows
from jaxgpt.data.chunks import Chunk
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown


class Document(NamedTuple):
    text: str
    begins: bool  # False for the rest of a document that began in an earlier piece


@dataclass
class Rows:
    """Counts of the rows of JSON and Parquet that gave no document.

    Attributes:
        empty: Rows without text: null, or "".
        bad: Rows that are damaged, or have something other than text in the field.
        first_bad: Where the first bad row is, and what is wrong with it.
    """

    empty: int = 0
    bad: int = 0
    first_bad: str = ""

    def add(self, other: "Rows") -> None:
        """Adds the counts of `other`."""
        self.empty += other.empty
        self.bad += other.bad
        self.first_bad = self.first_bad or other.first_bad

    def check(self, most: int) -> None:
        """Raises a UserError where more than `most` rows are bad."""
        if self.bad > most:
            begun = f"more than --skip-bad {most} rows are bad. The first: " if most else ""
            raise UserError(f"{begun}{self.first_bad}. Mend it, or have up to N bad rows left out with --skip-bad N")


def of(piece: Chunk, rows: Rows) -> Iterator[Document]:
    """Yields the documents of a piece that are not empty, and counts the rows without a document in `rows`.

    Raises:
        UserError: The text isn't UTF-8. The message has the file and the byte offset.
    """
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
    found = json_rows.of_list if piece.kind == "json" else json_rows.of_lines
    for row in found(piece.data, piece.layout.field):
        yield f"at byte offset {piece.position.offset + row.offset:,}", row.text, row.wrong


def _of_text(piece: Chunk) -> Iterator[Document]:
    separator, begins = piece.layout.separator, piece.position.begins
    text = _decoded(piece)
    start = 0
    for match in chunks.separators(separator).finditer(text) if separator else ():
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
