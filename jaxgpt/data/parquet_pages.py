"""Unpacked sizes that the page headers of a Parquet column state, which its metadata need not agree with.

A page is unpacked as a whole, into as many bytes as its own header states. Each header stands before its page, as a
struct in Thrift's compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md). These of its
fields are used here (github.com/apache/parquet-format, parquet.thrift):

    PageHeader: 2 uncompressed_page_size, 3 compressed_page_size, 5 data_page_header, 8 data_page_header_v2
    both of these headers: 1 num_values
"""

from typing import Any, BinaryIO

HEADER_BYTES = 1 << 12  # read at first; a header may be longer, since it may contain values of the page
LARGEST_HEADER = 1 << 24  # Arrow's own limit
DEEPEST = 8  # structs within structs
MOST_PAGES = 1 << 19  # of one column in a row group
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _, STRUCT = range(13)  # types of fields
INTEGERS = (I16, I32, I64)


class TooShort(Exception):
    """Raised where the bytes end before the struct does."""


def unpacked_size(file: BinaryIO, column: Any, size: int) -> int:
    """Returns the bytes that all pages of a column in a row group unpack to, by their headers.

    Args:
        file: The Parquet file.
        column: The column's metadata, a pyarrow object.
        size: The file's bytes.

    Raises:
        ValueError: The headers are damaged, or lead out of the file.
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
    count = HEADER_BYTES
    while 0 <= place < size and count <= LARGEST_HEADER:
        file.seek(place)
        data = file.read(count)
        reader = _Reader(data)
        try:
            return reader.struct(), reader.place
        except TooShort:
            if len(data) < count:
                break
            count *= 16
    raise ValueError(f"no page begins at byte offset {place:,}")


class _Reader:
    """Reads a Thrift struct as a dict from field numbers to integers and structs; all other values are None."""

    def __init__(self, data: bytes) -> None:
        self._data, self.place = data, 0

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
            self._pass_over(self._unsigned())
        elif kind in (TRUE, FALSE, BYTE, DOUBLE):  # truth values in a list; a field's are in its type
            self._pass_over(8 if kind == DOUBLE else 1)
        else:  # a page header has no maps
            raise ValueError(f"a field of type {kind}")
        return None

    def _pass_over(self, count: int) -> None:
        self.place += count
        if self.place > len(self._data):
            raise TooShort

    def _byte(self) -> int:
        self._pass_over(1)
        return self._data[self.place - 1]

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
