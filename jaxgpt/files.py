"""Reading of files that others have made: the only way in which the package opens a file from outside.

A file from outside may lie about itself. So it must be a regular file, its size is known and bounded before anything
of it is read, and where it belongs to a folder (a run's, a checkpoint's) no link leads out of that folder.
"""

import io
import os
import stat
from pathlib import Path
from typing import Any

from jaxgpt import foreign_text
from jaxgpt.errors import UserError, reason
from jaxgpt.foreign_text import shown

LARGEST_JSON = 1 << 26  # bytes
LARGEST_TOML = 1 << 18
LARGEST_TEXT = 1 << 34
HOLES = 16  # a file's size over its bytes on the disk, at most: compressed disks store fewer bytes
GIT_LFS = b"version https://git-lfs.github.com/spec/"


def open_file(path: Path, within: Path | None = None, *, holes: bool = False) -> io.BufferedReader:
    """Opens a regular file to read its bytes.

    Args:
        path: The file.
        within: The folder that the file belongs to, such as a run's: links may not lead out of it.
        holes: Whether the file may be nearly all hole, since it isn't read from end to end.

    Raises:
        UserError: The file doesn't exist or can't be read; it is a folder, a pipe or a device (which might never end);
            a link leads out of `within`; or nearly all of it is a hole, which would be read as zeros for hours.
    """
    try:
        if within is not None:
            check_within(path, within)
        _check_regular(path, os.stat(path).st_mode)  # opening a device may already do something
        # What has been put in its place since could be a pipe, which would wait for its writer without O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the path, links in a circle
        raise _unreadable(path, error) from None
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        if not holes:
            _check_holes(path, descriptor)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def size(path: Path, within: Path | None = None) -> int:
    """Returns a file's bytes. UserError as `open_file` raises it."""
    with open_file(path, within, holes=True) as file:
        return os.fstat(file.fileno()).st_size


def is_file(path: Path, within: Path | None = None) -> bool:
    """Returns whether there is a regular file that `open_file` would open; a link out of `within` counts as none."""
    try:
        if within is not None:
            check_within(path, within)
        return path.is_file()
    except (OSError, ValueError, RuntimeError, UserError):
        return False


def exists(path: Path) -> bool:
    """Returns whether something has this name, a link too. UserError where that can't be known.

    What can't be seen for the moment is not gone: a disk elsewhere that doesn't answer, a folder without permission.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return True


def names(folder: Path) -> list[str]:
    """Returns the names in a folder; none where there is no such folder. UserError where it can't be read."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None


def read_bytes(path: Path, largest: int, within: Path | None = None) -> bytes:
    """Returns all of a file. UserError for one with more than `largest` bytes, and as `open_file` raises it."""
    with open_file(path, within) as file:
        length = os.fstat(file.fileno()).st_size
        if length > largest:
            raise UserError(f"{shown(path)}: {length:,} bytes, where no more than {largest:,} are expected")
        try:
            data = file.read(length) if length else file.read()  # files of /proc state 0 bytes and have some
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(data) > largest:
        raise UserError(f"{shown(path)}: more than the {largest:,} bytes that are expected")
    _refuse_pointer(path, data)
    return data


def refuse_pointer(path: Path, within: Path | None = None) -> None:
    """Raises a UserError where git-lfs would put a file, and has put only its pointer. `read_bytes` does so itself."""
    with open_file(path, within) as file:
        _refuse_pointer(path, file.read(len(GIT_LFS)))


def _refuse_pointer(path: Path, beginning: bytes) -> None:
    if beginning.startswith(GIT_LFS):
        raise UserError(
            f"{shown(path)}: a git-lfs pointer in the place of the file. Get the file itself: `git lfs pull` in its "
            "folder, or download it"
        )


def read_text(path: Path, largest: int = LARGEST_TEXT, within: Path | None = None) -> str:
    """Returns a UTF-8 file's text without a byte order mark, its line ends as they are. UserError for other bytes."""
    try:
        return foreign_text.decode(read_bytes(path, largest, within))
    except ValueError as error:
        raise UserError(f"{shown(path)}: {error}; convert it to UTF-8, or name another file") from None


def read_json(path: Path, largest: int = LARGEST_JSON, within: Path | None = None) -> dict[str, Any]:
    """Returns the object in a JSON file. UserError where it has none."""
    try:
        value = foreign_text.parse_json(read_bytes(path, largest, within), unique=True)
    except ValueError as error:
        raise UserError(f"{shown(path)}: not JSON ({error}). Restore the file from where it came") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown(path)}: not a JSON object. Restore the file from where it came")
    return value


def read_toml(path: Path, within: Path | None = None) -> dict[str, Any]:
    """Returns the tables of a TOML file. UserError where it isn't one."""
    try:
        return foreign_text.parse_toml(read_bytes(path, LARGEST_TOML, within))
    except ValueError as error:
        raise UserError(f"{shown(path)}: not a TOML file: {error}") from None


def text_lines(text: str) -> list[str]:
    """Returns the lines of a text, which end at line breaks alone: \\n, \\r\\n or \\r, and not at a form feed."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def check_within(path: Path, within: Path) -> None:
    """Raises a UserError where a link leads out of the folder."""
    if not path.resolve().is_relative_to(within.resolve()):
        raise UserError(f"{shown(path)}: leads out of {shown(within)} by a link, and is not followed")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{shown(path)}: can't be read ({reason(error)})")


def _check_holes(path: Path, descriptor: int) -> None:
    """Raises a UserError for a large file that is nearly all hole, which costs nothing to make and hours to read."""
    status = os.fstat(descriptor)
    stored = 512 * getattr(status, "st_blocks", 0)
    if status.st_size <= LARGEST_JSON or stored * HOLES >= status.st_size or not hasattr(os, "SEEK_HOLE"):
        return
    try:
        has_hole = os.lseek(descriptor, 0, os.SEEK_HOLE) < status.st_size  # network disks may state no blocks at all
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError:  # a file system that knows of no holes
        return
    if has_hole:
        raise UserError(
            f"{shown(path)}: only {stored:,} of its {status.st_size:,} bytes are on the disk, and the rest is a hole. "
            "Restore the file from where it came"
        )


def _check_regular(path: Path, mode: int) -> None:
    """Raises a UserError for what isn't a regular file."""
    if stat.S_ISREG(mode):
        return
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a special file"
    raise UserError(f"{shown(path)}: {kind}, where a file is expected")
