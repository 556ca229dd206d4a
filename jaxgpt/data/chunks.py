r"""Cuts files of text into pieces of about a megabyte, so that several processes can tokenize them independently.

The tokens don't depend on where the pieces end: a piece ends where a document does, or within a document at a place
where every tokenizer of this package ends a token too. Where 4 MiB have neither, the piece ends anyway. A piece depends
only on the file's content from the piece's beginning on. So cutting can start again at the beginning of any piece, and
gives the same pieces as before.

GPT-2's tokenizer and similar ones cut a text into words by a pattern, and each word into tokens. A place is safe where,
for each of these patterns (GPT-2's, cl100k's, o200k's, Llama 3's), two conditions hold:

- A word of the whole text ends there. Then the text behind begins with a word whether or not it is cut, since no
  pattern looks back.
- The words before the place are the same without the text behind it. The patterns look ahead in white space alone. So
  this holds where the text before doesn't end in white space, or ends in one line break behind a character that isn't
  white space.

Of the places that satisfy both conditions these are used, which lie close together in text of any kind:

    word| word          before a space or tab that stands behind anything but white space
    word|\n             before a line break that stands behind a letter or digit
    end.\n|Next         behind one line break, where neither white space nor a slash follows (o200k joins ".\n/")
    word|,  文|。       between a letter or digit and a punctuation mark, but the apostrophe, which joins "don't"
    abc|123|abc         between letters and digits

The tokenizers of bytes and of characters can be cut anywhere.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.data import parquet, unpacking
from jaxgpt.data.documents import PACKED, Chunk, Kind, Position, TextLayout, kind_of, last_row_end, separators
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

PIECE_BYTES = 1 << 20
LONGEST_WORD_BYTES = 4 << 20  # a stretch of text without a safe place is cut at this length
LONGEST_ROW_BYTES = 16 << 20
CUT = re.compile(
    r"(?<=\S)(?=[ \t\u3000])"
    r"|(?<=[^\W_])(?=[\r\n!-&(-/:-@\[-`{-~、。「」『』【】（），．！？：；…—“”])"
    r"|(?<=\S\n)(?=[^\s/])"
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
WINDOW_BYTES = 1 << 12  # before the end, which are searched first
GROWTH = 16  # factor by which the window grows where it has no safe place


def cut(path: Path, layout: TextLayout, start: Position) -> Iterator[Chunk]:
    """Yields the pieces of a file from `start` on. UserError where the file can't be read or is damaged."""
    kind = kind_of(path) or "text"
    if kind == "parquet":
        if path.suffix.lower() in PACKED:
            raise UserError(f"{shown(path)}: a Parquet file is packed within itself, and isn't packed again. Unpack it")
        yield from _parquet_pieces(path, layout, start)
        return
    with unpacking.opened(path) as reader:
        head = reader.read(unpacking.HEAD_BYTES)
    unpacking.check_text(path, head)
    with unpacking.opened(path) as reader:
        if kind == "json" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            reader.skip(start.offset or head.index(b"[") + 1)
        else:
            kind = "jsonl" if kind == "json" else kind
            reader.skip(start.offset)
        yield from _pieces(reader, _Cutter(path, kind, layout), Chunk(str(path), kind, layout, start, b"", 0))


def _pieces(reader: unpacking.Reader, cutter: "_Cutter", first: Chunk) -> Iterator[Chunk]:
    """Yields the pieces from the reader's place on. `first` is the first one without its data."""
    data, place = b"", 0  # the bytes read so far, and where in them the next piece begins
    wanted, begins = PIECE_BYTES, first.position.begins
    while True:
        if place + wanted > len(data):
            data, place = data[place:] + reader.read(place + wanted - len(data)), 0
        window, offset = data[place : place + wanted], reader.offset - len(data) + place
        at_end = len(window) < wanted
        end, next_begins = cutter.end(window, offset, at_end)
        if not end and not at_end:
            wanted *= 2  # doubling keeps the work of repeated searches proportional to the data
            continue
        if end:
            position = Position(first.position.file, offset, begins)
            yield first._replace(position=position, data=window[:end], read=reader.raw.tell())
        if at_end:
            return
        place, wanted, begins = place + end, PIECE_BYTES, next_begins


