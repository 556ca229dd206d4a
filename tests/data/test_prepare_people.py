"""`run.py prepare` given what people have: packed text, rows without text, folders with all kinds of things in them."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from jaxgpt.commands import cli
from jaxgpt.commands import prepare as command
from jaxgpt.data import encodings, manifest, workers
from jaxgpt.data.documents import Chunk, Position, TextLayout
from tests.data.shapes import text

TEXT = text("one line a paragraph", 300_000)
DOCUMENTS = [document for document in TEXT.split("\n\n") if document]


def prepare(*words: str) -> manifest.Manifest:
    assert cli.main(["prepare", "--processes", "1", "--output", "out", *words]) == 0
    return manifest.verify(Path("out"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_a_tenth_is_for_validation_however_the_text_is_packed(work, name, tokenizer):
    rows = "".join(json.dumps({"id": i, "url": "x" * 99, "text": d}) + "\n" for i, d in enumerate(DOCUMENTS))
    data = (rows if "jsonl" in name else TEXT).encode()
    if name.endswith(".parquet"):
        arrow, library = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        library.write_table(arrow.table({"text": DOCUMENTS}), name)
    else:
        packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        if name.endswith(".zst"):
            packed[".zst"] = pytest.importorskip("backports.zstd").compress
        Path(name).write_bytes(packed.get(Path(name).suffix, bytes)(data))
    made = prepare(name, "--tokenizer", tokenizer)
    assert made.tokens("val") == (made.tokens("val") + made.tokens("train")) // 10


def test_a_tenth_of_more_than_is_counted(work, monkeypatch):
    """The size is estimated from the beginnings of a few of the many files and of long files."""
    from jaxgpt.data import chunks

    monkeypatch.setattr(chunks, "PIECE_BYTES", 1 << 12)
    Path("many").mkdir()
    for number in range(30):
        Path(f"many/{number}.txt.gz").write_bytes(gzip.compress(text("quoted", 9000, number).encode()))
    Path("many/long.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    made = prepare("many")
    share = made.tokens("val") / (made.tokens("val") + made.tokens("train"))
    assert 0.08 < share < 0.12


def test_rows_without_text_are_counted_and_bad_ones_limited(work, fails, capsys):
    rows = ['{"text": "one"}', '{"text": null}', "[", '{"text": ""}', '{"text": [1]}', "", '{"text": "two"}']
    Path("a.jsonl").write_text("\n".join(rows))
    message = fails("prepare", "a.jsonl", "--processes", "1", "--output", "out")
    assert "a.jsonl, at byte offset 31: no JSON" in message
    assert "--skip-bad N" in message
    assert "more than --skip-bad 1 rows are bad" in fails(
        "prepare", "a.jsonl", "--processes", "1", "--output", "out", "--skip-bad", "1"
    )
    made = prepare("a.jsonl", "--tokenizer", "bytes", "--skip-bad", "2")
    assert (made.documents, made.empty_rows, made.bad_rows) == (2, 2, 2)
    assert "left out: 2 rows without text, and 2 bad ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt: empty. Name a file with text in it"),
        ("a.txt", "\ufeff", "a.txt: empty"),
        ("a.jsonl", "", "a.jsonl: empty"),
        ("a.jsonl", '{"text": null}\n' * 3, "a.jsonl: none of 3 rows has text in the field 'text'"),
        ("a.json", "[]", "a.json: empty"),
        ("a.txt", "a", "the text has 2 tokens, and all of them are for validation"),
    ],
)
def test_a_text_that_is_empty_is_called_that(work, fails, name, content, message):
    Path(name).write_text(content)
    more = ["--validation-tokens", "9"] if content == "a" else []
    assert message in fails("prepare", name, "--processes", "1", "--output", "out", *more)
    if not content:
        assert "empty" in fails("prepare", name, "--processes", "1", "--tokenizer", "characters", "--output", "out2")
    Path(name).write_text('{"text": "mended, and long enough to be a text"}')  # the same command is given again
    if name != "a.json" and not more:
        assert prepare(name).tokens("train")


def test_a_folder_is_read_without_what_is_hidden_and_links_are_named(work, capsys, fails):
    for name in ("notes/a.txt", "notes/in/b.md", "notes/.git/c.txt", "notes/.ipynb_checkpoints/d.txt", "other/e.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{name} is a text\n")
    Path("notes/.hidden.txt").write_text("hidden")
    Path("notes/x\x1b[2J.pdf").write_text("a PDF")
    for name in ("data.bin", "1.jpg", "in/2.JPG"):
        (Path("notes") / name).write_bytes(b"\xff")
    Path("notes/dangling.txt").symlink_to("nowhere.txt")
    Path("notes/linked.txt").symlink_to(work / "other/e.txt")
    Path("notes/folder").symlink_to(work / "other")
    made = prepare("notes", "--tokenizer", "bytes")
    assert made.tokens("train") + made.tokens("val") == len("notes/a.txt is a text\nnotes/in/b.md is a text\n")
    err = capsys.readouterr().err
    assert "notes: 2 files read (1 .md, 1 .txt)\n" in err
    assert "notes: passed over: 3 links: notes/dangling.txt, notes/folder, notes/linked.txt\n" in err
    assert "notes: passed over: 1 .pdf (not plain text: pdftotext makes it of them): notes/x\\x1b[2J.pdf\n" in err
    assert "notes: passed over: 1 of no known kind of text (name them to prepare them): notes/data.bin\n" in err
    assert "notes: passed over: 2 .jpg (pictures): notes/1.jpg, notes/in/2.JPG\n" in err
    assert "notes: passed over: 3 hidden: notes/.git, notes/.hidden.txt, notes/.ipynb_checkpoints\n" in err
    for path in ("notes/a.txt", "notes/in/b.md"):
        Path(path).unlink()
    assert "has no files that end in .txt" in fails("prepare", "notes", "--output", "none")


def test_what_can_not_be_read_in_a_folder_is_told_at_once(work, fails, monkeypatch):
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("a text")
    os.mkfifo("notes/b.txt")
    assert "notes/b.txt: a pipe, where a file is expected" in fails("prepare", "notes", "--output", "out")
    Path("notes/b.txt").unlink()
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    Path("notes/locked").mkdir()
    monkeypatch.setattr(os, "scandir", forbidden)
    assert "cannot read notes/locked: Permission denied" in fails("prepare", "notes", "--output", "out")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_may_never_end_is_not_read(work, fails, make):
    make("a.txt")
    for words in (["prepare", "a.txt"], ["--data.text", "a.txt"]):
        assert "write it to a file first, and name that" in fails(*words)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("notes.txt", "notes"),
        ("my.book.v2.jsonl.gz", "my.book.v2"),
        ("a b (1)!.txt", "a_b_1"),
        ("-rf.txt", "rf"),
        ("...txt", "data"),
        ("Zürich 東京.txt", "Zürich_東京"),
        ("a\x1b[2J.txt", "a_2J"),
        ("b\udcff.txt", "b"),
        ("in/*.txt", "in"),
        ("€" * 80, "data"),
        ("é" * 120 + ".txt", "é" * 100),
        ("hf:owner/a name/part:split", "a_name-part"),
    ],
)
def test_a_name_comes_from_any_file_name(work, source, name):
    if "[" in source:  # as in a pattern, unless there is such a file
        Path(source).touch()
    assert command._name(source) == name


@pytest.mark.parametrize("blob", ["A" * 300_000, "ab+/" * 80_000, "東京" * 100_000, " " * 200_000, "-" * 200_000])
def test_a_bpe_is_not_trained_on_what_is_too_long_for_a_word(work, blob):
    pytest.importorskip("tokenizers")
    piece = Chunk("a", "text", TextLayout(), Position(), f"a text {blob}\nand more".encode(), 0)
    sample = workers.Sample([piece], 0)
    (trained_on,) = list(sample)
    assert len(trained_on) < 40
    assert sample.left_out == len(f"a text {blob}\nand more") - len(trained_on)
    assert encodings.train(iter([trained_on]), 300)


def test_words_of_people_are_kept(work):
    for kept in ("w" * 1000, "東京は" * 300, TEXT):
        assert workers.LONG_WORD.sub("", kept) == kept


def test_what_is_no_text_is_told_with_what_to_do(work, fails):
    Path("twice.txt.gz").write_bytes(gzip.compress(gzip.compress(b"some text")))
    Path("a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    Path("train.bin").write_bytes(bytes(range(200)) * 9)
    Path("a.txt").write_bytes("some text".encode("utf-32"))
    for name, message in (
        ("twice.txt.gz", "packed twice, one .gz within another"),
        ("a.parquet.gz", "packed within itself, and isn't packed again. Unpack it"),
        ("train.bin", "train on it by --data.text train.bin"),
        ("a.txt", "iconv -f UTF-32"),
    ):
        assert message in fails("prepare", name, "--processes", "1", "--output", "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x" * 5000], "File name too long"),
        (["text.txt", "--output", "text.txt/x"], "--output text.txt/x: can't be made (Not a directory)"),
        (["text.txt", "--output", "out", "--processes", "100000000"], "--processes is 100,000,000, and may be 1,024"),
        (["text.txt", "--output", "out", "--tokenizer", ""], "give characters, bytes, gpt2"),
        (["text.txt", "--output", "out", "--tokenizer", "x" * 5000], "give characters, bytes, gpt2"),
    ],
    ids=["source", "output", "processes", "empty", "tokenizer"],
)
def test_options_that_cannot_be_are_told(work, fails, words, message):
    assert message in fails("prepare", *words)
