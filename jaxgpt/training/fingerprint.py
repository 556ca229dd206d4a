"""Whether the data are those of an earlier start of the same run, and if not, from which byte on they differ."""

import hashlib
from collections.abc import Iterator
from typing import Any

SMALLEST = 4096  # bytes


def of(content: bytes) -> dict[str, Any]:
    """The content's size and a hash of each of its pieces, as JSON can hold them."""
    return {
        "bytes": len(content),
        "hashes": [
            hashlib.blake2b(memoryview(content)[start:end], digest_size=8).hexdigest()
            for start, end in _pieces(len(content))
        ],
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Where the content differs from that of before, in words; empty if it doesn't."""
    if before == now:
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
