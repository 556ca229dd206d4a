"""Llama 3's tokenizer: the file, its 256 special tokens, and tiktoken's ids beside those of `tokenizers`."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest

from jaxgpt.data import encodings, llama3, tokenizers
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, huggingface_tokenizer
from jaxgpt.options.config import Model
from tests.data.foreign_tokenizers import AWKWARD, TEXT

SIZE = 400  # of the small stand-in: the bytes, and what merges of them make


def small() -> list[bytes]:
    texts = ["the then they the dog dogs lazy over 123 123 日本 café\r\n\r\n don't "] * 9
    return encodings.train(texts, SIZE + 1)


def write(path: Path, tokens: list[bytes]) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file in Meta's format with fewer ranks, where "!" has the first, as it has there."""
    tokens = small()
    monkeypatch.setattr(llama3, "RANKS", len(tokens))
    monkeypatch.setattr(llama3, "BEGIN_OF_TEXT", len(tokens))
    monkeypatch.setattr(llama3, "END_OF_TEXT", len(tokens) + 1)
    tokens.remove(b"!")
    path = tmp_path / "tokenizer.model"
    write(path, [b"!", *tokens])
    return path


def test_there_are_256_special_tokens():
    assert len(set(llama3.SPECIAL)) == 256
    known = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    known |= {8: "eom_id", 10: "python_tag", 12: "reserved_special_token_2", 255: "reserved_special_token_245"}
    for number, name in known.items():
        assert llama3.SPECIAL[number] == f"<|{name}|>"


def test_a_given_file_has_tiktokens_ids(file, monkeypatch):
    named = huggingface_tokenizer.read_file(file)
    assert isinstance(named, HuggingFace)
    monkeypatch.setenv("JAXGPT_DATA", str(file.parent))
    file.rename(file.parent / llama3.FILE)
    by_name = tokenizers.BytePairs("llama3", llama3.encoding.__wrapped__(), 0)
    for text in (TEXT, AWKWARD, "the dog<|eot_id|>", "Thequick1234"):
        assert named.encode(text).tolist() == by_name.encode(text).tolist()
        assert named.encode(text, special=True).tolist() == by_name.encode(text, special=True).tolist()
    first = llama3.RANKS
    assert named.encode("<|eot_id|>", special=True).tolist() == [first + 9]
    assert (named.begin_of_text, named.end_of_text, named.vocabulary_size) == (first, first + 1, first + 256)


def test_a_folder_may_have_it(file):
    model = Model(layers=1, heads=2, width=8, context=32, vocabulary_size=60000)
    tokenizer, notes = huggingface_tokenizer.read(file.parent, model, end_of_text=llama3.RANKS + 9)
    assert tokenizer is not None
    assert (tokenizer.end_of_text, notes) == (llama3.RANKS + 9, ())
    source = detect_format.WeightSource("x", "x", model, "float32", None, dict)  # type: ignore[arg-type]
    given = detect_format.with_tokenizer(source, str(file)).tokenizer
    assert given is not None
    assert given.end_of_text == llama3.RANKS + 1


def test_its_tokenizer_json_is_that_of_transformers(file):
    convert = pytest.importorskip("transformers.convert_slow_tokenizer", reason="the parity extra installs it")
    theirs = convert.TikTokenConverter(
        vocab_file=str(file), pattern=llama3.PATTERN, extra_special_tokens=list(llama3.SPECIAL)
    )
    expected = json.loads(theirs.converted().to_str())
    ours = json.loads(json.dumps(llama3.tokenizer_json(llama3.read(file))))
    for part in ("model", "added_tokens", "pre_tokenizer", "normalizer"):
        assert ours[part] == expected[part]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIQ== 1\n", "it has 2 ranks"),
        (b"IQ== 0\nI 1\n", "is not Llama 3's tokenizer.model"),
        (b"IQ== 0\nIg== x\n", "invalid literal for int"),
        (b"IQ== 0\nIg== 5\n", "it has 2 ranks"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        huggingface_tokenizer.read_file(path)


def test_one_with_a_token_twice_or_without_a_byte_is_refused(file):
    tokens = llama3.read(file)
    write(file, [*tokens[:-1], tokens[0]])
    with pytest.raises(UserError, match="different ones"):
        llama3.read(file)
    write(file, [*(token + b"~" * (token == b"z") for token in tokens)])
    with pytest.raises(UserError, match="not each of the 256 bytes"):
        llama3.read(file)


@pytest.mark.skipif(importlib.util.find_spec("llama_models") is None, reason="the extra llama3 brings Meta's file")
def test_metas_own_file_has_the_ids_that_meta_publishes():
    tokenizer = tokenizers.make("llama3", "")
    assert tokenizer.vocabulary_size == 128_256
    assert tokenizer.begin(tokenizer.encode("This is a test sentence.")).tolist() == [
        128000, 2028, 374, 264, 1296, 11914, 13
    ]  # fmt: skip
    there = HuggingFace(huggingface_tokenizer.files_of(tokenizer, Model())["tokenizer.json"])
    for text in (TEXT, AWKWARD):
        assert there.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert tokenizer.decode(tokenizer.encode(text)) == text
