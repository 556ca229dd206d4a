"""`run.py prepare`: the same tokens whatever the form of the text, the number of processes and the kills on the way."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data import chunks, manifest, progress, token_files, tokenizers, workers
from jaxgpt.data.documents import Chunk, Position, TextLayout
from jaxgpt.errors import UserError

ROOT = Path(__file__).parents[2]
PLAY = "First Citizen:\nBefore we proceed, hear me.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou are resolved!"


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces so small that a short text has many."""
    monkeypatch.setattr(chunks, "PIECE_BYTES", 64)
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 16)
    monkeypatch.setattr(chunks, "LONGEST_WORD_BYTES", 1 << 14)


def prepare(*words: str) -> None:
    assert cli.main(["prepare", "--processes", "1", *words]) == 0


def tokens_of(folder: Path, split: str) -> list[int]:
    found = manifest.verify(folder)
    shards = [token_files.tokens_of(folder / shard.file) for shard in found.shards if shard.split == split]
    return np.concatenate(shards).tolist() if shards else []


def every(folder: Path) -> list[int]:
    return tokens_of(folder, "val") + tokens_of(folder, "train")


def documents(seed: int = 0, count: int = 40) -> list[str]:
    draw = random.Random(seed)
    words = ["the", "Hear", "café", "東京", "12345", "don't", "\n", "\n\n", "  ", "x/", "!\n", "🙂", "\t"]
    words = [word + space for word in words for space in ("", " ")]
    return ["".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(count)]


