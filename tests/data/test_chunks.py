"""Files cut into pieces: of every shape the same tokens, in memory and work that a piece bounds; rows by one rule.

A text that is cut where it is said to be safe has the same words, for every tokenizer and in text of any shape.
"""

import functools
import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from jaxgpt.data import chunks, documents, llama3, tokenizers, workers
from jaxgpt.data.documents import Position, Rows, TextLayout
from jaxgpt.errors import UserError
from tests.data.shapes import SHAPES, text

PIECE = 1 << 14


@pytest.fixture
def small(monkeypatch):
    """Pieces of 16 KiB, so that a short text has many."""
    monkeypatch.setattr(chunks, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(chunks, "LONGEST_WORD_BYTES", 4 * PIECE)


def write(path: Path, whole: str) -> Path:
    path.write_bytes(whole.encode())
    return path


PLAIN = TextLayout()


def texts_of(path: Path, layout: TextLayout = PLAIN, rows: Rows | None = None) -> list[str]:
    """The documents of a file, put together again."""
    found: list[str] = []
    for piece in chunks.cut(path, layout, Position()):
        for document in documents.of(piece, rows or Rows()):
            if document.begins:
                found.append("")
            found[-1] += document.text
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_pieces_are_those_of_the_whole(tmp_path, small, shape):
    whole = text(shape, 3 * PIECE)
    path, gpt2 = write(tmp_path / "a.txt", whole), tokenizers.make("gpt2", "")
    found = list(chunks.cut(path, TextLayout(), Position()))
    assert shape == "only line breaks" or len(found) > 2
    tokens = [token for piece in found for token in workers.tokenize_with(gpt2, piece).tokens.tolist()]
    assert tokens == [gpt2.end_of_text, *gpt2.encode(whole).tolist()]
    for piece in found:  # from any piece on the pieces are the same
        assert next(chunks.cut(path, TextLayout(), piece.position)) == piece


@pytest.mark.parametrize("layout", [TextLayout(), TextLayout(separator="\n\n\n\n\n")])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_a_few_pieces_and_work_grows_with_the_text(tmp_path, small, monkeypatch, shape, layout):
    """Counted: the bytes that are scanned for a place to cut at, of a text and of one of twice its size."""
    scanned = []
    find = chunks._last_in
    monkeypatch.setattr(chunks, "_last_in", lambda data: scanned.append(len(data)) or find(data))
    for times in (1, 2):
        path = write(tmp_path / f"{times}.txt", text(shape, PIECE * 16) * times)
        scanned.clear()
        tracemalloc.start()
        for piece in chunks.cut(path, layout, Position()):
            assert len(piece.data) <= 4 * PIECE
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * PIECE  # half of the smaller text
        assert sum(scanned) <= (4 if shape == "only line breaks" else 1) * path.stat().st_size


def test_a_separator_is_found_whatever_the_line_ends(tmp_path, small):
    paragraphs = [f"{number}. " + "a b " * (number % 50) for number in range(3000)]
    for end in ("\n", "\r\n"):
        path = write(tmp_path / "a.txt", (2 * end).join(paragraphs))
        found = texts_of(path, TextLayout(separator="\n\n"))
        assert found == [paragraph + 2 * end for paragraph in paragraphs[:-1]] + paragraphs[-1:]


def test_a_separator_is_never_cut_in_two(tmp_path, small):
    """A part of it, "d|o" or "1|x", would by itself be a place to cut at."""
    paragraphs = ["word 1x " * length for length in (3000, 2047, 2048, 10, 9000)]
    path = write(tmp_path / "a.txt", "end 1of 2text".join(paragraphs))
    assert texts_of(path, TextLayout(separator="end 1of 2text")) == paragraphs


def rows_in(folder: Path, name: str, values: list) -> Path:
    """A file with these values in its field `text`, as lines or as a list."""
    rows = [json.dumps({"n": [1, {"x": "],{"}], "text": value}) for value in values]
    return write(folder / name, "[\n" + " ,\n".join(rows) + "\n]\n" if name.endswith(".json") else "\n\r\n".join(rows))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json"])
def test_rows_of_lines_and_of_a_list(tmp_path, small, name):
    values = [f'text {number} "[{{\\' * (number % 300) for number in range(200)] + ["x" * 5 * PIECE]
    path = rows_in(tmp_path, "a.jsonl" if name == "lines.json" else name, values)
    rows = Rows()
    assert texts_of(path.rename(tmp_path / name), rows=rows) == [value for value in values if value]
    assert (rows.empty, rows.bad) == (1, 0)


VALUES = ["one", None, "", 3, ["a"], {"a": 1}, True, "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_null_is_empty_and_other_values_are_bad(tmp_path, name):
    rows = Rows()
    assert texts_of(rows_in(tmp_path, name, VALUES), rows=rows) == ["one", "two"]
    assert (rows.empty, rows.bad) == (2, 4)
    assert "an object whose field 'text' is 3, and no text (--field)" in rows.first_bad
    rows.check(4)
    with pytest.raises(UserError, match="--skip-bad 3 rows are bad"):
        rows.check(3)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("[" * 100_000, "no JSON: more than 64 arrays"),
        ('{"text": "' + "a" * 50, "no JSON"),
        ("7" * 5000, "no JSON: a number of 5,000 digits"),
        ('"text"', "'text', where an object is expected"),
        ('{"\\u001b[2Jcontent": 1}', r"Its fields: \x1b[2Jcontent"),
    ],
)
def test_rows_that_are_bad_are_told_without_their_control_characters(tmp_path, line, wrong):
    rows = Rows()
    assert texts_of(write(tmp_path / "a.jsonl", '{"text": "one"}\n' + line), rows=rows) == ["one"]
    assert rows.first_bad.startswith(f"{tmp_path}/a.jsonl, at byte offset 16: ")
    assert wrong in rows.first_bad
    assert rows.first_bad.isprintable()


