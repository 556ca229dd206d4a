"""From a long array of tokens to batches: which tokens a training step sees, and the validation split in order.

The training order is a pure function of the seed and the step, so that a resumed run, or one on another number of
devices, sees the same sequences:

    Epoch e draws an offset o in [0, T) and a permutation π, both from (seed, e). Its windows are the tokens at
    o + wT ... o + (w+1)T for w = 0 ... W-1; they overlap in one token, the last target of one and first input of the
    next. Sequence i of a run is window π(i mod W) of epoch i div W, and step s reads the sequences sAB ... (s+1)AB - 1
    for A micro-batches of B sequences.

The offset moves the windows' edges, so that in time every token is predicted from contexts of every length.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.layers.cross_entropy import IGNORED

CHECKED_AT_ONCE = 1 << 24


class Batch(NamedTuple):
    """The sequences of one step: A micro-batches of B sequences of T tokens, int32, and for each token the next one."""

    tokens: np.ndarray
    targets: np.ndarray


def split(tokens: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The first part for training, the last for validation, as views. Raises UserError for a fraction not in [0, 1)."""
    if not 0 <= validation_fraction < 1:
        raise UserError(f"the validation fraction is {validation_fraction}: choose one of at least 0 and less than 1")
    training_count = int(len(tokens) * (1 - validation_fraction))
    return tokens[:training_count], tokens[training_count:]


def batch_at(
    tokens: np.ndarray,
    *,
    step: int,
    micro_batches: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Batch:
    """The batch of one step, both arrays (A, B, T). `tokens` is 1-D and may be a memory map: only the windows are read.
    `seed` is at least 0. With `rows`, R of the numbers 0 ... B-1, those sequences of each micro-batch alone, (A, R, T).

    Raises UserError where there are fewer than T+1 tokens.
    """
    windows = windows_per_epoch(len(tokens), sequence_length)
    rows = range(batch_size) if rows is None else rows
    shape = (micro_batches, len(rows), sequence_length)
    inputs = np.empty((micro_batches * len(rows), sequence_length), np.int32)
    targets = np.empty_like(inputs)
    sequences = (micro_batch * batch_size + row for micro_batch in range(micro_batches) for row in rows)
    for j, sequence in enumerate(sequences):
        epoch, position = divmod(step * micro_batches * batch_size + sequence, windows)
        offset, permutation = _epoch(len(tokens), sequence_length, seed, epoch)
        start = offset + int(permutation[position]) * sequence_length
        inputs[j] = tokens[start : start + sequence_length]
        targets[j] = tokens[start + 1 : start + sequence_length + 1]
    return Batch(inputs.reshape(shape), targets.reshape(shape))


def windows_per_epoch(token_count: int, sequence_length: int) -> int:
    """W, the number of sequences in an epoch: as many as fit behind the largest offset, T-1, and at least one.

    Raises UserError where not even one sequence and its last target fit, that is below T+1 tokens.
    """
    if token_count <= sequence_length:
        raise UserError(
            f"the text has {token_count:,} tokens, and one sequence of length {sequence_length:,} needs "
            f"{sequence_length + 1:,}: choose a longer text or a shorter sequence length"
        )
    return max(1, token_count // sequence_length - 1)


@functools.lru_cache(maxsize=4)
def _epoch(token_count: int, sequence_length: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """The offset and the permutation (W,) of an epoch."""
    windows = windows_per_epoch(token_count, sequence_length)
    generator = np.random.default_rng((seed, epoch))
    largest = min(sequence_length, token_count - windows * sequence_length) - 1  # T-1, unless there are fewer than 2T
    return int(generator.integers(largest, endpoint=True)), generator.permutation(windows)


def check_vocabulary(tokens: np.ndarray, vocabulary_size: int, where: str) -> None:
    """Raise UserError if a token is not in [0, vocabulary_size). `where` names the tokens' file in the message."""
    for start in range(0, len(tokens), CHECKED_AT_ONCE):
        part = tokens[start : start + CHECKED_AT_ONCE]
        outside = (part < 0) | (part >= vocabulary_size)
        if outside.any():
            first = int(outside.argmax())
            raise UserError(
                f"{where}: token {part[first]} at position {start + first} is outside the vocabulary of "
                f"{vocabulary_size:,} tokens; the model needs the tokenizer these tokens were made with"
            )


def validation_batches(
    tokens: np.ndarray,
    *,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The split in order, as tokens and targets, both int32 (B, T): every token but the first is a target exactly once.

    The last batch is filled up with token 0 and target IGNORED, so the mean over the targets that are not IGNORED does
    not depend on B. `limit` is the largest number of batches. With `rows`, R of the numbers 0 ... B-1, those sequences
    of each batch alone, (R, T). Raises UserError where there are fewer than two tokens.
    """
    target_count = len(tokens) - 1
    if target_count < 1:
        raise UserError(
            f"the validation split has {len(tokens)} tokens and needs at least 2: choose a longer text or a larger "
            f"validation fraction"
        )
    rows = range(batch_size) if rows is None else rows
    starts = range(0, target_count, batch_size * sequence_length)[:limit]
    return (_validation_batch(tokens, start, rows, sequence_length) for start in starts)


def _validation_batch(
    tokens: np.ndarray, start: int, rows: Sequence[int], sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the windows from `start` on, which lie one behind the other, those with these numbers."""
    inputs = np.zeros((len(rows), sequence_length), np.int32)
    targets = np.full((len(rows), sequence_length), IGNORED, np.int32)
    for place, row in enumerate(rows):
        part = tokens[start + row * sequence_length : start + (row + 1) * sequence_length + 1]
        count = max(len(part) - 1, 0)
        inputs[place, :count] = part[:count]
        targets[place, :count] = part[1:]
    return inputs, targets