def expected(texts: list[str], tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Returns the tokens, made by the plainest means: the separator and the whole document, one after another."""
    return [token for text in texts for token in [tokenizer.end_of_text, *tokenizer.encode(text).tolist()]]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": i, "content": text}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.make("gpt2", "")


def test_documents_of_every_form_give_the_same_tokens(work, gpt2, small_pieces):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("backports.zstd")
    texts = documents()
    write_jsonl(Path("a.jsonl"), texts)
    lines = Path("a.jsonl").read_bytes()
    with gzip.open("b.jsonl.gz", "wb") as file:
        file.write(lines)
    with pyarrow.CompressedOutputStream("c.jsonl.zst", "zstd") as stream:
        stream.write(lines)
    parquet.write_table(pyarrow.table({"content": texts}), "d.parquet", row_group_size=7)
    Path("e.txt").write_text("<|endoftext|>".join(texts))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        prepare(name, "--field", "content", "--output", f"out-{name}")
        assert every(Path(f"out-{name}")) == expected(texts, gpt2)
    prepare("e.txt", "--separator", "<|endoftext|>", "--output", "out-e")
    assert every(Path("out-e")) == expected(texts, gpt2)
    assert manifest.read(Path("out-e")).documents == len(texts)


@pytest.mark.parametrize("name", ["gpt2", "bytes", "bpe"])
def test_where_a_long_document_is_cut_does_not_show(work, small_pieces, name):
    """The whole as one document, in pieces of 64 bytes."""
    text = "\n".join(documents(1)) + "\n" + (ROOT / "README.md").read_text()
    Path("long.txt").write_text(text)
    prepare("long.txt", "--output", "out", "--tokenizer", name, "--vocabulary-size", "300")
    tokenizer = tokenizers.from_state(manifest.read(Path("out")).tokenizer)
    before = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    assert every(Path("out")) == before + tokenizer.encode(text).tolist()
    cuts = list(chunks.cut(Path("long.txt"), TextLayout(), Position()))
    assert len(cuts) > 20
    assert b"".join(piece.data for piece in cuts).decode() == text


def test_text_without_any_place_to_cut_is_cut_between_characters(work, small_pieces):
    """Bounded memory comes first: here a few tokens may differ, and no character is lost."""
    text = "東京" * 30_000
    Path("long.txt").write_text(text)
    prepare("long.txt", "--output", "out")
    cuts = list(chunks.cut(Path("long.txt"), TextLayout(), Position()))
    assert max(len(piece.data) for piece in cuts) <= 1 << 14
    assert tokenizers.make("gpt2", "").decode(every(Path("out"))[1:]) == text


def test_white_space_between_documents_stays_and_the_first_tokens_are_for_validation(work, gpt2):
    Path("play.txt").write_text(PLAY)
    prepare("play.txt", "--separator", "\\n\\n", "--output", "out", "--validation-tokens", "10", "--shard-tokens", "8")
    parts = PLAY.split("\n\n")
    tokens = expected([part + "\n\n" for part in parts[:-1]] + parts[-1:], gpt2)
    assert (tokens_of(Path("out"), "val"), tokens_of(Path("out"), "train")) == (tokens[:10], tokens[10:])
    names = [shard.file for shard in manifest.read(Path("out")).shards]
    assert names[:3] == ["play_val_000000.bin", "play_val_000001.bin", "play_train_000002.bin"]
    assert len(names) == 2 + -(-(len(tokens) - 10) // 8)


def test_validation_can_have_sources_of_its_own(work, gpt2):
    Path("a.txt").write_text("to train on")
    Path("b.txt").write_text("to validate on")
    prepare("a.txt", "--validation", "b.txt", "--output", "out")
    assert tokens_of(Path("out"), "val") == expected(["to validate on"], gpt2)
    assert tokens_of(Path("out"), "train") == expected(["to train on"], gpt2)


def test_tiny_shakespeare_is_llm_cs(tmp_path):
    if not os.environ.get("JAXGPT_DATA"):
        pytest.skip("needs tinyshakespeare.txt in the folder JAXGPT_DATA")
    prepare("tinyshakespeare", "--output", str(tmp_path / "out"))
    training, validation = (token_files.tokens_of(path) for path in sorted((tmp_path / "out").glob("*.bin")))
    assert (len(training), len(validation)) == (305_260, 32_768)
    assert validation[:4].tolist() == [50256, 5962, 22307, 25]


def test_characters_are_those_of_all_the_text(work):
    Path("a.txt").write_text("abc")
    Path("b.txt").write_text("cde")
    prepare("a.txt", "b.txt", "--tokenizer", "characters", "--output", "out")
    assert every(Path("out")) == [0, 1, 2, 2, 3, 4]
    assert manifest.read(Path("out")).tokenizer == {"name": "characters", "characters": "abcde"}


def folder_digest(folder: Path) -> str:
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()


def test_the_number_of_processes_does_not_show(work, gpt2):
    write_jsonl(Path("a.jsonl"), documents(3, 4000))
    options = ["a.jsonl", "--field", "content", "--shard-tokens", "50000"]
    prepare(*options, "--output", "one")
    assert cli.main(["prepare", *options, "--output", "three", "--processes", "3"]) == 0
    assert folder_digest(Path("one")) == folder_digest(Path("three"))
    assert every(Path("one")) == expected(documents(3, 4000), gpt2)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_after_a_kill_the_same_command_goes_on(work, monkeypatch, small_pieces, form):
    """It is killed after every second shard, in the middle of documents and of files, until it is done."""
    texts = documents(4, 60)
    write_jsonl(Path("a.jsonl"), texts)
    if form == "jsonl.gz":
        Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    if form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"content": texts}), "a.parquet", row_group_size=9)
    Path("a.txt").write_text("\n".join(texts))
    Path("b.txt").write_text("the end")
    options = [f"a.{form}", "b.txt", "--field", "content", "--shard-tokens", "170"]
    prepare(*options, "--output", "whole")
    starts, shards = 0, 0
    original = token_files.Writer.close

    def killed(self):
        nonlocal shards
        shards += 1
        if shards % 3 == 0:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(token_files.Writer, "close", killed)
    while not Path("parts", manifest.NAME).exists():
        assert cli.main(["prepare", "--processes", "1", *options, "--output", "parts"]) in (0, 130)
        starts += 1
    assert starts > 5
    assert folder_digest(Path("whole")) == folder_digest(Path("parts"))


@pytest.mark.slow
def test_after_sigkill_on_several_processes(work):
    write_jsonl(Path("a.jsonl"), documents(5, 30_000))
    options = ["a.jsonl", "--field", "content", "--shard-tokens", "40000", "--processes", "2"]
    assert cli.main(["prepare", *options, "--output", "whole"]) == 0
    command = [sys.executable, str(ROOT / "run.py"), "prepare", *options, "--output", "parts"]
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = len(list(Path("parts").glob("*.bin")))
        while process.poll() is None and len(list(Path("parts").glob("*.bin"))) < before + 5:
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert not Path("parts", manifest.NAME).exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert folder_digest(Path("whole")) == folder_digest(Path("parts"))


def test_what_a_killed_process_was_writing_is_removed(work, monkeypatch):
    """The remains are half of a new progress.json, or of a new manifest, beside the old one."""
    write_jsonl(Path("a.jsonl"), documents())
    options = ["prepare", "a.jsonl", "--field", "content", "--processes", "1", "--output"]
    assert cli.main([*options, "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main([*options, "parts"]) == 130
    for name in (".progress.json.new-0123abcd", ".manifest.json.new-4567cdef"):
        Path("parts", name).write_text("{")
    assert cli.main([*options, "parts"]) == 0
    assert folder_digest(Path("whole")) == folder_digest(Path("parts"))


def test_what_was_begun_otherwise_is_not_gone_on_with(work, fails, monkeypatch):
    write_jsonl(Path("a.jsonl"), documents())
    monkeypatch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["prepare", "a.jsonl", "--field", "content", "--output", "out", "--processes", "1"]) == 130
    message = fails("prepare", "a.jsonl", "--field", "id", "--output", "out")
    assert "begun with other settings: layout" in message
    os.utime("a.jsonl", ns=(1, 1))
    assert "begun with other inputs" in fails("prepare", "a.jsonl", "--field", "content", "--output", "out")


def test_a_file_that_ended_a_start_may_be_mended_before_the_next(work, fails):
    """The text for validation was made when it was read, and is made anew of the mended folder."""
    Path("books").mkdir()
    Path("books/a.txt").write_text("some text\n" * 200)
    Path("books/b.txt").write_bytes(b"caf\xe9")
    words = ("prepare", "books", "--tokenizer", "bytes", "--processes", "1", "--validation-tokens", "9", "--output")
    assert "b.txt is not UTF-8" in fails(*words, "out")
    assert [path.name for path in Path("out").glob("*.bin")] == ["books_val_000000.bin"]
    Path("books/b.txt").write_text("café")
    assert cli.main([*words, "out"]) == 0
    assert cli.main([*words, "fresh"]) == 0
    assert folder_digest(Path("out")) == folder_digest(Path("fresh"))


@pytest.mark.parametrize("name", ["notes.txt", "mine.bin"])
def test_nothing_is_deleted_but_what_was_written(work, fails, name):
    """The state of a start is a file like others: what it names may be the user's."""
    Path("a.txt").write_bytes(b"caf\xe9")
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    entry = {"file": name, "split": "val", "tokens": 1, "bytes": 8, "sha256": "0" * 64}
    Path("out", progress.NAME).write_text(json.dumps({"made_from": {}, "shards": [entry]}))
    fails("prepare", "a.txt", "--tokenizer", "bytes", "--output", "out")
    assert Path("out", name).read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 3}\n', "byte offset 14: an object whose field 'text' is 3, and no text (--field)"),
        (b'{"text": "a"}\n\n[1]\n', "byte offset 15: a list of 1 values, where an object is expected"),
        (b'{"text": "a"}\n{"text": "a', "byte offset 14: no JSON"),
        (b'{"text": "\xff"}\n', "byte offset 0: no JSON: not UTF-8: byte 0xff at offset 10"),
    ],
)
def test_damaged_lines_are_named(work, fails, content, message):
    Path("a.jsonl").write_bytes(content)
    assert message in fails("prepare", "a.jsonl", "--processes", "1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffd", "byte 0xff at byte offset 3"),
        ("a.txt.gz", gzip.compress(b"abc" * 1000, mtime=0)[:-9], "cannot read a.txt.gz"),
        ("a.txt.gz", b"abc", "cannot read a.txt.gz"),
        ("a.txt.zst", b"abcdefgh", "cannot read a.txt.zst"),
        ("a.parquet", b"abcdefgh" * 9, "cannot read a.parquet"),
        ("a.txt", b"", "a.txt: empty. Name a file with text in it"),
    ],
)
def test_damaged_files_are_named(work, fails, name, content, message):
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip("backports.zstd" if name.endswith(".zst") else "pyarrow")
    Path(name).write_bytes(content)
    assert message in fails("prepare", name, "--processes", "1")


