"""Makes batches of long arrays of tokens, for each training step and for the validation split in order.

The training order is a pure function of the seed and the step, so that a resumed run, or one on another number of
devices, sees the same sequences:

    Epoch e draws an offset o in [0, T) and a permutation π, both from (seed, e). Its windows are the tokens at
    o + wT ... o + (w+1)T for w = 0 ... W-1; they overlap in one token, the last target of one and first input of the
    next. Sequence i of a run is window π(i mod W) of epoch i div W, and step s reads the sequences sAB ... (s+1)AB - 1
    for A micro-batches of B sequences.

So in an epoch no token is an input twice, or a target twice. Fewer than 2T tokens are left out, at the two ends of the
array. The offset moves these and the windows' edges, so that in time every token is predicted from contexts of every
length.

Of conversations (`packing.py`) an epoch's windows are all their rows, in an order of its own.

In a mixture, each source has its own epochs, as above. The run's sequences are numbered in rounds of 65,536. In each
round every source has its share by its weight, and a permutation drawn from (seed, number of the round) mixes them.
"""

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data.packing import Conversations
from jaxgpt.data.token_files import Shards
from jaxgpt.errors import UserError
from jaxgpt.layers.cross_entropy import IGNORED

CHECKED_AT_ONCE = 1 << 24  # tokens
AHEAD = 2  # batches made before they are asked for
FEISTEL_ROUNDS = 8
ROUND = 1 << 16  # sequences; in each round every source of a mixture has its exact share

Tokens = np.ndarray | Shards | Conversations  # 1-D


class Batch(NamedTuple):
    """The sequences of one step, arrays int32 (A, B, T): micro-batches, sequences, tokens.

    The target of a token is the next token, or IGNORED.
    """

    tokens: Any  # a NumPy array; in a train step a JAX array
    targets: Any
    starts: Any = None  # of conversations: the place in its row where each token's conversation begins


