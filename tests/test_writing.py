"""Files and folders that are there whole or not at all, whoever else writes them or was killed while it did."""

import errno
import os
import threading
from pathlib import Path

import pytest

from jaxgpt import writing
from jaxgpt.errors import RunError, UserError


@pytest.mark.parametrize("left", [".a.new-1", ".a.old-16188", ".a.new-00c0ffee"])
@pytest.mark.parametrize("make", [writing.new_file, writing.new_folder])
def test_what_a_killed_process_left_is_removed_and_in_nobodys_way(tmp_path, left, make):
    """The left file may have this process's own number, which in a container is always the same."""
    path = tmp_path / "a"
    for name in (left, f".a.new-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("{")
    write(path, make)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Make room"), (errno.EISDIR, "Move away"), (errno.EACCES, "may write"), (errno.EIO, "")],
)
def test_advice_fits_what_failed(number, advice):
    message = str(writing.failure(Path("a\x1b"), OSError(number, os.strerror(number))))
    assert message.startswith(f"a\\x1b: writing failed ({os.strerror(number)})")
    assert message.endswith(")") if not advice else advice in message


def write(path, make, **options):
    with make(path, **options) as new:
        (new / "config.json" if make is writing.new_folder else new).write_text("new")


def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path):
    """The kill came between the two renamings. The folder is then replaced, or left as it is."""
    path = tmp_path / "a"
    write(path, writing.new_folder)
    path.rename(tmp_path / ".a.old-16188")
    with pytest.raises(UserError, match="exists and is left as it is"):
        write(path, writing.new_folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (path / "config.json").read_text() == "new"


@pytest.mark.parametrize("make", [writing.new_file, writing.new_folder])
def test_two_do_not_write_one_name_at_once(tmp_path, make):
    """The second is refused while the first writes, and finds then what the first has made."""
    path = tmp_path / "a"
    with make(path) as new:
        with pytest.raises(UserError, match="another process is making it"):
            write(path, make)
        (new / "config.json" if make is writing.new_folder else new).write_text("first")
    with pytest.raises(UserError, match="exists and is left as it is"):
        write(path, make)


@pytest.mark.parametrize("make", [writing.new_file, writing.new_folder])
def test_what_fails_leaves_nothing_new_and_all_that_was_there(tmp_path, make):
    path = tmp_path / "a"
    for there in (False, True):
        if there:
            write(path, make)
        with pytest.raises(RunError, match=r"writing failed \(No space left on device"), make(path, overwrite=True):
            raise OSError(28, "No space left on device")
        assert [entry.name for entry in tmp_path.iterdir()] == (["a"] if there else [])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_that_takes_a_links_place_leaves_its_target(tmp_path, link):
    (tmp_path / "precious").write_text("precious")
    link(tmp_path / "precious", tmp_path / "a")
    with writing.replacing(tmp_path / "a") as new:
        new.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()


def test_what_would_be_written_elsewhere_is_not_appended_to(tmp_path):
    (tmp_path / "precious").write_text("precious")
    os.symlink(tmp_path / "precious", tmp_path / "symlink")
    os.symlink(tmp_path / "nothing", tmp_path / "dangling")
    os.link(tmp_path / "precious", tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # without one, opening it to write would fail
    for name in ("symlink", "dangling", "link", "pipe"):
        with pytest.raises(OSError, match="it is a link"):
            writing.open_to_append(tmp_path / name)
    os.close(reader)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_many_at_once_reserve_a_name_one_after_the_other(tmp_path):
    """Each of them removes the lock's file when it is done."""
    inside, most, refused = 0, 0, 0
    counting = threading.Lock()

    def work():
        nonlocal inside, most, refused
        for _ in range(50):
            try:
                with writing.reserved(tmp_path / "a"):
                    with counting:
                        inside += 1
                        most = max(most, inside)
                    with counting:
                        inside -= 1
            except UserError:
                refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 200
    assert list(tmp_path.iterdir()) == []