class _Cutter:
    """Finds the ends of pieces in a text, in JSON lines, or in a list in JSON behind a comma between its rows."""

    def __init__(self, path: Path, kind: Kind, layout: TextLayout) -> None:
        self._path, self._kind, self._whole, separator = path, kind, layout.whole, layout.separator
        self._pattern = re.compile(separators(separator).pattern.encode()) if separator else None
        # A separator that is not wholly in the data yet may begin in their last bytes.
        self._longest = len(separator.encode()) + separator.count("\n")
        self._list_ended = False

    def end(self, data: bytes, offset: int, at_end: bool) -> tuple[int, bool]:
        """Returns the end of the piece that begins with `data`, read at `offset`, and whether a document begins there.

        Unless the data reach to the file's end, an end of 0 means that more are needed.
        """
        match self._kind:
            case "jsonl":
                end = len(data) if at_end else data.rfind(b"\n") + 1
                return self._checked(end, data, offset, "line")
            case "json":
                return self._list_end(data, offset, at_end)
        if at_end:
            return len(data), True
        if self._pattern:
            ends = [match.end() for match in self._pattern.finditer(data)]
            if ends:
                return ends[-1], True
        if self._whole:
            return self._checked(0, data, offset, "document", ": give what separates documents by --separator")
        end = last_safe_cut(data, len(data) - self._longest)
        if not end and len(data) >= LONGEST_WORD_BYTES:
            end = character_start(data, len(data) - 1)
        return end, False

    def _list_end(self, data: bytes, offset: int, at_end: bool) -> tuple[int, bool]:
        end = 0
        if not self._list_ended:
            end, self._list_ended = last_row_end(data)
        if self._list_ended:
            if data[end:].strip():
                raise UserError(
                    f"{shown(self._path)}, at byte offset {offset + end:,}: something stands behind the list of rows. "
                    "Write one row on each line, or one list"
                )
            return len(data), True
        if at_end:
            raise UserError(
                f"{shown(self._path)}: the list of rows doesn't end before the file does, at byte offset "
                f"{offset + len(data):,}. Restore it from a copy"
            )
        return self._checked(end, data, offset, "row")

    def _checked(self, end: int, data: bytes, offset: int, what: str, advice: str = "") -> tuple[int, bool]:
        """Returns `end`, and True. UserError where there is none, and the row or document is too long for memory."""
        if not end and len(data) >= LONGEST_ROW_BYTES:
            where = f"{shown(self._path)}: the {what} at byte offset {offset:,}"
            raise UserError(f"{where} is longer than {LONGEST_ROW_BYTES:,} bytes{advice}")
        return end, True


def _parquet_pieces(path: Path, layout: TextLayout, start: Position) -> Iterator[Chunk]:
    size, row_count = path.stat().st_size, max(parquet.row_count(path), 1)
    values, held = [], 0

    def piece(read: int) -> Chunk:
        position = Position(start.file, values[0].row)
        return Chunk(str(path), "parquet", layout, position, b"", read, tuple(values))

    for value in parquet.texts(path, layout.field, start.offset):
        if values and held >= PIECE_BYTES:
            yield piece(size * value.row // row_count)
            values, held = [], 0
        values.append(value)
        held += len(value.text or "")
        if held > LONGEST_ROW_BYTES + PIECE_BYTES:
            raise UserError(f"{shown(path)}: row {value.row:,} is longer than {LONGEST_ROW_BYTES:,} characters")
    if values:
        yield piece(size)


# Safe places


def last_safe_cut(data: bytes, end: int) -> int:
    """Returns the last safe place before byte `end` of UTF-8 text; 0 where there is none.

    Bytes that aren't UTF-8 are passed over: whoever tokenizes the text reports them. Most often a few kilobytes are
    scanned, and at most about the whole text once.
    """
    end = character_start(data, end - 1)  # the character that begins there may be incomplete
    width = WINDOW_BYTES
    while end:
        start = character_start(data, max(0, end - width))
        if place := _last_in(data[start:end]):
            return start + place
        if not start:
            break
        width *= GROWTH
    return 0


def _last_in(data: bytes) -> int:
    text = data.decode("utf-8", "surrogateescape")
    place = max((match.start() for match in CUT.finditer(text)), default=0)
    return len(text[:place].encode("utf-8", "surrogateescape"))


def character_start(data: bytes, place: int) -> int:
    """Returns the place of the first byte of the UTF-8 character that the byte at `place` belongs to."""
    for start in range(place, max(place - 4, -1), -1):
        if not 0x80 <= data[start] < 0xC0:
            return start
    return max(place, 0)
