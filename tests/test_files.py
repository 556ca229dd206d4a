"""The one way to open a file from outside."""

import os
from pathlib import Path

import pytest

from jaxgpt import files
from jaxgpt.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes and links here to try")


def refused(path: Path, within: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        files.read_bytes(path, 1 << 20, within)
    return str(caught.value)


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "full").symlink_to("/dev/full")
    assert "a pipe, where a file is expected" in refused(tmp_path / "pipe")
    assert "a special file" in refused(tmp_path / "zero")
    assert "a special file" in refused(tmp_path / "full")
    assert "a folder" in refused(tmp_path)


def test_what_is_missing_too_large_or_has_no_name_is_told(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 20)
    assert "No such file" in refused(tmp_path / "none")
    assert "null" in refused(Path("a\0b"))
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="20 bytes, where no more than 19 are expected"):
        files.read_bytes(tmp_path / "large", 19)
    assert files.read_bytes(tmp_path / "large", 20) == b"x" * 20


def test_a_file_that_is_nearly_all_hole_is_refused(tmp_path):
    """It costs nothing to send one of a terabyte, and hours to read it."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x")
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("no holes on this disk")
    with pytest.raises(UserError, match="of its 1,099,511,627,776 bytes are on the disk"):
        files.open_file(path)
    path.write_bytes(b"x")
    assert files.read_bytes(path, 1) == b"x"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "own").write_text("own")
    (folder / "inside").symlink_to("own")
    (folder / "outside").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    assert files.read_bytes(folder / "inside", 10, folder) == b"own"
    for path in (folder / "outside", folder / "up" / "secret", folder / ".." / "secret"):
        assert "leads out of" in refused(path, folder)
        assert not files.is_file(path, folder)
    assert files.read_bytes(folder / "outside", 10) == b"secret"
    assert "loop" in refused(folder / "loop", folder)


def test_a_linked_folder_itself_is_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "linked").symlink_to("real")
    assert files.read_bytes(tmp_path / "linked" / "file", 10, tmp_path / "linked") == b"x"


def test_text_has_no_byte_order_mark_and_other_bytes_are_told_with_their_offset(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert files.read_text(tmp_path / "text") == "a\r\nb"
    (tmp_path / "text").write_bytes(b"abc\xe9")
    with pytest.raises(UserError, match="not UTF-8: byte 0xe9 at offset 3"):
        files.read_text(tmp_path / "text")


def test_lines_end_at_line_breaks_alone():
    assert files.text_lines("a\fb\x85c\r\nd\re\n\nf") == ["a\fb\x85c", "d", "e", "", "f"]


def test_json_and_toml_that_are_none_name_their_file(tmp_path):
    (tmp_path / "a\x1b[2Jb").write_text("[" * 10_000)
    for read in (files.read_json, files.read_toml):
        with pytest.raises(UserError, match=r"a\\x1b\[2Jb: not (JSON|a TOML file)"):
            read(tmp_path / "a\x1b[2Jb")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        files.read_json(tmp_path / "list")


def test_a_git_lfs_pointer_is_told(tmp_path):
    pointer = tmp_path / "model.bin"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    for read in (files.refuse_pointer, files.read_json, files.read_text):
        with pytest.raises(UserError, match=r"model.bin: a git-lfs pointer in the place of the file"):
            read(pointer)
    pointer.write_bytes(b"version")
    files.refuse_pointer(pointer)
