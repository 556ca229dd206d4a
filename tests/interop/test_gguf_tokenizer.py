"""The tokenizers of GGUF files beside those that transformers makes of them."""

import dataclasses
import unicodedata

import pytest

from jaxgpt.commands import cli
from jaxgpt.data import manifest
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, gguf_header, gguf_tokenizer
from tests.data.foreign_tokenizers import AWKWARD, TEXT
from tests.interop import gguf_files
from tests.interop.gguf_files import byte_level, sentencepiece, state, write
from tests.interop.test_gguf import LLAMA

TEXTS = (*TEXT.split("\n"), *AWKWARD.split("\n"), "the dog 1234 thethe", "a<tool>b", "<think>the</think>", "")


def theirs(path):
    gguf_module = pytest.importorskip("transformers.integrations.gguf", reason="is compared with; the parity extra")
    architecture, found, _ = gguf_module.get_gguf_tokenizer(str(path))
    return gguf_module.convert_gguf_tokenizer(architecture, found)[0]


def written(path, tokenizer):
    model = dataclasses.replace(LLAMA, vocabulary_size=max(276, len(tokenizer["tokens"])))
    write(path, model, state(model), tokenizer=tokenizer)
    source = detect_format.open_weights(str(path))
    assert source.notes == ()
    assert source.tokenizer is not None
    return source.tokenizer


def test_sentencepieces_kind_has_the_ids_of_transformers(tmp_path):
    """The one exception is a text that begins with a space: transformers puts no further one before it."""
    ours = written(tmp_path / "m.gguf", sentencepiece())
    expected = theirs(tmp_path / "m.gguf")
    for text in TEXTS:
        text = text.lstrip(" ")
        if "<tool>" not in text and "<s>" not in text:  # behind them ours, as llama.cpp's, begins anew
            ids = expected.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, special=True).tolist() == ids, text
            assert ours.decode(ids) == expected.decode(ids, skip_special_tokens=False)
    assert ours.encode("  the").tolist() == [gguf_files.PIECES.index(piece) for piece in ("▁", "▁", "▁the")]
    assert ours.decode(ours.encode("  the")) == "  the"
    assert (ours.begin_of_text, ours.end_of_text) == (1, 2)
    assert ours.encode("a<tool>")[-1] == gguf_files.PIECES.index("<tool>")


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "default", "gpt-2"])
def test_a_byte_level_one_has_the_ids_of_transformers(tmp_path, pre):
    ours = written(tmp_path / "m.gguf", byte_level(pre))
    expected = theirs(tmp_path / "m.gguf")
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text)  # as Qwen's tokenizer.json does, and GGUF doesn't say
        text = text.replace("<|endoftext|>", "<|eot_id|>")  # transformers adds GPT-2's to any vocabulary
        ids = expected.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True).tolist() == ids, text
        assert ours.decode(ids) == expected.decode(ids, skip_special_tokens=False) == text
    assert (ours.begin_of_text, ours.end_of_text) == (262, 263)


def test_smollm_cuts_digits_apart(tmp_path):
    ours = written(tmp_path / "m.gguf", byte_level("smollm"))
    assert ours.decode([*ours.encode("12")]) == "12"
    assert len(ours.encode("12")) == 2  # though there is a token 12
    default = written(tmp_path / "d.gguf", byte_level("default"))
    assert len(default.encode("12")) == 1


def test_flags_of_what_stands_before_a_text(tmp_path):
    plain = written(tmp_path / "m.gguf", sentencepiece(add_bos_token=False, add_space_prefix=False))
    assert plain.begin_of_text is None
    assert plain.encode("the").tolist() == [gguf_files.PIECES.index(piece) for piece in ("t", "he")]
    assert plain.decode(plain.encode(" the")) == " the"
    assert written(tmp_path / "b.gguf", byte_level(add_bos_token=False)).begin_of_text is None


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (sentencepiece(model="rwkv"), "tokenizer.ggml.model is b'rwkv'; this version reads llama and gpt2"),
        (sentencepiece(tokens=["x"] * 276), "the token 'x' is there twice"),
        (sentencepiece(scores=[1.0]), "tokenizer.ggml.scores is no list of 276 numbers"),
        (sentencepiece(token_type=None, bos_token_id=276), "bos_token_id is 276, and there are 276 tokens"),
        (sentencepiece([*gguf_files.PIECES[:-1], "y" * 300]), "the token 'y+' has 300 characters"),
        (byte_level("poro"), "tokenizer.ggml.pre is 'poro'; this version reads llama-bpe"),
        (byte_level(merges=["t h e"]), "a merge that isn't two parts"),
        (byte_level(merges=["t zz"]), "can't read it"),
        (byte_level(tokens=None), "there is no list of texts tokenizer.ggml.tokens"),
    ],
)
def test_weights_with_another_tokenizer_open_without_it(tmp_path, tokenizer, message):
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA), tokenizer=tokenizer)
    if "300" in message:
        tokenizer["token_type"][-1] = 1
        write(tmp_path / "m.gguf", LLAMA, state(LLAMA), tokenizer=tokenizer)
    source = detect_format.open_weights(str(tmp_path / "m.gguf"))
    assert (source.tokenizer, source.unreadable_tokenizer) == (None, True)
    assert "its tokenizer can't be read" in source.notes[0]
    with pytest.raises(UserError, match=message):
        gguf_tokenizer.read(gguf_header.read(tmp_path / "m.gguf").values)


def test_the_text_of_a_fine_tuning_is_prepared_with_the_files_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = written(tmp_path / "m.gguf", sentencepiece())
    (tmp_path / "a.txt").write_text("the dog and the tea. " * 200)
    assert cli.main(["prepare", "a.txt", "--tokenizer", "m.gguf", "--output", "out", "--processes", "1"]) == 0
    made = manifest.read(tmp_path / "out")
    assert made is not None
    assert made.tokenizer == ours.state()
    write(tmp_path / "bare.gguf", LLAMA, state(LLAMA))
    with pytest.raises(UserError, match="a GGUF file without a tokenizer"):
        detect_format.tokenizer_of(tmp_path / "bare.gguf")
    given = detect_format.with_tokenizer(detect_format.open_weights("bare.gguf"), "m.gguf").tokenizer
    assert given is not None
    assert given.state() == ours.state()
