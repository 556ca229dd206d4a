"""A text that is cut where it is said to be safe has the same tokens, for every tokenizer and in text of any shape."""

import functools
import itertools

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from jaxgpt.data import encodings, safe_cuts
from tests.data.shapes import SHAPES, text

NAMES = ("r50k", "cl100k", "o200k", "llama3")


@functools.cache
def pattern(name: str) -> str:
    """The tokenizer's own pattern, without its ranks, which would be downloaded."""
    if name == "r50k":
        return openai_public.r50k_pat_str
    if name == "llama3":
        return encodings.LLAMA3_PATTERN
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
    return [match.start() for match in safe_cuts.CUT.finditer(whole)]


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
    """Most often in a few kilobytes; where there is none in less than twice the text."""
    data, scanned = text(shape, 400_000).encode(), []
    found = safe_cuts._last_in
    monkeypatch.setattr(safe_cuts, "_last_in", lambda part: scanned.append(len(part)) or found(part))
    place = safe_cuts.last(data, len(data))
    if shape == "only line breaks":
        assert (place, sum(scanned) < 2 * len(data)) == (0, True)
    else:
        assert len(data) - 400 < place < len(data)
        assert sum(scanned) <= safe_cuts.WINDOW_BYTES + 4


def test_a_cut_is_never_within_a_character():
    data = ("a🙂" * 50 + " ").encode()
    for end in range(1, len(data) + 1):
        data[: safe_cuts.last(data, end)].decode()
        data[: safe_cuts.character_start(data, end - 1)].decode()
    assert safe_cuts.last(b"\x80" * 5000, 5000) == 0  # no UTF-8
    assert safe_cuts.last(b"", 0) == safe_cuts.last(b"a b", -5) == 0