def split(tokens: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns views of the first part, for training, and of the rest. UserError for a fraction not in [0, 1)."""
    if not 0 <= validation_fraction < 1:
        raise UserError(f"the validation fraction is {validation_fraction}: choose one of at least 0 and less than 1")
    training_count = int(len(tokens) * (1 - validation_fraction))
    return tokens[:training_count], tokens[training_count:]


@dataclass(frozen=True)
class Mixture:
    """Sources, with the number of sequences in each round of ROUND that come from each."""

    sources: tuple[Tokens, ...]
    quotas: tuple[int, ...] = (ROUND,)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)


def mixture(sources: Sequence[Tokens], weights: Sequence[float]) -> Mixture:
    """Returns the mixture in which each source's share of the sequences is proportional to its weight, above 0.

    Each source has at least one of ROUND sequences. Shares are rounded down, and the sequences left over go to the
    largest remainders.
    """
    shares = [weight / math.fsum(weights) * (ROUND - len(weights)) for weight in weights]
    quotas = [1 + math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: math.floor(shares[k]) - shares[k])
    for k in by_remainder[: ROUND - sum(quotas)]:
        quotas[k] += 1
    return Mixture(tuple(sources), tuple(quotas))


def batch_at(
    tokens: Tokens | Mixture,
    *,
    step: int,
    micro_batches: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Batch:
    """Returns the batch of one step, from 0 on: A = `micro_batches` of B sequences of T tokens.

    Args:
        tokens: The training tokens, which may lie on the disk: only the batch's windows are read.
        seed: The seed of the order, at least 0.
        rows: R of the numbers 0 ... B-1: the sequences of each micro-batch that are wanted, as arrays (A, R, T).
            None for all, as arrays (A, B, T).

    Raises:
        UserError: There are fewer than T+1 tokens, or no conversation that fits.
    """
    mixed = tokens if isinstance(tokens, Mixture) else Mixture((tokens,))
    rows = range(batch_size) if rows is None else rows
    inputs = np.empty((micro_batches * len(rows), sequence_length), np.int32)
    targets = np.empty_like(inputs)
    begins = np.zeros_like(inputs) if any(isinstance(source, Conversations) for source in mixed.sources) else None
    numbers = (step * micro_batches + np.arange(micro_batches)[:, None]) * batch_size + np.asarray(rows, np.int64)
    chosen, starts = places(mixed, numbers.ravel(), sequence_length, seed)
    for j, (number, start) in enumerate(zip(chosen.tolist(), starts.tolist(), strict=True)):
        source = mixed.sources[number]
        if isinstance(source, Conversations):
            assert begins is not None
            inputs[j], targets[j], begins[j] = source.row(start, sequence_length)
            continue
        window = source[start : start + sequence_length + 1]
        inputs[j], targets[j] = window[:-1], window[1:]
    shape = (micro_batches, len(rows), sequence_length)
    arrays = (inputs, targets) if begins is None else (inputs, targets, begins)
    return Batch(*(array.reshape(shape) for array in arrays))


def places(mixed: Mixture, numbers: np.ndarray, sequence_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each of the run's sequences `numbers`, and where in it the sequence is.

    That is the token at which it starts, or the row of conversations.
    """
    chosen, indices = _shared_out(mixed.quotas, numbers, seed)
    starts = np.empty(len(numbers), np.int64)
    for k, source in enumerate(mixed.sources):
        windows = sequences_per_epoch(source, sequence_length)
        epochs, positions = np.divmod(indices, windows)
        for epoch in np.unique(epochs[chosen == k]):
            here = (chosen == k) & (epochs == epoch)
            if isinstance(source, Conversations):
                starts[here] = permuted(positions[here], windows, permutation_keys(seed, int(epoch), k, 1))
                continue
            offset, keys = _epoch(len(source), sequence_length, seed, int(epoch), k)
            starts[here] = offset + permuted(positions[here], windows, keys) * sequence_length
    return chosen, starts


def _shared_out(quotas: tuple[int, ...], numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each sequence, and the sequence's number among those of that source."""
    if len(quotas) == 1:
        return np.zeros(len(numbers), np.int64), numbers
    rounds, positions = np.divmod(numbers, ROUND)
    for number in np.unique(rounds):
        here = rounds == number
        positions[here] = permuted(positions[here], ROUND, permutation_keys(seed, int(number), 0, 2))
    ends = np.cumsum(quotas)
    chosen = np.searchsorted(ends, positions, side="right")
    return chosen, rounds * np.array(quotas)[chosen] + positions - (ends - quotas)[chosen]


def sequences_per_epoch(source: Tokens, sequence_length: int) -> int:
    """Returns the number of a source's sequences in an epoch. UserError where there is none."""
    if isinstance(source, Conversations):
        return source.packed(sequence_length).rows
    return windows_per_epoch(len(source), sequence_length)


def windows_per_epoch(token_count: int, sequence_length: int) -> int:
    """Returns W, the number of sequences in an epoch: as many as fit behind the largest offset, T-1, and at least one.

    UserError for fewer than T+1 tokens: not even one sequence and its last target.
    """
    if token_count <= sequence_length:
        raise UserError(
            f"the text has {token_count:,} tokens, and one sequence of length {sequence_length:,} needs "
            f"{sequence_length + 1:,}: choose a longer text or a shorter --training.sequence-length"
        )
    return max(1, token_count // sequence_length - 1)


@functools.lru_cache(maxsize=64)
def _epoch(token_count: int, sequence_length: int, seed: int, epoch: int, source: int) -> tuple[int, np.ndarray]:
    """Returns the offset of an epoch, and the keys of its permutation."""
    windows = windows_per_epoch(token_count, sequence_length)
    generator = np.random.default_rng((seed, epoch, source))
    largest = min(sequence_length, token_count - windows * sequence_length) - 1  # T-1, unless there are fewer than 2T
    return int(generator.integers(largest, endpoint=True)), permutation_keys(seed, epoch, source, 1)


# A permutation of any size that takes no memory: a Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers
# with arbitrary finite domains").
#
#     (l, r) → (r, l xor f(r, kᵢ)) for i = 1 ... 8 permutes the numbers of 2h bits, whatever f is.
#
# A number that lands outside of the count goes through the network again until it lands inside. With the smallest 2h
# that suffices, at least one number in four lands inside. A stored permutation of the 10⁸ windows of FineWeb's 100
# billion tokens would take 800 MB in each process, and seconds to draw it anew for each epoch and each resume.


def permutation_keys(*seeds: int) -> np.ndarray:
    """Draws the keys that choose a permutation, uint64 (FEISTEL_ROUNDS,), from seeds of at least 0."""
    return np.random.default_rng(seeds).integers(1 << 64, size=FEISTEL_ROUNDS, dtype=np.uint64)


def permuted(places: np.ndarray, count: int, chosen: np.ndarray) -> np.ndarray:
    """Returns the images of `places`, 1-D, under the permutation of 0 ... count-1 that the keys `chosen` choose."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    values = _rounds(places.astype(np.uint64), half, chosen)
    while (outside := values >= count).any():
        values[outside] = _rounds(values[outside], half, chosen)
    return values.astype(np.int64)


def _rounds(values: np.ndarray, half: np.uint64, chosen: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in chosen:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << half | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mixes bits by SplitMix64's finalizer (Steele, Lea and Flood 2014): each bit of x flips about half of them."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def check_batch(batch: Batch, vocabulary_size: int, where: str) -> None:
    """Raises a UserError, which names `where`, if a token or a target is not in [0, vocabulary_size)."""
    targets = batch.targets if batch.starts is None else batch.targets[batch.targets != IGNORED]
    for tokens in (batch.tokens, targets):
        check_vocabulary(tokens.reshape(-1), vocabulary_size, where)


def check_vocabulary(tokens: Tokens, vocabulary_size: int, where: str) -> None:
    """Raises a UserError, which names `where`, if a token is not in [0, vocabulary_size)."""
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
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Returns an iterator over the split in order: tokens and targets, of conversations also starts, int32 (B, T).

    Every token but the first is a target exactly once. The last batch is padded with token 0 and target IGNORED, so the
    mean over the targets that are not IGNORED does not depend on B. At most `limit` batches are made, and of each only
    the sequences `rows`, where these are given. UserError for fewer than two tokens.
    """
    target_count = len(tokens) - 1
    if target_count < 1:
        raise UserError(
            f"the validation split has {len(tokens)} tokens and needs at least 2: choose a longer text or a larger "
            f"validation fraction"
        )
    rows = range(batch_size) if rows is None else rows
    if isinstance(tokens, Conversations):
        return _validation_rows(tokens, batch_size, sequence_length, limit, rows)
    starts = range(0, target_count, batch_size * sequence_length)[:limit]
    return (_validation_batch(tokens, start, rows, sequence_length) for start in starts)


def _validation_batch(tokens: Tokens, start: int, rows: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the windows `rows` of those that follow one another from `start` on, padded behind the last token."""
    inputs, targets = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), IGNORED, np.int32)
    for place, row in enumerate(rows):
        part = tokens[start + row * T : start + (row + 1) * T + 1]
        count = max(len(part) - 1, 0)
        inputs[place, :count] = part[:count]
        targets[place, :count] = part[1:]
    return inputs, targets


def _validation_rows(
    source: Conversations, batch_size: int, T: int, limit: int | None, rows: Sequence[int]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields batches of the rows of conversations in order, the last one with empty rows."""
    for start in range(0, source.packed(T).rows, batch_size)[:limit]:
        yield tuple(map(np.stack, zip(*source.rows([start + row for row in rows], T), strict=True)))


class Feeder(contextlib.AbstractContextManager):
    """Context manager whose `next()` returns make(first), make(first + 1), ..., computed ahead of time by one thread.

    An exception of `make` is raised by the `next` that would have returned its batch.
    """

    def __init__(self, make: Callable[[int], Any], first: int) -> None:
        self.waited = 0.0  # seconds that the last `next` waited
        self.values: dict[str, float] = {}  # nothing to record of a batch
        self._make, self._step = make, first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._batches: deque[Future[Any]] = deque()
        for _ in range(AHEAD):
            self._begin()

    def _begin(self) -> None:
        self._batches.append(self._thread.submit(self._make, self._step))
        self._step += 1

    def next(self, state: object = None) -> Any:
        """Returns the next batch, and has the thread make another one. Such batches don't depend on the state."""
        started = time.perf_counter()
        batch = self._batches.popleft().result()
        self.waited = time.perf_counter() - started
        self._begin()
        return batch

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
