"""A tokenizer.json here beside the package `tokenizers` itself: ids, text, streaming, and what is refused."""

import json
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import tokenizers
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import StreamDecoder
from jaxgpt.errors import UserError
from tests.data import foreign_tokenizers
from tests.data.foreign_tokenizers import TEXT, each, file_of, theirs

TEXTS = st.text() | st.text(st.sampled_from(TEXT + "the dog 123"), max_size=40)


@each
@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
def test_the_ids_are_those_of_the_package(make, text):
    ours, their = HuggingFace(file_of(make)), theirs(make)
    for sample in (TEXT, text):
        expected = their.encode(sample, add_special_tokens=False).ids
        assert ours.encode(sample, special=True).tolist() == expected
        assert ours.decode(expected) == their.decode(expected, skip_special_tokens=False)
    assert ours.vocabulary_size == their.get_vocab_size()


@each
def test_special_tokens_of_a_text_are_its_characters_unless_asked_for(make):
    ours, their = HuggingFace(file_of(make)), theirs(make)
    special = [number for number, token in their.get_added_tokens_decoder().items() if token.special]
    names = " ".join(their.id_to_token(number) for number in special)
    assert set(ours.encode(names, special=True).tolist()) >= set(special)
    assert not set(ours.encode(names).tolist()) & set(special)
    ordinary = [number for number, token in their.get_added_tokens_decoder().items() if not token.special]
    for number in ordinary:
        assert number in ours.encode(f"a {their.id_to_token(number)} b").tolist()


@each
def test_streaming_goes_on_with_a_text(make):
    """The prompt may end anywhere: its text and the streamed one are together the whole text."""
    ours = HuggingFace(file_of(make))
    ids = ours.encode(TEXT, special=True).tolist()
    whole = ours.decode(ids)
    for end in range(1, len(ids)):
        stream = StreamDecoder(ours)
        pieces = [stream(number) for number in ids[end:]] + [stream.finish()]
        before = ours.decode(ids[:end])
        if not before.endswith("\ufffd"):  # else the prompt ends within a character
            assert before + "".join(pieces) == whole


@each
def test_a_character_is_streamed_when_it_is_whole(make):
    ours = HuggingFace(file_of(make))
    ids = ours.encode("a🎭").tolist()
    stream = StreamDecoder(ours)
    pieces = [stream(number) for number in ids] + [stream.finish()]
    assert "\ufffd" not in "".join(pieces)
    assert sum("🎭" in piece for piece in pieces) == 1


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_byte_level_tokens_joined_are_the_text(data):
    """This holds for any ids, also where they are not UTF-8."""
    for make in (foreign_tokenizers.byte_level, foreign_tokenizers.of_llama3):
        ours = HuggingFace(file_of(make))
        ids = data.draw(st.lists(st.integers(0, ours.vocabulary_size - 1)))
        stream = StreamDecoder(ours)
        streamed = "".join([stream(number) for number in ids]) + stream.finish()
        assert streamed == ours.join(ids).decode("utf-8", "replace") == ours.decode(ids)


@each
def test_the_state_makes_the_same_tokenizer(make):
    ours = HuggingFace(file_of(make), end_of_text=3)
    again = tokenizers.from_state(json.loads(json.dumps(ours.state())))
    assert isinstance(again, HuggingFace)
    assert (again.text, again.end_of_text, again.state()) == (file_of(make), 3, ours.state())
    assert np.array_equal(again.encode(TEXT), ours.encode(TEXT))


def test_ids_without_a_token():
    content = json.loads(file_of(foreign_tokenizers.byte_level))
    content["model"]["vocab"]["far"] = 1000
    ours = HuggingFace(json.dumps(content))
    assert ours.vocabulary_size == 1001
    assert (ours.tokens[999], ours.tokens[1000]) == (b"", b"far")
    assert ours.decode([999]) == ""
    with pytest.raises(UserError, match="token 1001 at position 0 is not in the vocabulary"):
        ours.decode([1001])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update(x=4294967295), "ids up to 4,294,967,295, where a tokenizer has from 1"),
        (lambda c: c["model"]["vocab"].update(x=-1), "can't read it .*integer `-1`"),
        (lambda c: c["model"]["vocab"].clear(), "can't read it"),
        (lambda c: c.pop("model"), "there is no model in it"),
        (lambda c: c.update(model=[]), "there is no model in it"),
        (lambda c: c["model"].update(type="Neural"), "can't read it"),
        (lambda c: c["model"].update(dropout=0.1), "has dropout, with which a text gets other tokens each time"),
        (lambda c: c["model"].update(merges=[["t", "nothing"]]), "can't read it"),
        (lambda c: c["model"].update(merges=[["t", "h", "e"]]), "can't read it"),
        (lambda c: c["model"].update(continuing_subword_prefix="éé"), "can't read it"),  # Rust panics
        (lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "can't read it"),
        (lambda c: c.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), "can't read it"),
        (lambda c: c.update(added_tokens="x"), "can't read it"),
    ],
)
def test_a_file_that_is_none(change, message, capfd):
    content = json.loads(file_of(foreign_tokenizers.byte_level))
    change(content)
    with pytest.raises(UserError, match=message):
        HuggingFace(json.dumps(content))
    assert capfd.readouterr() == ("", "")  # no trace of Rust's


