"""Checksums of a checkpoint's files.

SHA256SUMS, written last, has one line for each file, in the form that `sha256sum --check` reads. A folder without it
was not finished.
"""

import hashlib
import os
import re
import stat
from pathlib import Path

from jaxgpt import files, writing
from jaxgpt.errors import UserError, reason
from jaxgpt.foreign_text import shown

NAME = "SHA256SUMS"
LARGEST = 1 << 24  # bytes of SHA256SUMS
_LINE = re.compile("[0-9a-f]{64}  .+")


def write(folder: Path) -> None:
    """Writes SHA256SUMS, whole or not at all, once the files that it lists are on the disk. OSError if that fails."""
    writing.sync_tree(folder)
    writing.sync(folder.absolute().parent)  # the folder's own name
    text = "".join(f"{digest}  {name}\n" for name, digest in _digests(folder).items())
    with writing.replacing(folder / NAME) as new:
        new.write_text(text, encoding="utf-8")


def is_there(folder: Path) -> bool:
    """Returns whether the folder has a SHA256SUMS, and so was written to its end."""
    return files.is_file(folder / NAME, within=folder)


def damage(folder: Path, parts: tuple[str, ...] | None = None) -> str:
    """Returns a description of what is wrong with a checkpoint's files; empty if nothing is.

    Links, pipes and devices are damage too: a checkpoint has none, and reading one may never end. With `parts` it
    checks these subfolders alone, and the files that are in none.
    """

    def wanted(names: dict[str, str]) -> dict[str, str]:
        return {name: names[name] for name in names if parts is None or "/" not in name or name.split("/")[0] in parts}

    if not is_there(folder):
        return f"it has no {NAME}, which is written last"
    try:
        lines = files.read_bytes(folder / NAME, LARGEST, within=folder).decode().split("\n")[:-1]
        damaged = next((number for number, line in enumerate(lines, 1) if not _LINE.fullmatch(line)), 0)
        if damaged:
            return f"line {damaged:,} of {NAME} is damaged"
        written = wanted({line[66:]: line[:64] for line in lines})
        found = _digests(folder, parts)
    except OSError as error:
        return reason(error)
    except UserError as error:
        return str(error)
    except UnicodeDecodeError:
        return f"{NAME} is not UTF-8"
    for name in sorted(written.keys() | found.keys()):
        if name not in found:
            return f"{shown(name)} is missing"
        if name not in written:
            return f"{shown(name)} is not in {NAME}"
        if written[name] != found[name]:
            return f"{shown(name)} is not what was written"
    return "" if found else f"{NAME} is empty"


def _digests(folder: Path, parts: tuple[str, ...] | None = None) -> dict[str, str]:
    """Returns the SHA-256 of each file in the folder but SHA256SUMS. UserError for anything but files and folders."""

    def fail(error: OSError) -> None:
        raise error

    digests = {}
    for root, folders, names in os.walk(folder, onerror=fail):
        if parts is not None and Path(root) == folder:
            folders[:] = [name for name in folders if name in parts]
        for name in [*folders, *names]:
            path = Path(root, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                continue
            relative = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(mode):
                raise UserError(f"{shown(relative)} is no file")
            if relative != NAME:
                with files.open_file(path, within=folder) as file:
                    digests[relative] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