def test_mistakes_are_told(work, fails, monkeypatch):
    assert "name what to prepare" in fails("prepare")
    assert "did you mean tinystories?" in fails("prepare", "tinystorys")
    assert "letters, digits" in fails("prepare", "text.txt", "--name", "a/b")
    assert "give hf:owner/name" in fails("prepare", "hf:x")
    assert "at least 257" in fails("prepare", "text.txt", "--tokenizer", "bpe", "--vocabulary-size", "256")
    prepare("text.txt", "--output", "out")
    assert "is prepared already" in fails("prepare", "text.txt", "--output", "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"x")
    assert "make env EXTRAS=data" in fails("prepare", "a.parquet", "--output", "out2", "--processes", "1")


def test_verify_finds_a_byte_that_changed(work, fails):
    prepare("text.txt", "--output", "out")
    prepare("out", "--verify")
    path = next(Path("out").glob("*train*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert f"{path} is not what was written" in fails("prepare", "out", "--verify")


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/b.bin", "..", "", "a\0b", "C:x"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, name):
    entry = {"file": name, "split": "val", "tokens": 1, "bytes": 2, "sha256": ""}
    with pytest.raises(UserError, match="not the name of a file in the same folder"):
        manifest.shard(tmp_path, entry)


def test_a_trained_bpe_cuts_text_as_its_library_does():
    library = pytest.importorskip("tokenizers")
    from jaxgpt.data import encodings

    text = (ROOT / "README.md").read_text()
    tokens = encodings.train([text], 600)
    assert tokens == encodings.train([text], 600)
    ours = tokenizers.TrainedBytePairs(tokens)
    assert (ours.vocabulary_size, ours.end_of_text) == (600, 599)
    theirs = library.Tokenizer(library.models.BPE())
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(
        [text], library.trainers.BpeTrainer(vocab_size=599, initial_alphabet=alphabet, show_progress=False)
    )
    assert ours.encode(text).tolist() == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
    assert tokenizers.from_state(json.loads(json.dumps(ours.state()))).tokens == ours.tokens


def test_one_process_is_this_one(work):
    """No process is started where nothing is gained."""
    with workers.Pool(1, {"name": "bytes"}) as pool:
        piece = Chunk("x", "text", TextLayout(), Position(), b"ab", 2)
        ((_, result),) = pool.map(workers.tokenize, [piece])
    assert result.tokens.tolist() == [97, 98]
