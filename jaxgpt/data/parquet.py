"""Reads texts from a column of a Parquet file, a few rows at a time: a row group need not fit into memory.

A file of some hundred kilobytes can unpack to terabytes: a page that unpacks to gigabytes, or one long text to which
millions of rows refer. So the size that a column states is compared with its size on the disk, and a column that is
packed unusually well is read row by row.

A page is unpacked as a whole, into as many bytes as its own header states. Each header stands before its page, as a
struct in Thrift's compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md). These of its
fields are used here (github.com/apache/parquet-format, parquet.thrift):

    PageHeader: 2 uncompressed_page_size, 3 compressed_page_size, 5 data_page_header, 8 data_page_header_v2
    both of these headers: 1 num_values
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxgpt import files
from jaxgpt.data import unpacking
from jaxgpt.data.unpacking import extra
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

ROWS = 16  # rows that are read at once
USUAL_RATIO = 20  # of a column's unpacked size to its size on the disk; above it, rows are read one by one
LARGEST_RATIO = 200  # above it, the column is refused
SMALL_BYTES = 64 << 20  # a column of a row group may have this unpacked size, whatever its ratio
TEXT_TYPES = ("string", "large_string", "string_view")
LARGEST_HEADER = 1 << 24  # bytes, as Arrow limits it; a header may contain values of the page
DEEPEST = 8  # structs within structs
MOST_PAGES = 1 << 19  # of one column in a row group
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _, STRUCT = range(13)  # types of fields
INTEGERS = (I16, I32, I64)


class Value(NamedTuple):
    row: int  # number of the row in the file
    text: str | None
    wrong: str = ""  # why there is no text; empty where the value is null


def rows(path: Path, columns: list[str] | None, first: int = 0) -> Iterator[tuple[int, Any]]:
    """Yields batches of rows of a Parquet file from row `first` on, each with the number of its first row.

    Without `columns` all are read. UserError where the file can't be read, is damaged, or states a size that no packed
    text has.
    """
    arrow, library = extra("pyarrow"), extra("pyarrow.parquet")
    _metadata(path)
    with files.open_file(path) as raw:
        size, number, group = os.fstat(raw.fileno()).st_size, 0, 0
        try:
            with library.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 16) as file:
                for group in range(file.num_row_groups):
                    about = file.metadata.row_group(group)
                    if number + about.num_rows <= first:
                        number += about.num_rows
                        continue
                    with files.open_file(path) as pages:
                        at_once = _rows_at_once(path, pages, group, about, columns, size)
                    for batch in file.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
                        if number + len(batch) > first:
                            skipped = max(first - number, 0)
                            yield number + skipped, batch.slice(skipped)
                        number += len(batch)
        except (OSError, ValueError, arrow.ArrowException) as error:  # a UserError is not caught here
            raise UserError(
                f"cannot read {shown(path)}: damaged in row group {group}, behind row {number:,} ({shown(error)}). "
                "Restore it from a copy"
            ) from None


def _rows_at_once(path: Path, file: BinaryIO, group: int, about: Any, columns: list[str] | None, size: int) -> int:
    """Returns how many rows to read at once of a row group with pyarrow's metadata `about`, in a file of `size` bytes.

    UserError where the metadata or the pages state sizes that no packed text has; ValueError for damaged page headers.
    """
    at_once = ROWS
    for column in (about.column(number) for number in range(about.num_columns)):
        if columns is not None and column.path_in_schema.split(".")[0] not in columns:
            continue
        packed = min(column.total_compressed_size, size)
        stated = max(column.total_uncompressed_size, unpacked_size(file, column, size))
        if stated > max(SMALL_BYTES, LARGEST_RATIO * packed) or stated < 0 or packed < 0:
            raise UserError(
                f"{shown(path)}: row group {group} says that its column {shown(column.path_in_schema)} has {stated:,} "
                f"bytes, packed to {packed:,}: no text is packed that well. It is not read"
            )
        if stated > USUAL_RATIO * packed or about.num_rows > packed:
            at_once = 1
    return at_once


def texts(path: Path, column: str, first: int = 0) -> Iterator[Value]:
    """Yields the texts of a column from row `first` on. UserError as `rows`, and where the file has no such column."""
    _check_column(path, column)
    for number, batch in rows(path, [column], first):
        for row, value in enumerate(batch.column(0), number):
            try:
                yield Value(row, value.as_py())
            except UnicodeDecodeError as error:
                yield Value(row, None, f"not UTF-8 ({error.reason})")
            except IndexError as error:  # of a row into the dictionary of the column's texts
                raise UserError(
                    f"cannot read {shown(path)}: damaged at row {row:,} ({shown(error)}). Restore it from a copy"
                ) from None


def row_count(path: Path) -> int:
    """Returns the number of rows that the file's metadata state. UserError where it is not a Parquet file."""
    return _metadata(path).num_rows


