"""Parquet files: texts from any row on, by one rule for what has none, and bombs that are not unpacked."""

import tracemalloc

import pytest

from jaxgpt.data import chunks, documents, parquet
from jaxgpt.data.documents import Position, Rows, TextLayout
from jaxgpt.errors import UserError
from jaxgpt.evaluation import task_files

arrow = pytest.importorskip("pyarrow")
library = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def write(tmp_path):
    """A function that writes the columns to a file, and returns its path."""

    def make(columns, **options):
        library.write_table(arrow.table(columns), tmp_path / "a.parquet", **options)
        return tmp_path / "a.parquet"

    return make


def test_texts_are_read_from_any_row_on(write):
    texts = [f"text {number}" * (number % 7) for number in range(500)]
    path = write({"id": range(500), "text": texts}, row_group_size=60)
    assert parquet.row_count(path) == 500
    for first in (0, 1, 59, 60, 61, 499, 500):
        found = list(parquet.texts(path, "text", first))
        assert [(value.row, value.text) for value in found] == list(enumerate(texts))[first:]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_null_and_nothing_are_empty(write, kind):
    values = arrow.array(["one", None, "", "two"])
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(getattr(arrow, kind)())
    rows = Rows()
    (piece,) = chunks.cut(write({"text": values}), TextLayout(), Position())
    assert [document.text for document in documents.of(piece, rows)] == ["one", "two"]
    assert (rows.empty, rows.bad) == (2, 0)


def test_text_that_is_not_utf_8_is_bad(write):
    values = arrow.Array.from_buffers(
        arrow.string(), 2, [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), arrow.py_buffer(b"ok\xff\xfe")]
    )
    rows = Rows()
    (piece,) = chunks.cut(write({"text": values}), TextLayout(), Position())
    assert [document.text for document in documents.of(piece, rows)] == ["ok"]
    assert rows.bad == 1
    assert "row 1: not UTF-8" in rows.first_bad


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"a": 1}, None], [b"a", b"b"]])
def test_a_column_of_something_else_is_told(write, values):
    with pytest.raises(UserError, match="not text"):
        list(parquet.texts(write({"text": values}), "text"))


def test_a_column_that_there_is_not_is_told_without_control_characters(write):
    with pytest.raises(UserError, match=r"has no column 'text' \(--field\). Its columns: \\x1b\[2Jx"):
        list(parquet.texts(write({"\x1b[2Jx": ["a"]}), "text"))


def test_a_page_that_is_packed_too_well_is_not_read(write):
    bomb = write({"text": ["x" * (1 << 20)] * 66}, compression="zstd", use_dictionary=False, data_page_size=1 << 30)
    assert bomb.stat().st_size < 20_000
    before = arrow.default_memory_pool().max_memory()
    with pytest.raises(UserError, match="no text is packed that well"):
        list(parquet.texts(bomb, "text"))
    assert arrow.default_memory_pool().max_memory() == before


@pytest.mark.parametrize("kind", [arrow.string(), arrow.dictionary(arrow.int32(), arrow.string())])
def test_a_text_that_stands_in_many_rows_is_kept_once(tmp_path, kind):
    """6 GB of text in less than a kilobyte: each row is a document, and few are in memory."""
    table = arrow.table({"text": arrow.DictionaryArray.from_arrays([0] * 6000, ["x" * (1 << 20)])})
    library.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=kind != arrow.string())
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    tracemalloc.start()
    count = 0
    for piece in chunks.cut(tmp_path / "a.parquet", TextLayout(), Position()):
        assert piece.size() <= 2 * chunks.PIECE_BYTES
        count += len(piece.values)
        if count > 60:
            break
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert arrow.total_allocated_bytes() < 256 << 20


@pytest.mark.parametrize("damage", [0, 100, -200, -20, -6])
def test_damage_is_told(write, damage):
    path = write({"text": [f"a text {number}" for number in range(3000)]}, compression="zstd")
    data = bytearray(path.read_bytes())
    data[damage : damage + 5] = b"\xff\xff\xff\xff\xff" if damage != -6 else b"\xff\xff\xff\xff\x7f"
    path.write_bytes(data)
    message, found = str(path), 3000
    try:
        found = len(list(parquet.texts(path, "text")))  # nothing may have noticed it
    except UserError as error:
        message = str(error)
    assert (str(path) in message, found) == (True, 3000)


def packed_number(value: int, length: int) -> bytes:
    """Returns Thrift's bytes of a positive number, in so many of them."""
    return bytes((value * 2 >> 7 * i & 127) | (128 if i < length - 1 else 0) for i in range(length))


def test_a_page_that_unpacks_to_more_than_the_metadata_say_is_not_read(write):
    """The page's own header, which is what Arrow makes room for, may state another size."""
    bomb = write({"text": ["x" * (65 << 20)]}, compression="zstd", use_dictionary=False, write_statistics=False)
    stated = packed_number(library.read_metadata(bomb).row_group(0).column(0).total_uncompressed_size, 4)
    data = bomb.read_bytes()
    assert stated in data
    bomb.write_bytes(data.replace(stated, packed_number(1_000_000, 4)))
    assert library.read_metadata(bomb).row_group(0).column(0).total_uncompressed_size == 1_000_000
    with pytest.raises(UserError, match="no text is packed that well"):
        list(parquet.texts(bomb, "text"))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"write_page_index": True}], ids=str)
def test_the_pages_sizes_are_those_of_the_metadata(write, version, options):
    """The pages' headers come on top, of which there are some of each size."""
    texts = [f"text {number} " * (number % 70) for number in range(3000)]
    path = write({"text": texts}, row_group_size=700, data_page_size=2000, data_page_version=version, **options)
    with path.open("rb") as file:
        found = library.read_metadata(path)
        for group in range(found.num_row_groups):
            column = found.row_group(group).column(0)
            unpacked = parquet.unpacked_size(file, column, path.stat().st_size)
            assert 0.9 < unpacked / column.total_uncompressed_size < 1


def test_damaged_pages_end_in_a_message(write):
    """Every third byte is damaged in turn, the page's header too: the file is read or refused with this error."""
    path = write({"text": ["one", "two", "three"] * 9}, compression="none")
    whole = path.read_bytes()
    for place in range(4, len(whole) - 4, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            rows = list(parquet.texts(path, "text"))
        except UserError:
            continue
        assert len(rows) <= 27


@pytest.mark.parametrize("reader", ["texts", "task"])
def test_a_row_that_points_beyond_its_columns_dictionary_is_told(write, reader):
    values = arrow.array(["one", "two", "three"]).dictionary_encode()
    path = write({"text": values}, compression="none", write_statistics=False)
    content = path.read_bytes()
    indices = b"\x02\x03\x24\x00"  # two bits for each, eight in a run: 0, 1, 2
    assert content.count(indices) == 1
    path.write_bytes(content.replace(indices, b"\x02\x03\x34\x00"))  # 0, 1, 3
    with pytest.raises(UserError, match=r"damaged|can't be read"):
        list(parquet.texts(path, "text") if reader == "texts" else task_files._parquet_rows(path))
