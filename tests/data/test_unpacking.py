"""Packed files: read whatever packed them, damage told with its place, and what is no text known by its first bytes."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from jaxgpt import files
from jaxgpt.data import unpacking
from jaxgpt.errors import UserError
from tests.data.shapes import text

TEXT = text("one line a paragraph", 200_000).encode()
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def pack(folder: Path, end: str, data: bytes) -> Path:
    path = folder / f"a.txt{end}"
    if end == ".zst":
        zstd = pytest.importorskip("backports.zstd")
        window = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
        path.write_bytes(zstd.compress(data, options=window))
    else:
        path.write_bytes(PACKED.get(end, bytes)(data))
    return path


@pytest.mark.parametrize("end", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_what_was_packed_comes_out_from_any_place_on(tmp_path, end):
    path = pack(tmp_path, end, TEXT)
    with unpacking.opened(path) as reader:
        parts = []
        while part := reader.read(70_003):
            parts.append(part)
        assert (b"".join(parts), reader.offset) == (TEXT, len(TEXT))
        assert reader.raw.tell() == path.stat().st_size
    with unpacking.opened(path) as reader:
        reader.skip(123_456)
        assert reader.read(10) == TEXT[123_456:123_466]
        assert reader.read(1 << 30) == TEXT[123_466:]


@pytest.mark.parametrize("end", PACKED)
def test_two_packed_files_one_behind_the_other_are_one(tmp_path, end):
    path = pack(tmp_path, end, TEXT)
    path.write_bytes(path.read_bytes() * 2)
    with unpacking.opened(path) as reader:
        assert reader.read(1 << 30) == TEXT * 2


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("behind", ["damaged", "cut off", "noise", "one byte"])
def test_a_damaged_file_behind_another_is_no_end(tmp_path, end, behind):
    """A parallel program packs a text in parts like this: the rest must not be left out without a word."""
    path = pack(tmp_path, end, TEXT)
    second = path.read_bytes()
    rest = {"damaged": b"?" + second[1:], "cut off": second[:3], "noise": bytes(range(1, 200)), "one byte": b"x"}[
        behind
    ]
    path.write_bytes(second + rest)
    with unpacking.opened(path) as reader, pytest.raises(UserError, match="damaged after"):
        reader.read(1 << 30)


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_zeros_may_stand_behind(tmp_path, end):
    path = pack(tmp_path, end, TEXT)
    path.write_bytes(path.read_bytes() + bytes(100_000))
    with unpacking.opened(path) as reader:
        assert reader.read(1 << 30) == TEXT


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz", ".zst"])
def test_damage_is_told_with_its_place(tmp_path, end):
    path = pack(tmp_path, end, TEXT)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :], whole[:-1], whole[:1]):
        path.write_bytes(damaged)
        with unpacking.opened(path) as reader, pytest.raises(UserError) as error:
            reader.read(1 << 30)
        assert f"cannot read {path}: damaged after {reader.offset:,} bytes" in str(error.value)
        assert len(error.value.args[0].splitlines()) == 1


def test_a_git_lfs_pointer_is_known_in_place_of_a_packed_file(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(files.GIT_LFS + b"v1\noid sha256:0\nsize 1\n")
    with unpacking.opened(path) as reader, pytest.raises(UserError, match="git lfs pull"):
        reader.read(1)


@pytest.mark.parametrize(
    ("head", "about"),
    [
        (files.GIT_LFS + b"v1\n", "git lfs pull"),
        (gzip.compress(b"a", mtime=0), "ends in .gz"),
        (bz2.compress(b"a"), "ends in .bz2"),
        (lzma.compress(b"a"), "ends in .xz"),
        (b"PAR1\x15", "ends in .parquet"),
        (b"PK\x03\x04", "ZIP"),
        (b"%PDF-1.7", "pdftotext"),
        ("a text".encode("utf-16"), "iconv"),
        ("a text".encode("utf-16-le"), "many zero bytes"),
        (b"a" * 257 + b"ustar\x0000", "tar archive"),
    ],
)
def test_what_is_no_text_is_known(head, about):
    with pytest.raises(UserError, match=about):
        unpacking.check_text(Path("a"), head)


@pytest.mark.parametrize("head", [b"", b"a", TEXT[:1024], "\ufeffa".encode(), b"version 1\n", b"{}", b"a\0bcdefgh"])
def test_text_is_let_through(head):
    unpacking.check_text(Path("a"), head)
