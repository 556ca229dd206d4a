"""Fingerprints of the data, which tell a run that resumes whether its data have changed, and from which byte on.

Every byte of a text counts, and every byte of token files of up to a gibibyte together. For larger token files the
fingerprint has each file's size, its SHA-256 by the manifest, and hashes of SAMPLES blocks spread over the file. In
seconds this recognises other data, and files that were cut off, prepared anew or overwritten. A few bytes that a disk
lost between two blocks are only found by `run.py prepare --verify`, which reads everything.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

SMALLEST = 4096  # bytes of the smallest block that is hashed
SAMPLES = 16  # blocks of SMALLEST bytes of a file that is not read whole
READ_WHOLE = 1 << 30  # bytes of token files, all together, up to which they are read whole


def of_files(paths: Sequence[Path], sums: dict[str, str]) -> dict[str, Any]:
    """Returns the fingerprint of token files. `sums` has the SHA-256 by file name, for files that a manifest lists."""
    whole = sum(map(files.size, paths)) <= READ_WHOLE
    found = {path.name: _of_file(path, whole) | {"sha256": sums.get(path.name, "")} for path in paths}
    return {"files": found}


def of_lines(paths: Sequence[Path]) -> dict[str, Any]:
    """Returns the fingerprint of files of lines, such as comparisons. UserError where two have the same name."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--data.text: two of the files have the name {shown(twice)}; give them different ones")
    return of_files(paths, {})


def _of_file(path: Path, whole: bool) -> dict[str, Any]:
    with files.open_file(path, holes=True) as file:
        content = memoryview(np.memmap(file, np.uint8, "r"))  # type: ignore[arg-type]
    if whole or len(content) <= SAMPLES * SMALLEST:
        return of(content)
    samples = [_hash(content[start : start + SMALLEST]) for start in _samples(len(content))]
    return {"bytes": len(content), "samples": samples}


def _samples(size: int) -> list[int]:
    """Returns the offsets of the sampled blocks: the first block is the file's beginning, the last its end."""
    return [(size - SMALLEST) * i // (SAMPLES - 1) for i in range(SAMPLES)]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describes in words where the data differ from earlier ones; empty where they don't.

    Each argument is the fingerprint of a text (`of`), of token files (`of_files`), or of a mixture of sources, each of
    which has one of these.
    """
    if before == now:
        return ""
    kind, other = (next(kind for kind in ("quotas", "files", "hashes") if kind in data) for data in (before, now))
    if kind != other:
        return "it is of another kind"
    if kind == "hashes":
        return _text_difference(before, now)
    if kind == "quotas":
        if before["quotas"] != now["quotas"]:
            return f"the shares of 65,536 sequences were {before['quotas']} and are {now['quotas']}"
        pairs = enumerate(zip(before["sources"], now["sources"], strict=True), 1)
        changes = ((f"source {number}: ", difference(old, new)) for number, (old, new) in pairs)
    else:
        old_files, new_files = before["files"], now["files"]
        if gone := [name for name in old_files if name not in new_files]:
            return f"the file {gone[0]} is missing"
        if new := [name for name in new_files if name not in old_files]:
            return f"the file {new[0]} is new"
        changes = ((f"the file {name}: ", _file_difference(old_files[name], file)) for name, file in new_files.items())
    return next((where + change for where, change in changes if change), "")


def _file_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if "hashes" in before and "hashes" in now:
        return _text_difference(before, now)
    if before["bytes"] != now["bytes"]:
        return f"it ends at byte offset {now['bytes']}, and had {before['bytes']} bytes"
    pairs = zip(_samples(now["bytes"]), before.get("samples", ()), now.get("samples", ()), strict=False)
    for start, old, new in pairs:
        if old != new:
            return f"it differs between the byte offsets {start} and {start + SMALLEST}"
    return "" if before["sha256"] == now["sha256"] else "its SHA-256 in the manifest is another"


def of(content: bytes | memoryview) -> dict[str, Any]:
    """Returns the content's size and a hash of each of its pieces, as JSON can hold them."""
    hashes = [_hash(memoryview(content)[start:end]) for start, end in _pieces(len(content))]
    return {"bytes": len(content), "hashes": hashes}


def _hash(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _text_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if (before["bytes"], before["hashes"]) == (now["bytes"], now["hashes"]):
        return ""
    size, old_size = now["bytes"], before["bytes"]
    pieces = zip(_pieces(size), _pieces(old_size), now["hashes"], before["hashes"], strict=False)
    for (start, end), old_piece, piece_hash, old_hash in pieces:
        if (start, end) == old_piece and piece_hash != old_hash:
            return f"it differs between the byte offsets {start} and {end}"
    if size < old_size:
        return f"it ends at byte offset {size}, and had {old_size} bytes"
    return f"it goes on after byte offset {old_size}, where it ended"


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yields the beginnings and ends of the pieces that are hashed.

    The first pieces have 4 KiB, the later ones a 64th to a 32nd of what lies before them, so that they are few. The
    beginning of a piece does not depend on the size of the whole.
    """
    start = 0
    while start < size:
        end = start + max(SMALLEST, 1 << start.bit_length() >> 6)
        yield start, min(end, size)
        start = end