def _check_column(path: Path, column: str) -> None:
    schema = _metadata(path).schema.to_arrow_schema()
    if column not in schema.names:
        names = ", ".join(shown(name, 40) for name in schema.names[:20])
        raise UserError(f"{shown(path)} has no column '{shown(column)}' (--field). Its columns: {names}")
    kind = schema.field(schema.names.index(column)).type
    if str(getattr(kind, "value_type", kind)) not in TEXT_TYPES or str(kind).startswith(("list", "large_list")):
        raise UserError(f"{shown(path)}: the column '{shown(column)}' has {shown(kind)}, not text (--field)")


def _metadata(path: Path) -> Any:
    arrow, library = extra("pyarrow"), extra("pyarrow.parquet")
    with files.open_file(path) as raw:
        head = raw.read(unpacking.HEAD_BYTES)
        raw.seek(0)
        try:
            return library.read_metadata(raw)
        except (OSError, ValueError, arrow.ArrowException) as error:
            reason = unpacking.known(head) if not head.startswith(b"PAR1") else f"damaged ({shown(error)})"
            raise UserError(f"cannot read {shown(path)}: {reason or 'not a Parquet file'}") from None


# Pages


def unpacked_size(file: BinaryIO, column: Any, size: int) -> int:
    """Returns the bytes that all pages of a column (pyarrow's metadata) unpack to, by their headers.

    ValueError where the headers are damaged, or lead out of the file of `size` bytes.
    """
    dictionary = column.dictionary_page_offset
    place = min(dictionary or column.data_page_offset, column.data_page_offset)
    values, total, pages = 0, 0, 0
    while values < column.num_values:
        pages += 1
        if pages > MOST_PAGES:
            raise ValueError(f"more than {MOST_PAGES:,} pages")
        header, length = _header(file, place, size)
        unpacked, packed = header.get(2), header.get(3)
        if not (isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 and packed >= 0):
            raise ValueError(f"the page at byte offset {place:,} has no sizes")
        total += unpacked
        data = header.get(5) or header.get(8) or {}
        count = data.get(1, 0) if isinstance(data, dict) else 0
        values += max(count if isinstance(count, int) else 0, 0)
        place += length + packed
    return total


def _header(file: BinaryIO, place: int, size: int) -> tuple[dict[int, Any], int]:
    """Returns the page header at a byte offset, and its length in bytes."""
    try:
        if not 0 <= place < size:
            raise EOFError
        file.seek(place)
        reader = _Reader(file)
        return reader.struct(), LARGEST_HEADER - reader.left
    except EOFError:
        raise ValueError(f"no page begins at byte offset {place:,}") from None


class _Reader:
    """Reads a Thrift struct as a dict from field numbers to integers and structs; all other values are None."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, LARGEST_HEADER

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > DEEPEST:
            raise ValueError("structs within structs")
        fields: dict[int, Any] = {}
        number = 0
        while (byte := self._byte()) & 15 != STOP:
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            kind = byte & 15
            fields[number] = None if kind in (TRUE, FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in INTEGERS:
            return self._signed()
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (LIST, SET):
            byte = self._byte()
            for _ in range(self._unsigned() if byte >> 4 == 15 else byte >> 4):
                self._value(byte & 15, depth + 1)
        elif kind == BINARY:
            self._read(self._unsigned())
        elif kind in (TRUE, FALSE, BYTE, DOUBLE):  # truth values in a list; a field's are in its type
            self._read(8 if kind == DOUBLE else 1)
        else:  # a page header has no maps
            raise ValueError(f"a field of type {kind}")
        return None

    def _read(self, count: int) -> bytes:
        self.left -= count
        data = self._file.read(count) if self.left >= 0 else b""
        if len(data) < count:
            raise EOFError
        return data

    def _byte(self) -> int:
        return self._read(1)[0]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
