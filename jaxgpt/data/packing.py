"""Conversations from prepared files, packed in rows of T tokens for a train step.

Beside each token file lies one of marks, a byte for each token:

    1    the assistant's: the model is to write it, and it is a target
    2    a conversation begins

A conversation of n tokens takes n - 1 places of a row: each of its tokens but the last is an input, and the next one is
its target where that is marked, else IGNORED. Several conversations lie in one row. Attention and positions begin anew
with each (`Batch.starts`), so loss and gradients are those of the conversations alone.

A row has the longest conversation that still fits into what is left of it, so that few places stay empty (best fit,
decreasing). Who shares a row with whom depends on their lengths and on T alone; the order of the rows is drawn anew for
each epoch, so that every conversation is seen once an epoch.

A conversation that is too long for a row ends behind its last whole answer that fits, and is left out where not even
the first one does. No answer is ever cut. `Packed.words` says how many were.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data.token_files import Shards
from jaxgpt.errors import UserError
from jaxgpt.layers.cross_entropy import IGNORED

TRAINED, BEGINS = 1, 2  # bits of a mark
AT_ONCE = 1 << 24  # marks that are read at a time


class Row(NamedTuple):
    """A row of T places, int32 (T,): conversations, and behind them tokens 0 whose targets are IGNORED."""

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray  # the place where each token's conversation begins; padding begins at its own first place


class Packed(NamedTuple):
    """Conversations by row: row r has those in `chosen[bounds[r]:bounds[r+1]]`."""

    chosen: np.ndarray  # numbers of conversations
    lengths: np.ndarray  # tokens of each of `chosen` that are taken
    bounds: np.ndarray
    count: int  # conversations, with those that were left out
    cut: tuple[int, ...]  # numbers of those that end behind an earlier answer
    left_out: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1

    def words(self, length: int) -> list[str]:
        """Returns lines that say what didn't fit, none where all did."""
        made = ((self.cut, "end behind their last whole answer that fits"), (self.left_out, "are left out"))
        return [
            f"{len(numbers):,} of {self.count:,} conversations are too long for {length:,} tokens and {what}: number "
            f"{', '.join(f'{number + 1:,}' for number in numbers[:3])}{' and more' if len(numbers) > 3 else ''}"
            for numbers, what in made
            if numbers
        ]


