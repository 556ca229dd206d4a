"""`run.py prepare --tokenizer PATH`: a tokenizer.json, or a Hugging Face folder, and training on what it made."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data import chunks, manifest, tokenizers
from jaxgpt.data.corpus import find_token_files
from tests.data import foreign_tokenizers as foreign
from tests.data.shapes import text

TEXT = text("one line a paragraph", 60_000)


def prepare(*words: str) -> manifest.Manifest:
    assert cli.main(["prepare", "--processes", "1", "--output", "out", *words]) == 0
    return manifest.verify(Path("out"))


def tokens_of(folder: str) -> list[int]:
    found = find_token_files(folder)
    assert found
    return np.concatenate([found.validation[:], found.train[:]]).tolist()


@pytest.mark.parametrize(
    "make", [foreign.with_added_tokens, foreign.with_prefix_space, foreign.of_llama2, foreign.unigram, foreign.bert]
)
def test_the_tokens_are_those_of_the_package_on_the_whole_text(work, monkeypatch, make):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1 << 12)
    Path("a.txt").write_text(TEXT)
    Path("tokenizer.json").write_text(foreign.file_of(make))
    made = prepare("a.txt", "--tokenizer", "tokenizer.json")
    assert made.tokenizer["name"] == "huggingface"
    assert "tokenizers" in made.versions
    expected = make()
    expected.encode_special_tokens = True
    start = [] if made.end_of_text is None else [made.end_of_text]
    start += expected.encode("").ids[:1]  # BERT's [CLS], which its post-processor puts before a text
    assert tokens_of("out") == start + expected.encode(TEXT, add_special_tokens=False).ids


def test_documents_are_kept_whole_and_too_long_ones_refused(work, monkeypatch, fails):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(chunks, "LONGEST_ROW_BYTES", 1 << 15)
    Path("a.txt").write_text(TEXT)
    Path("tokenizer.json").write_text(foreign.file_of(foreign.with_prefix_space))
    words = ("a.txt", "--tokenizer", "tokenizer.json", "--output", "out")
    message = fails("prepare", *words, "--processes", "1")
    assert "the document at byte offset 0 is longer than 32,768 bytes: give what separates documents by" in message
    made = prepare("a.txt", "--tokenizer", "tokenizer.json", "--separator", "\\n\\n")
    own = tokenizers.from_state(made.tokenizer)
    documents = [document for document in TEXT.split("\n\n") if document]
    ends = ["\n\n"] * (len(documents) - 1) + ["\n\n" if TEXT.endswith("\n\n") else ""]
    ids = [[own.end_of_text, *own.encode(d + end).tolist()] for d, end in zip(documents, ends, strict=True)]
    assert tokens_of("out") == [token for document in ids for token in document]


def test_a_folder_says_which_token_ends_a_text_as_for_its_weights(work):
    Path("hf").mkdir()
    Path("hf/tokenizer.json").write_text(foreign.file_of(foreign.with_added_tokens))
    Path("hf/config.json").write_text(json.dumps({"eos_token_id": 7}))
    Path("a.txt").write_text("some text\n" * 20)
    assert prepare("a.txt", "--tokenizer", "hf").end_of_text == 7


def test_another_file_of_the_same_name_is_not_gone_on_with(work, fails):
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_bytes(b"\xff")
    Path("t.json").write_text(foreign.file_of(foreign.with_prefix_space))
    words = ("a.txt", "b.txt", "--tokenizer", "t.json", "--output", "out", "--processes", "1", "--shard-tokens", "50")
    words = (*words, "--validation-tokens", "9")
    assert "b.txt is not UTF-8" in fails("prepare", *words)
    Path("t.json").write_text(foreign.file_of(foreign.byte_level))
    assert "was begun with other settings: tokenizer_sha256" in fails("prepare", *words)


def test_gpt2s_own_file_is_gpt2(work, fails):
    from jaxgpt.interop import huggingface_tokenizer
    from jaxgpt.options.config import Model

    files = huggingface_tokenizer.files_of(tokenizers.make("gpt2", ""), Model())
    Path("tokenizer.json").write_text(files["tokenizer.json"])
    Path("a.txt").write_text(TEXT)
    assert prepare("a.txt", "--tokenizer", "tokenizer.json").tokenizer == {"name": "gpt2"}
    assert "did you mean gpt2?" in fails("prepare", "a.txt", "--tokenizer", "gpt-2")
    assert "no-such.json: can't be read" in fails("prepare", "a.txt", "--tokenizer", "no-such.json")
