"""Names, files, the cache and the download of the training texts. Nothing is downloaded."""

import bz2
import gzip
import hashlib
import inspect
import io
import json
import lzma
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from jaxgpt.data import corpora
from jaxgpt.environment import cache_folder
from jaxgpt.errors import UserError

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no data folder, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXGPT_DATA", raising=False)

    def refuse(address: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("the tests have no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A short stand-in that counts as tiny Shakespeare."""
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    return PLAY


def serve(monkeypatch: pytest.MonkeyPatch, data: bytes) -> list[str]:
    """Lets every download give `data`; the addresses that were asked for are added to the list."""
    addresses: list[str] = []

    def urlopen(address: str, timeout: float) -> io.BytesIO:
        addresses.append(address)
        return io.BytesIO(data)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return addresses


# The embedded text


def test_embedded_is_long_clean_prose_without_repetition() -> None:
    text = corpora.load("embedded")
    assert len(text.encode()) > 1_000_000
    assert {c for c in text if not c.isprintable()} <= {"\n", "\xa0"}
    paragraphs = Counter(text.rstrip("\n").split("\n\n"))
    assert max(paragraphs.values()) == 1
    assert all(paragraph.strip() for paragraph in paragraphs)
    assert "Special method names" in text  # from the language reference
    assert (inspect.getdoc(json) or "?").split("\n\n")[0] in text  # from the library


def test_embedded_is_the_same_in_another_process() -> None:
    """The order of sets and folders in that process doesn't matter."""
    program = "from jaxgpt.data import corpora; print(ascii(corpora.load('embedded')))"
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    root = Path(corpora.__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", program]
    other = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout == ascii(corpora.load("embedded")) + "\n"


def test_the_end_of_embedded_is_like_the_rest() -> None:
    """The characters are about as frequent in the last tenth, which is the validation split, as before."""
    text = corpora.load("embedded")
    cut = int(len(text) * 0.9)
    before, after = Counter(text[:cut]), Counter(text[cut:])
    distance = sum(abs(before[c] / cut - after[c] / (len(text) - cut)) for c in before | after) / 2
    assert distance < 0.05


def test_embedded_without_library_sources_is_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    text = corpora._embedded.__wrapped__()
    assert len(text) > 100_000
    assert "Special method names" in text


def test_embedded_without_anything_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="another text"):
        corpora._embedded.__wrapped__()


def test_docstrings_are_read_without_running_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '"""About the module."""\nraise SystemExit\nif True:\n    class A:\n        def f(self):\n'
        '            r"""First\n\n              indented\n\n            last \x07"""\n            "\\d"\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "bad_escape.py").write_text('"""Has an \\invalid escape."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_module.py").write_text('"""A test."""\n')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    pieces = {"Has an \\invalid escape.", "About the module.\n\nFirst\n\n  indented\n\nlast"}
    text = corpora._embedded.__wrapped__()
    assert text in {"\n\n".join(order) + "\n" for order in (sorted(pieces), sorted(pieces, reverse=True))}


def test_embedded_is_kept_for_as_long_as_the_library_is_the_same(monkeypatch, tmp_path: Path) -> None:
    """A damaged copy is not taken, and where none can be kept the text is the same."""
    (tmp_path / "module.py").write_text('"""First."""\n')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    read, reads = corpora._read_embedded, []
    monkeypatch.setattr(corpora, "_read_embedded", lambda: reads.append(1) or read())
    load = corpora._embedded.__wrapped__
    assert load() == load() == "First.\n"
    (kept,) = cache_folder().iterdir()
    assert len(reads) == 1
    for damaged in (b"", b"\xff\nFirst.\n", kept.read_bytes().replace(b"First", b"Worst")):
        kept.write_bytes(damaged)
        assert load() == "First.\n"
    assert len(reads) == 4
    (tmp_path / "module.py").write_text('"""Second."""\n')
    assert load() == "Second.\n"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert load() == "Second.\n"


def test_embedded_is_described_with_its_size() -> None:
    phrase = corpora.describe("embedded")
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in phrase
    assert f"({len(corpora.load('embedded').encode()) / 1e6:.1f} MB)" in phrase


# Files


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffÄ\r\n東京\n".encode())
    assert corpora.load(str(path)) == "Ä\r\n東京\n"
    path.write_bytes(b"a" * 12_345)
    assert corpora.describe(str(path)) == f"the file {path} (12.3 kB)"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "text.txt is empty"),
        ("\ufeff".encode(), "text.txt is empty"),
        (b"abc\xff\xfe", "text.txt is not UTF-8: byte 0xff at offset 3"),
        ("é".encode("latin-1"), "offset 0"),
        (b"ab\xe6\x9d", "byte 0xe6 at offset 2"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        corpora.load(str(path))


@pytest.mark.parametrize("function", [corpora.load, corpora.describe])
def test_an_unknown_name_gets_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("Call me Ishmael.")
    with pytest.raises(UserError, match="did you mean tinyshakespeare"):
        function("tiny_shakespeare")
    with pytest.raises(UserError, match=r"did you mean novel\.txt"):
        function("novle.txt")
    with pytest.raises(UserError, match=r"no such file in .*embedded, tinyshakespeare"):
        function("?")
    with pytest.raises(UserError, match="no folder nowhere"):
        function("nowhere/text.txt")


@pytest.mark.parametrize("function", [corpora.load, corpora.describe])
def test_what_is_no_file_is_refused(tmp_path: Path, function) -> None:
    (tmp_path / "text.txt").write_text("a")
    for name, message in {
        str(tmp_path): "is a folder",
        str(tmp_path / "text.txt" / "x"): "there is no text",
        "a\0b": "there is no text",
        "a" * 5000: "cannot read",
    }.items():
        with pytest.raises(UserError, match=message):
            function(name)


# Tiny Shakespeare


def test_the_data_folder_comes_first(play: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(play)
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    assert corpora.load("tinyshakespeare") == play.decode()
    assert not cache_folder().exists()


@pytest.mark.parametrize("with_data_folder", [False, True])
def test_a_download_is_kept(
    play: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_data_folder: bool
) -> None:
    if with_data_folder:  # that has no such file
        monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    addresses = serve(monkeypatch, play)
    assert corpora.load("tinyshakespeare") == corpora.load("tinyshakespeare") == play.decode()
    assert addresses == [corpora.SHAKESPEARE_ADDRESS]
    assert [path.name for path in cache_folder().iterdir()] == ["tinyshakespeare.txt"]


def test_a_damaged_file_is_refused(play: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tinyshakespeare.txt"
    path.write_bytes(play.replace(b"speak", b"Speak"))
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"{path} is damaged.*delete it"):
        corpora.load("tinyshakespeare")


def test_a_wrong_download_is_refused_and_not_kept(play: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"<html>Not found</html>")
    with pytest.raises(UserError, match=r"https://.* not tiny Shakespeare.*JAXGPT_DATA"):
        corpora.load("tinyshakespeare")
    assert not cache_folder().exists()


def test_a_failed_download_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"cannot download https://.*no network.*JAXGPT_DATA"):
        corpora.load("tinyshakespeare")


def test_a_cache_that_can_not_be_written_is_named(play: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, play)
    cache = cache_folder()
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=f"cannot .*{cache}"):
        corpora.load("tinyshakespeare")


def test_an_interrupted_write_leaves_nothing(play: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    serve(monkeypatch, play)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        corpora.load("tinyshakespeare")
    assert list(cache_folder().iterdir()) == []


def test_tinyshakespeare_is_described_without_being_there() -> None:
    assert "1.1 MB" in corpora.describe("tinyshakespeare")


# Packed files, and what is no text


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_a_packed_file_is_unpacked(tmp_path: Path, end: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[end]
    path = tmp_path / f"text.txt{end}"
    path.write_bytes(pack("\ufeffÄ\r\n東京\n".encode()))
    assert corpora.load(str(path)) == "Ä\r\n東京\n"
    path.write_bytes(pack(b"a" * 100)[:-3])
    with pytest.raises(UserError, match="damaged after"):
        corpora.load(str(path))


def test_what_is_packed_better_than_text_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "SMALL_UNPACKED", 1 << 20)
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"a" * (1 << 22)))
    with pytest.raises(UserError, match="prepare"):
        corpora.load(str(path))


@pytest.mark.parametrize("function", [corpora.load, corpora.describe])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a b.json.gz", "a.parquet"])
def test_rows_with_fields_are_for_prepare(tmp_path: Path, function, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"has rows with fields.* by: python run\.py prepare .*, and train on them"):
        function(str(tmp_path / name))


@pytest.mark.parametrize("function", [corpora.load, corpora.describe])
def test_what_may_never_end_is_not_opened(tmp_path: Path, function) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(UserError, match="write it to a file first"):
            function(str(tmp_path / name))


def test_a_file_is_described_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with path.open("wb") as file:
        file.truncate(3 << 40)
    assert corpora.describe(str(path)) == f"the file {path} (3.3 TB)"


def test_a_name_is_told_without_its_control_characters(tmp_path: Path) -> None:
    (tmp_path / "x\x1b[2J.txt").write_bytes(b"\xff")
    for name in ("x\x1b[2J.txt", "x\x1b[2J"):
        with pytest.raises(UserError) as error:
            corpora.load(str(tmp_path / name))
        assert str(error.value).isprintable()
