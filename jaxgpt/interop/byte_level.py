"""Byte-level BPE as Hugging Face's files write it: each byte as a printable character, and merges in their order."""

import heapq
from collections.abc import Sequence

from jaxgpt.data import encodings

END_OF_TEXT = encodings.END_OF_TEXT
LARGEST = 1 << 20  # bytes of all tokens of a file that is looked at as one of ours
BYTE_OF = encodings.printable_bytes()
CHARACTER_OF = [character for character, _ in sorted(BYTE_OF.items(), key=lambda item: item[1])]


_TABLE = dict(enumerate(CHARACTER_OF))


def written(token: bytes) -> str:
    """A token's bytes as byte-level files write them."""
    return token.decode("latin-1").translate(_TABLE)


def merges(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """Returns the pairs that make the tokens, in the order of their ids and as files write them.

    The merge that makes a token joins the two parts that its bytes are in when all merges before it are done. Where
    there are more than two, no merge makes it; of single bytes there is none.
    """
    ranks: dict[bytes, int] = {}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) > 1 and (pair := _pair(token, ranks)):
            pairs.append((written(pair[0]), written(pair[1])))
        ranks[token] = rank
    return pairs


def _pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts that a token's bytes are in after the merges with these ranks, if they are two.

    The pair of lowest rank is joined first, the leftmost of equals. Pairs wait in a heap, so that it takes n log n
    steps for n bytes.
    """
    length = len(token)
    end = list(range(1, length + 1))  # of the part that begins at this byte
    before = list(range(-1, length))  # where the part before it begins
    waiting: list[tuple[int, int, int]] = []  # rank, beginning, end

    def look(start: int) -> None:
        middle = end[start]
        if middle < length and (rank := ranks.get(token[start : end[middle]])) is not None:
            heapq.heappush(waiting, (rank, start, end[middle]))

    for start in range(length - 1):
        look(start)
    joined = [False] * length  # into the part before it
    while waiting:
        _, start, stop = heapq.heappop(waiting)
        middle = end[start]
        if joined[start] or middle >= length or end[middle] != stop:  # of parts that have been joined since
            continue
        joined[middle], end[start] = True, stop
        before[stop] = start
        look(start)
        if start:
            look(before[start])
    first = end[0]
    return (token[:first], token[first:]) if first < length and end[first] == length else None
