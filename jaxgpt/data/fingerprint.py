"""Whether the data are those of an earlier start of the same run, and if not, from which byte on they differ.

Of a text, and of token files of up to a gibibyte together, every byte counts. Of more, each file's size, its SHA-256 as
the manifest has it, and SAMPLES blocks spread over it: enough to know other data, and files that were cut off, prepared
anew or overwritten, in seconds. A few bytes that a disk lost between two blocks are only found by
`run.py prepare --verify`, which reads all.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import files

SMALLEST = 4096  # bytes
SAMPLES = 16  # blocks of SMALLEST bytes of a file that is not read whole
READ_WHOLE = 1 << 30  # bytes of token files


def of_files(paths: Sequence[Path], sums: dict[str, str]) -> dict[str, Any]:
    """Of token files, with the SHA-256 of those that a manifest has one of."""
    whole = sum(map(files.size, paths)) <= READ_WHOLE
    found = {path.name: _of_file(path, whole) | {"sha256": sums.get(path.name, "")} for path in paths}
    return {"files": found}


def _of_file(path: Path, whole: bool) -> dict[str, Any]:
    with files.open_file(path) as file:
        content = memoryview(np.memmap(file, np.uint8, "r"))  # type: ignore[arg-type]
    if whole or len(content) <= SAMPLES * SMALLEST:
        return of(content)
    samples = [_hash(content[start : start + SMALLEST]) for start in _samples(len(content))]
    return {"bytes": len(content), "samples": samples}


def _samples(size: int) -> list[int]:
    """Where the blocks begin: the first at the beginning, the last at the end."""
    return [(size - SMALLEST) * i // (SAMPLES - 1) for i in range(SAMPLES)]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Where the data differ from those of before, in words; empty if they don't.

    Data are a text, files, or sources in shares, each of which is one of these.
    """
    if before == now:
        return ""
    kinds = [next(kind for kind in ("quotas", "files", "hashes") if kind in data) for data in (before, now)]
    if kinds[0] != kinds[1]:
        return "it is of another kind"
    if kinds[0] == "quotas":
        return _mixture_difference(before, now)
    return _files_difference(before["files"], now["files"]) if kinds[0] == "files" else _text_difference(before, now)


def _mixture_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before["quotas"] != now["quotas"]:
        return f"the shares of 65,536 sequences were {before['quotas']} and are {now['quotas']}"
    pairs = enumerate(zip(before["sources"], now["sources"], strict=True), 1)
    changes = ((number, difference(old, new)) for number, (old, new) in pairs)
    return next((f"source {number}: {change}" for number, change in changes if change), "")


def _files_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    for name in before:
        if name not in now:
            return f"the file {name} is missing"
    for name, file in now.items():
        if name not in before:
            return f"the file {name} is new"
        if change := _file_difference(before[name], file):
            return f"the file {name}: {change}"
    return ""


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
    """The content's size and a hash of each of its pieces, as JSON can hold them."""
    return {
        "bytes": len(content),
        "hashes": [_hash(memoryview(content)[start:end]) for start, end in _pieces(len(content))],
    }


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
    """Their beginnings and ends: of 4 KiB at first, then of a 64th to a 32nd of what lies before, so that they are few.

    Where a piece begins does not depend on the size of the whole.
    """
    start = 0
    while start < size:
        end = start + max(SMALLEST, 1 << start.bit_length() >> 6)
        yield start, min(end, size)
        start = end