def replace(old: dict, new: str) -> dict:
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(parts), "decoders": list(parts)}


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (
            foreign_tokenizers.unigram,
            lambda c: c["model"]["vocab"].append(["a" * 20_000, -1.0]),
            "a token has 20,000 characters, where a Unigram's have 512 at most",
        ),
        (
            foreign_tokenizers.bert,
            lambda c: c["model"].update(max_input_chars_per_word=10**9),
            "max_input_chars_per_word is 1000000000, and may be 256",
        ),
        (
            foreign_tokenizers.bert,
            lambda c: c.update(normalizer=sequence(*[replace({"String": "a"}, "a" * 10)] * 30)),
            "its normalizer replaces within what it has replaced",
        ),
        (
            foreign_tokenizers.of_llama2,
            lambda c: c.update(decoder=sequence(sequence(replace({"Regex": "a+"}, "a" * 2000)))),
            "its decoder replaces within what it has replaced",
        ),
    ],
)
def test_what_would_take_a_short_text_very_long(make, change, message):
    content = json.loads(file_of(make))
    change(content)
    with pytest.raises(UserError, match=message):
        HuggingFace(json.dumps(content))


def test_many_short_replacements_are_as_usual():
    content = json.loads(file_of(foreign_tokenizers.bert))
    content["normalizer"] = sequence(*[replace({"String": "..."}, "…"), replace({"String": "``"}, "''")] * 30)
    assert HuggingFace(json.dumps(content)).encode("the ``quick").size


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "[" * 100_000, '{"model":' * 70 + "0" + "}" * 70, '{"model":{"vocab":' + "9" * 5000]
)
def test_text_that_is_no_object(text):
    with pytest.raises(UserError, match=r"not JSON|no model"):
        HuggingFace(text)


@pytest.mark.parametrize("end_of_text", [-1, 10**6, "3", 1.0, True, [3]])
def test_a_damaged_state_is_refused(end_of_text):
    with pytest.raises(UserError, match="the end of text is token"):
        tokenizers.from_state(
            {"name": "huggingface", "file": file_of(foreign_tokenizers.bert), "end_of_text": end_of_text}
        )
    with pytest.raises(UserError):
        tokenizers.from_state({"name": "huggingface", "file": 3})


def test_a_text_that_it_has_no_tokens_for():
    content = json.loads(file_of(foreign_tokenizers.byte_level))
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    with pytest.raises(UserError, match=r"can't encode the text .*Missing \[UNK\]"):
        HuggingFace(json.dumps(content)).encode("b")
    with pytest.raises(UserError, match="half a surrogate pair"):
        HuggingFace(file_of(foreign_tokenizers.bert)).encode("a\ud800")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="this tokenizer needs the extra `data`: make env EXTRAS=data"):
        HuggingFace(file_of(foreign_tokenizers.bert))


HOSTILE_PATTERN = {"type": "Split", "pattern": {"Regex": "(a*)*b|((x+x+)+y)"}, "behavior": "Isolated", "invert": False}


def test_a_pattern_that_a_text_makes_panic(capfd):
    """The message alone is printed, and what another thread prints meanwhile is not lost."""
    content = json.loads(file_of(foreign_tokenizers.byte_level)) | {"pre_tokenizer": HOSTILE_PATTERN}
    tokenizer = HuggingFace(json.dumps(content))
    with pytest.raises(UserError, match="can't encode the text"):
        tokenizer.encode("a" * 3000 + "x" * 40)
    assert capfd.readouterr() == ("", "")
    assert tokenizer.encode("the").size
    os.write(2, b"as before")
    assert capfd.readouterr().err == "as before"


def test_threads_that_encode_together_leave_the_standard_error_as_it_was(capfd):
    tokenizer = HuggingFace(file_of(foreign_tokenizers.byte_level))

    def work() -> None:
        for _ in range(200):
            tokenizer.encode(TEXT)
            os.write(2, b"x")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == "x" * 800