class Conversations:
    """Prepared conversations: their tokens as one read-only array, which can be sliced, and their marks."""

    def __init__(self, tokens: Shards | np.ndarray, marks: Shards | np.ndarray, where: str = "conversations") -> None:
        if len(tokens) != len(marks):
            raise UserError(
                f"{where} are damaged: {len(tokens):,} tokens have {len(marks):,} marks; restore them from a copy, or "
                "prepare them anew"
            )
        self.tokens, self.marks, self.where = tokens, marks, where
        parts = range(0, len(marks), AT_ONCE)
        begins = [start + np.flatnonzero(marks[start : start + AT_ONCE] & BEGINS) for start in parts]
        self.begins = np.concatenate([*begins, np.array([len(marks)])]).astype(np.int64)
        if len(self.begins) < 2 or self.begins[0] != 0:
            raise UserError(f"{where} are damaged: no conversation begins at their first token; prepare them anew")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.tokens[part]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that these conversations are read from."""
        parts = (self.tokens, self.marks)
        return tuple(path for part in parts if isinstance(part, Shards) for path in part.paths)

    @property
    def count(self) -> int:
        """Number of conversations."""
        return len(self.begins) - 1

    def prompt(self) -> np.ndarray:
        """Returns the first conversation's tokens up to its first answer."""
        first = slice(0, int(self.begins[1]))
        return self.tokens[first][: int(np.argmax(self.marks[first] & TRAINED))]

    @functools.lru_cache(maxsize=2)  # noqa: B019  # there are a few of these objects in a run
    def packed(self, length: int) -> Packed:
        """Returns the rows of `length` tokens. UserError where no conversation fits."""
        lengths = np.diff(self.begins)
        cut, left_out = [], []
        for number in np.flatnonzero(lengths > length + 1).tolist():
            lengths[number] = self._whole_answers(number, length + 1)
            (cut if lengths[number] else left_out).append(number)
        # A conversation of one token has no target.
        order = np.flatnonzero(lengths > 1)
        order = order[np.argsort(-lengths[order], kind="stable")]
        if not len(order):
            raise UserError(
                f"{self.where}: none of {len(lengths):,} conversations fits in {length:,} tokens: choose a larger "
                "--training.sequence-length"
            )
        chosen, bounds = _best_fit(order, lengths[order] - 1, length)
        return Packed(chosen, lengths[chosen], bounds, len(lengths), tuple(cut), tuple(left_out))

    def _whole_answers(self, number: int, most: int) -> int:
        """Returns how many tokens a conversation has up to the end of its last whole answer within `most`."""
        begin = int(self.begins[number])
        trained = (self.marks[begin : begin + most + 1] & TRAINED).astype(np.int8)
        ends = np.flatnonzero(np.diff(trained) < 0) + 1
        return int(ends[ends <= most].max(initial=0))

    def row(self, number: int, length: int) -> Row:
        """Returns row `number` of those of `length` tokens."""
        packed = self.packed(length)
        tokens, targets = np.zeros(length, np.int32), np.full(length, IGNORED, np.int32)
        starts, place = np.zeros(length, np.int32), 0
        for at in range(packed.bounds[number], packed.bounds[number + 1]):
            begin, count = int(self.begins[packed.chosen[at]]), int(packed.lengths[at])
            ids = self.tokens[begin : begin + count].astype(np.int32)
            trained = self.marks[begin + 1 : begin + count] & TRAINED != 0
            here = slice(place, place + count - 1)
            tokens[here], targets[here], starts[here] = ids[:-1], np.where(trained, ids[1:], IGNORED), place
            place += count - 1
        starts[place:] = place
        return Row(tokens, targets, starts)

    def targets(self, length: int, rows: int) -> Iterator[np.ndarray]:
        """Yields the targets of the first `rows` rows of `length` tokens, conversation by conversation."""
        packed = self.packed(length)
        last = packed.bounds[min(rows, packed.rows)]
        for number, taken in zip(packed.chosen[:last].tolist(), packed.lengths[:last].tolist(), strict=True):
            here = slice(int(self.begins[number]) + 1, int(self.begins[number]) + taken)
            yield self.tokens[here][self.marks[here] & TRAINED != 0]

    def rows(self, numbers: Sequence[int], length: int) -> Iterator[Row]:
        """Yields rows; one with nothing in it for a number behind the last."""
        count = self.packed(length).rows
        zeros = np.zeros(length, np.int32)
        for number in numbers:
            yield self.row(number, length) if number < count else Row(zeros, zeros + IGNORED, zeros)


def joined(parts: Sequence[Conversations]) -> Conversations:
    """Returns the conversations of several sources one after another, in memory."""
    if len(parts) == 1:
        return parts[0]
    tokens = np.concatenate([part.tokens[:] for part in parts])
    marks = np.concatenate([part.marks[:] for part in parts])
    return Conversations(tokens, marks, " and ".join(part.where for part in parts))


def _best_fit(numbers: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs `numbers`, whose `sizes` fall, in rows with room for `length`: each where the least room is left over.

    Returns the numbers row by row, and where each row begins and the last one ends.
    """
    row_of = np.empty(len(numbers), np.int64)
    rows_with: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # the keys of it, sorted
    count = 0
    for at, size in enumerate(sizes.tolist()):
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[place]
        else:
            room, row, count = length, count, count + 1
        row_of[at] = row
        left = room - size
        if left:
            if left not in rows_with:
                bisect.insort(rooms, left)
                rows_with[left] = []
            rows_with[left].append(row)
    order = np.lexsort((numbers, row_of))
    return numbers[order], np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])