@pytest.mark.parametrize(
    ("end", "message"),
    [("", "the list of rows doesn't end"), ('] {"text": "b"}', "something stands behind the list"), (', "', "end")],
)
def test_a_list_that_is_none_is_told(tmp_path, end, message):
    path = write(tmp_path / "a.json", '\ufeff [{"text": "a"}' + end)
    with pytest.raises(UserError, match=message):
        texts_of(path)


def test_a_list_may_be_empty(tmp_path):
    assert texts_of(write(tmp_path / "a.json", "[ ]")) == []


def test_a_list_is_scanned_once_for_a_string_that_does_not_end():
    assert documents.last_row_end(b'{"a": 1}, "' + b"x" * 1000) == (9, False)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts_of(write(tmp_path / "a.txt", "\ufeffone")) == ["one"]
    assert texts_of(write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}')) == ["one"]


def test_lines_end_at_newlines_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\u0085b\u2028c"}\r\n{"text": "d\x7f"}\n')
    assert texts_of(path) == ["a\u0085b\u2028c", "d\x7f"]


# Safe places

NAMES = ("r50k", "cl100k", "o200k", "llama3")


@functools.cache
def pattern(name: str) -> str:
    """The tokenizer's own pattern, without its ranks, which would be downloaded."""
    if name == "r50k":
        return openai_public.r50k_pat_str
    if name == "llama3":
        return llama3.PATTERN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        return getattr(openai_public, f"{name}_base")()["pat_str"]


@functools.cache
def words_of(name: str):
    """A function that cuts a text into words as the pattern has it."""
    return pytest.importorskip("regex").compile(pattern(name)).findall


def check(name: str, whole: str, places: list[int]) -> None:
    """The words of the parts between the places are those of the whole."""
    words, ends = words_of(name), [0, *places, len(whole)]
    parts = [word for start, end in itertools.pairwise(ends) for word in words(whole[start:end])]
    assert parts == words(whole)


def cuts(whole: str) -> list[int]:
    return [match.start() for match in chunks.CUT.finditer(whole)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_words_of_every_shape_are_the_same_wherever_it_is_cut(name, shape):
    whole = text(shape, 3000)
    places = cuts(whole)
    assert shape == "only line breaks" or len(places) > 30
    check(name, whole, places)
    for place in places[:: max(1, len(places) // 20)]:
        check(name, whole, [place])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300)
@given(
    whole=st.text(
        st.sampled_from("aZ9é東。,!'/_ \t\n\r\x0b\x1c\u0085\u00a0\u2028\u3000\u200d\u0301🙂sTlL"), max_size=14
    )
)
def test_any_text_can_be_cut_there(name, whole):
    check(name, whole, cuts(whole))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_same_for_tiktoken(name):
    """Its own tokens, of which each word is one; what it cuts otherwise would be single bytes."""
    whole = "".join(text(shape, 600) for shape in SHAPES)
    single = {bytes([i]): i for i in range(256)}
    found = sorted({word.encode() for word in words_of(name)(whole)} - set(single), key=lambda word: (len(word), word))
    encoding = tiktoken.Encoding(
        name,
        pat_str=pattern(name),
        mergeable_ranks=single | {word: 256 + i for i, word in enumerate(found)},
        special_tokens={},
    )
    tokens = encoding.encode_ordinary(whole)
    assert len(tokens) == len(words_of(name)(whole))
    ends = [0, *cuts(whole), len(whole)]
    parts = [encoding.encode_ordinary(whole[start:end]) for start, end in itertools.pairwise(ends)]
    assert [token for part in parts for token in part] == tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_place_is_found_without_scanning_all(shape, monkeypatch):
    """It is mostly found in a few kilobytes; where there is none, in less than twice the text."""
    data, scanned = text(shape, 400_000).encode(), []
    found = chunks._last_in
    monkeypatch.setattr(chunks, "_last_in", lambda part: scanned.append(len(part)) or found(part))
    place = chunks.last_safe_cut(data, len(data))
    if shape == "only line breaks":
        assert (place, sum(scanned) < 2 * len(data)) == (0, True)
    else:
        assert len(data) - 400 < place < len(data)
        assert sum(scanned) <= chunks.WINDOW_BYTES + 4


def test_a_cut_is_never_within_a_character():
    data = ("a🙂" * 50 + " ").encode()
    for end in range(1, len(data) + 1):
        data[: chunks.last_safe_cut(data, end)].decode()
        data[: chunks.character_start(data, end - 1)].decode()
    assert chunks.last_safe_cut(b"\x80" * 5000, 5000) == 0  # no UTF-8
    assert chunks.last_safe_cut(b"", 0) == chunks.last_safe_cut(b"a b", -5) == 0
