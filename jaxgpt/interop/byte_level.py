"""Byte-level BPE as Hugging Face's files write it: each byte as a printable character, and the merges in order."""

import heapq
from collections.abc import Sequence

from jaxgpt.data import encodings

END_OF_TEXT = encodings.END_OF_TEXT
LARGEST = 1 << 20  # bytes of all tokens together, up to which a file is compared with one of ours
BYTE_OF = encodings.printable_bytes()
CHARACTER_OF = [character for character, _ in sorted(BYTE_OF.items(), key=lambda item: item[1])]


_TABLE = dict(enumerate(CHARACTER_OF))


def written(token: bytes) -> str:
    """Returns a token's bytes as byte-level files write them."""
    return token.decode("latin-1").translate(_TABLE)


def merges(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """Returns the merges that make the tokens, in the order of the tokens' ids, as files write them.

    When all earlier merges have been applied to a token's bytes, two parts are left, and the token's merge joins them.
    Where more than two are left, no merge makes the token. A single byte needs none.
    """
    ranks: dict[bytes, int] = {}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) > 1 and (pair := _pair(token, ranks)):
            pairs.append((written(pair[0]), written(pair[1])))
        ranks[token] = rank
    return pairs


def _pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts that a token's bytes form after the merges with these ranks; None where they are not two.

    The pair of lowest rank is joined first, and the leftmost of equal ones. Pairs wait in a heap, so that n bytes take
    n log n steps.
    """
    length = len(token)
    end = list(range(1, length + 1))  # where the part that begins at this byte ends
    before = list(range(-1, length))  # where the part before it begins
    waiting: list[tuple[int, int, int]] = []  # rank, beginning, end

    def look(start: int) -> None:
        middle = end[start]
        if middle < length and (rank := ranks.get(token[start : end[middle]])) is not None:
            heapq.heappush(waiting, (rank, start, end[middle]))

    for start in range(length - 1):
        look(start)
    joined = [False] * length  # whether the part was joined to the one before it
    while waiting:
        _, start, stop = heapq.heappop(waiting)
        middle = end[start]
        if joined[start] or middle >= length or end[middle] != stop:  # a part of the pair has been joined since
            continue
        joined[middle], end[start] = True, stop
        before[stop] = start
        look(start)
        if start:
            look(before[start])
    first = end[0]
    return (token[:first], token[first:]) if first < length and end[first] == length else None
