"""Files of text cut into pieces of about a megabyte, which several processes can tokenize, each on its own.

What comes out doesn't depend on where the pieces end: they end where a document does, or in a document at a place where
every tokenizer here ends a token too, that is behind a line break with a letter or a digit on its other side and no
white space on this one. Where 64 MiB have neither, they end anyway.

- text: a file is one document, or documents with a separator between them
- jsonl: a line is an object, whose field is a document
- parquet: a row is a document; a row group is a piece
"""

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from jaxgpt.errors import UserError

PIECE_BYTES = 1 << 20
LONGEST_BYTES = 64 << 20
TAIL_BYTES = 1 << 16  # where a place to cut is looked for first

Kind = Literal["text", "jsonl", "parquet"]
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
CUT = re.compile(r"\S\n(?=\w)")


class Layout(NamedTuple):
    """How documents lie in files."""

    field: str = "text"  # of a JSON object, or the column of a Parquet file
    separator: str = ""  # between the documents of a text file, which is one document where this is empty


class Position(NamedTuple):
    """Where a piece begins."""

    file: int = 0  # its number among the files
    offset: int = 0  # in bytes, of what is in the file once it is unpacked; for Parquet the number of the row group
    begins: bool = True  # whether a document begins here


class Piece(NamedTuple):
    path: str
    kind: Kind
    layout: Layout
    position: Position
    data: bytes  # none of a Parquet file: who tokenizes it reads it
    read: int  # how many of the file's bytes were read up to its end, as they are on the disk


def kind_of(path: Path) -> Kind | None:
    """By the end of its name, without that of a packed file; None where that tells nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def cut(path: Path, layout: Layout, start: Position) -> Iterator[Piece]:
    """The pieces of a file from `start` on. UserError where it can't be read or is damaged."""
    kind = kind_of(path) or "text"
    if kind == "parquet":
        groups, size = parquet_file(path).num_row_groups, path.stat().st_size
        for group in range(start.offset, groups):
            position = start._replace(offset=group)
            yield Piece(str(path), kind, layout, position, b"", size * (group + 1) // groups)
        return
    with _reading(path), path.open("rb") as raw, _unpacked(path, raw) as stream:
        _skip(stream, start.offset)
        data, position = b"", start
        while True:
            more = stream.read(PIECE_BYTES - len(data) % PIECE_BYTES)
            data += more
            end, begins = (len(data), True) if not more else _end(data, kind, layout.separator, path, position)
            if end:
                yield Piece(str(path), kind, layout, position, data[:end], raw.tell())
                position = Position(position.file, position.offset + end, begins)
                data = data[end:]
            if not more:
                return


def _end(data: bytes, kind: Kind, separator: str, path: Path, position: Position) -> tuple[int, bool]:
    """Where a piece that begins with `data` ends, and whether a document begins there; 0 if it needs more data."""
    if not data or len(data) % PIECE_BYTES:  # a file may give less than it was asked for
        return 0, False
    if kind == "jsonl":
        end = data.rfind(b"\n") + 1
        if not end and len(data) >= LONGEST_BYTES:
            raise UserError(f"{path}: the line at byte offset {position.offset} is longer than {LONGEST_BYTES:,} bytes")
        return end, True
    if separator:
        ends = [match.end() for match in re.finditer(re.escape(separator.encode()), data)]
        if ends:
            return ends[-1], True
    end = _safe_end(data, len(data) - TAIL_BYTES) or _safe_end(data, 0)
    if not end and len(data) >= LONGEST_BYTES:
        end = _character_start(data, len(data) - 1)
    return end, False


def _safe_end(data: bytes, start: int) -> int:
    """The last place to cut at behind `start`; 0 if there is none."""
    start = _character_start(data, max(start, 0))
    tail = data[start:].decode("utf-8", "surrogateescape")
    last = 0
    for match in CUT.finditer(tail):
        last = match.end()
    return start + len(tail[:last].encode("utf-8", "surrogateescape")) if last else 0


def _character_start(data: bytes, place: int) -> int:
    """The first byte of the UTF-8 character that the byte at `place` is of."""
    while place and 0x80 <= data[place] < 0xC0:
        place -= 1
    return place


def _skip(stream: BinaryIO, count: int) -> None:
    if isinstance(stream, io.BufferedReader):  # of a file that is not packed
        stream.seek(count)
        return
    while count and (skipped := len(stream.read(min(count, PIECE_BYTES)))):
        count -= skipped


@contextlib.contextmanager
def _unpacked(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """What is in the file, of the kind of packing that its name tells."""
    if path.suffix.lower() == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream  # type: ignore[misc]
    elif path.suffix.lower() == ".zst":
        yield extra("pyarrow").CompressedInputStream(raw, "zstd")
    else:
        yield raw


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """UserError where what is done in it fails to read the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are OSError or ValueError
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def extra(module: str) -> Any:
    """A module of the extra `data`."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs the package {module}, of the extra `data`: make env EXTRAS=data") from None


def parquet_file(path: Path) -> Any:
    parquet = extra("pyarrow.parquet")
    with _reading(path):
        return parquet.ParquetFile(path)


# From a piece to its documents


class Document(NamedTuple):
    text: str
    begins: bool  # False for the rest of one that began in an earlier piece


def documents(piece: Piece) -> Iterator[Document]:
    """What is in a piece, but for empty documents. UserError, with file and byte offset, where it is damaged."""
    if piece.kind == "parquet":
        texts = _parquet_texts(piece)
    elif piece.kind == "jsonl":
        texts = _jsonl_texts(piece)
    else:
        yield from _text_documents(piece)
        return
    for text in texts:
        if text:
            yield Document(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True)


def _text_documents(piece: Piece) -> Iterator[Document]:
    separator, begins = piece.layout.separator, piece.position.begins
    text = _decoded(piece.data, piece.path, piece.position.offset)
    if piece.position.offset == 0:
        text = text.removeprefix("\ufeff")
    parts = text.split(separator) if separator else [text]
    kept = separator if separator.isspace() else ""
    for i, part in enumerate(parts):
        document = part + kept if i < len(parts) - 1 else part
        if document:
            yield Document(document, begins)
        begins = True


def _jsonl_texts(piece: Piece) -> Iterator[str]:
    offset, field = piece.position.offset, piece.layout.field
    for line in piece.data.split(b"\n"):
        where = f"{piece.path}, at byte offset {offset}"
        try:
            value = json.loads(line) if line.strip() else {field: ""}
        except ValueError as error:
            raise UserError(f"{where}: the line is no JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            fields = ", ".join(sorted(value)[:20]) if isinstance(value, dict) else "none"
            raise UserError(f"{where}: the object has no text in a field {field!r} (--field). Its fields: {fields}")
        yield value[field]
        offset += len(line) + 1


def _parquet_texts(piece: Piece) -> Iterator[str]:
    file, column = parquet_file(Path(piece.path)), piece.layout.field
    if column not in file.schema_arrow.names:
        raise UserError(
            f"{piece.path} has no column {column!r} (--field). Its columns: {', '.join(file.schema_arrow.names)}"
        )
    with _reading(Path(piece.path)):
        for batch in file.iter_batches(256, row_groups=[piece.position.offset], columns=[column]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise UserError(f"{piece.path}: the column {column} has {type(text).__name__}, not text (--field)")
                yield text or ""


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at byte offset {offset + error.start} "
            f"({error.reason}); convert it to UTF-8, or leave it out"
        ) from None
