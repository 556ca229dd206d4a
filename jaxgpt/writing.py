"""Atomic writes: a file or a folder is on the disk whole, under its name, or not at all.

New content is written beside its place, under a name that begins with a dot, and flushed to the disk. Then it is
renamed and its parent folder is flushed, and only then is the old content deleted. A name is written to under a lock,
so that leftovers of a killed process can be told from what another process is writing, and are deleted.

Nothing here follows a link that lies in the place of what is written.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxgpt.errors import RunError, UserError
from jaxgpt.foreign_text import shown


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises a UserError where something exists at `path` that may not be replaced, or that isn't of our making."""
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise UserError(f"{path} exists and is left as it is. Give another name, or replace it with --overwrite")
    if path.is_symlink():
        raise UserError(f"{path} is a link, and is not replaced. Give another name")
    if path.is_dir() and not _has_model(path):
        raise UserError(f"{path} is a folder without a model (config.json or config.toml), and is not replaced")


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "config.toml"))


def new_file(path: Path, *, overwrite: bool = False) -> contextlib.AbstractContextManager[Path]:
    """Makes a temporary path, whose file is renamed to `path` and on the disk when the block ends without an error.

    UserError as `check_free` raises it, or another process is writing the file; RunError where writing fails.
    """
    return _new(path, overwrite, replacing, "a folder, where a file is" if path.is_dir() else "")


def new_folder(path: Path, *, overwrite: bool = False) -> contextlib.AbstractContextManager[Path]:
    """Makes a new empty folder, which is renamed to `path` as the file of `new_file`, with the same errors."""
    free = path.is_dir() or not path.exists()
    return _new(path, overwrite, replacing_folder, "" if free else "a file, where a folder is")


@contextlib.contextmanager
def _new(path: Path, overwrite: bool, replace: Callable, otherwise: str) -> Iterator[Path]:
    check_free(path, overwrite=overwrite)
    if otherwise:
        raise UserError(f"{path} is {otherwise} to be written. Give another name")
    try:
        with reserved(path):
            check_free(path, overwrite=overwrite)  # it may have been made, or put back, meanwhile
            with replace(path) as new:
                yield new
    except OSError as error:
        raise failure(path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file takes the place of `path` when the block ends, and is then on the disk.

    The old file stays until then, and stays if the block fails. A link is replaced, and not followed. OSError where
    writing fails.
    """
    temporary = _beside(path, "new")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a new empty folder, which takes the place of `path` when the block ends. The name must be `reserved`.

    Two renamings are needed to replace a folder. A process that is killed between them leaves the old folder under
    another name, and the next process that reserves the name puts it back.
    """
    new, old = _beside(path, "new"), _beside(path, "old")
    try:
        make_folder(new)
        yield new
        sync_tree(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(new.parent)
    finally:
        _remove(new)
        if path.exists():
            _remove(old)
        elif old.exists():  # the second renaming failed
            old.rename(path)


def make_folder(path: Path) -> None:
    """Makes a folder that must not exist yet, and its missing parents; all are on the disk afterwards."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    path.mkdir(parents=True)
    for made in [path, *missing]:
        sync(made.absolute().parent)


def open_to_append(path: Path) -> BinaryIO:
    """Opens a file to append to; makes it where there is none.

    OSError where the file is a pipe, a device or a link. A hard link counts too, since what is written would appear
    elsewhere as well.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    check_no_link(path)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.ELOOP, "it is a link to another file, or a pipe or a device")
    return os.fdopen(descriptor, "ab")


def check_no_link(path: Path) -> None:
    """Raises an OSError where the path is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, and is not followed")


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk.

    A folder that can't be flushed is passed over: Windows and some network file systems have no way to do it, and a
    folder may be writable without being readable.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)):
            raise


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all in it are on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if (path := Path(root, name)).is_file() and not path.is_symlink():
                sync(path)
        sync(Path(root))


class Lock(contextlib.ExitStack):
    """A lock on a file or a folder, held until it is closed or the process ends.

    Not `held`, it keeps nobody out: Windows and some network file systems have no such locks.
    """

    def __init__(self, descriptor: int | None = None):
        super().__init__()
        self.held = descriptor is not None
        if descriptor is not None:
            self.callback(os.close, descriptor)


def lock(path: Path, does: str, *, make: bool = False) -> Lock:
    """Locks a file or a folder, or with `make` an empty file that it makes where there is none.

    UserError where another process has locked it, which `does` something: "is training this run". OSError where it
    can't be opened.
    """
    if sys.platform == "win32":
        return Lock()
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (os.O_CREAT | os.O_NOFOLLOW if make else 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise UserError(f"{shown(str(path))}: another process {does}. Wait for its end, or stop it") from None
            return Lock()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return Lock(descriptor)
        os.close(descriptor)  # it was renamed or deleted before it was locked: what is there now counts


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Keeps other processes from making or replacing `path`, and deletes what killed processes have left beside it.

    The lock is on a file beside `path`, since what doesn't exist yet can't be locked. UserError where another process
    has reserved the name.
    """
    path = path.absolute()
    if not path.parent.exists():
        make_folder(path.parent)
    guard = path.with_name(f".{path.name}.lock")
    with lock(guard, "is making it", make=True) as held:
        try:
            if held.held:
                clear(path)
            yield
        finally:
            if held.held:  # else the file may be another process's
                with contextlib.suppress(OSError):
                    guard.unlink()


def clear(path: Path) -> None:
    """Deletes what killed processes have left beside a name; puts back a folder that they were about to replace.

    Call it under a lock that keeps others from writing to the name.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.(new|old)-[0-9a-f]+")
    found = [(other, match[1]) for other in path.parent.iterdir() if (match := left.fullmatch(other.name))]
    for other, word in sorted(found):
        with contextlib.suppress(OSError, UserError):  # one that another process has locked, or that isn't ours
            check_no_link(other)
            with lock(other, "is writing it"):
                if word == "old" and _has_model(other) and not os.path.lexists(path):
                    other.rename(path)
                    sync(path.parent)
                else:
                    _remove(other)


def _remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there and can be deleted."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _beside(path: Path, word: str) -> Path:
    """Returns a new hidden name in the same folder."""
    path = path.absolute()  # "." has no name
    return path.with_name(f".{path.name}.{word}-{secrets.token_hex(4)}")


def write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all. RunError where it can't be written."""
    try:
        with replacing(path) as new:
            new.write_bytes(content)
    except OSError as error:
        raise failure(path, error) from error


def write_output(path: str, content: bytes) -> None:
    """Writes the file that --output names, which may be a pipe. RunError where it can't be written."""
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise failure(f"--output {path}", error) from error


def failure(path: Path | str, error: OSError) -> RunError:
    """Returns the error for a file or a folder that can't be written."""
    match error.errno:
        case errno.ELOOP:
            advice = ". Put the file itself in its place"
        case errno.EISDIR | errno.ENOTDIR | errno.ENOTEMPTY | errno.EEXIST:
            advice = ". Move away what is in its place"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            advice = ". Take a folder that you may write to"
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            advice = ". Make room there"
        case _:
            advice = ""
    return RunError(f"{shown(path)}: writing failed ({error.strerror or error}){advice}")
