"""Which files a checkpoint consists of, and whether they are as they were written.

SHA256SUMS, written last, has one line for each file, in the form that `sha256sum --check` reads. A folder without it
was not finished.
"""

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    """Adds SHA256SUMS, whole or not at all, once what it speaks of is on the disk."""
    text = "".join(f"{digest}  {name}\n" for name, digest in _digests(folder).items())
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def damage(folder: Path, parts: tuple[str, ...] | None = None) -> str:
    """What is wrong with the files, in words; empty if nothing is. With `parts`, only in those folders in it."""

    def wanted(names: dict[str, str]) -> dict[str, str]:
        return {name: names[name] for name in names if parts is None or name.partition("/")[0] in parts}

    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
        written = wanted({line[66:]: line[:64] for line in lines})
        found = wanted(_digests(folder, parts))
    except FileNotFoundError:
        return f"it has no {NAME}, which is written last"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    for name in sorted(written.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in written:
            return f"{name} is not in {NAME}"
        if written[name] != found[name]:
            return f"{name} is not what was written"
    return "" if found else f"{NAME} is empty"


def _digests(folder: Path, parts: tuple[str, ...] | None = None) -> dict[str, str]:
    """The SHA-256 of each file in the folder, or in those of its folders, but for SHA256SUMS itself."""
    digests = {}
    for root in [folder] if parts is None else [folder / part for part in parts]:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.name not in (NAME, f"{NAME}.tmp"):
                with path.open("rb") as file:
                    digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
