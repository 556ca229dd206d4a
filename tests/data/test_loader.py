"""The order of the training sequences, the coverage of the validation split, and batches made in the background."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import loader
from jaxgpt.data.loader import AHEAD, Batch, Feeder
from jaxgpt.errors import UserError


def sequences(tokens: np.ndarray, count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Returns the first `count` training sequences, each with its last target."""
    batch = loader.batch_at(tokens, step=0, micro_batches=1, batch_size=count, sequence_length=length, seed=seed)
    return [(*row.tolist(), int(target[-1])) for row, target in zip(batch.tokens[0], batch.targets[0], strict=True)]


@settings(deadline=None)
@given(length=st.integers(1, 20), extra=st.integers(1, 200), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_window_once(length: int, extra: int, seed: int, epoch: int) -> None:
    tokens = np.arange(length + extra)  # a token is its own position
    windows = loader.windows_per_epoch(len(tokens), length)
    starts = sorted(row[0] for row in sequences(tokens, windows * (epoch + 1), length, seed)[windows * epoch :])
    assert np.diff(starts).tolist() == [length] * (windows - 1)
    assert 0 <= starts[0] < length
    assert starts[-1] + length < len(tokens)


@settings(deadline=None)
@given(length=st.integers(1, 20), extra=st.integers(1, 200))
def test_an_epoch_leaves_out_less_than_two_sequences(length: int, extra: int) -> None:
    count = length + extra
    assert count - loader.windows_per_epoch(count, length) * length <= 2 * length


def test_every_epoch_has_its_own_order_and_edges() -> None:
    tokens, length = np.arange(5000), 16
    windows = loader.windows_per_epoch(len(tokens), length)
    rows = np.array(sequences(tokens, 4 * windows, length)).reshape(4, windows, length + 1)
    assert len({tuple(epoch[:, 0]) for epoch in rows}) == 4
    assert len({epoch[:, 0].min() for epoch in rows}) > 1
    assert not np.array_equal(rows[0], np.array(sequences(tokens, windows, length, seed=1)))


def test_every_offset_occurs() -> None:
    tokens, length = np.arange(40), 5
    windows = loader.windows_per_epoch(len(tokens), length)
    rows = np.array(sequences(tokens, 200 * windows, length)).reshape(200, windows, length + 1)
    assert set(rows[:, :, 0].min(axis=1).tolist()) == set(range(length))


@settings(deadline=None)
@given(step=st.integers(0, 30), seed=st.integers(0, 5), micro_batches=st.integers(1, 3), batch_size=st.integers(1, 4))
def test_targets_are_the_next_tokens(step: int, seed: int, micro_batches: int, batch_size: int) -> None:
    tokens = np.arange(100, 200, dtype=np.uint16)
    batch = loader.batch_at(
        tokens, step=step, micro_batches=micro_batches, batch_size=batch_size, sequence_length=7, seed=seed
    )
    assert batch.tokens.shape == batch.targets.shape == (micro_batches, batch_size, 7)
    assert batch.tokens.dtype == batch.targets.dtype == np.int32
    assert np.array_equal(batch.targets, batch.tokens + 1)


@pytest.mark.parametrize(("micro_batches", "batch_size"), [(1, 12), (12, 1), (3, 4), (2, 6)])
def test_micro_batches_do_not_change_the_sequences(micro_batches: int, batch_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 300)
    expected = sequences(tokens, 60, 8)
    for step in range(5):
        batch = loader.batch_at(
            tokens, step=step, micro_batches=micro_batches, batch_size=batch_size, sequence_length=8, seed=0
        )
        found = [tuple(row) for row in batch.tokens.reshape(12, 8).tolist()]
        assert found == [row[:-1] for row in expected[12 * step : 12 * (step + 1)]]


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1, 3], []])
def test_some_rows_are_those_of_the_whole_batch_and_nothing_else_is_read(rows: list[int]) -> None:
    class Text:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, part: slice) -> np.ndarray:
            reads.append(part)
            return tokens[part]

    tokens = np.random.default_rng(2).integers(0, 50, 300)
    reads: list[slice] = []
    options = {"step": 17, "micro_batches": 3, "batch_size": 4, "sequence_length": 8, "seed": 0}
    whole = loader.batch_at(tokens, **options)
    part = loader.batch_at(Text(), rows=rows, **options)
    assert np.array_equal(part.tokens, whole.tokens[:, rows])
    assert np.array_equal(part.targets, whole.targets[:, rows])
    assert len(reads) == 3 * len(rows)


@pytest.mark.parametrize("count", [2, 20, 33, 34, 48, 49, 50])
def test_rows_of_the_validation_split_are_together_all_of_it(count: int) -> None:
    options = {"batch_size": 4, "sequence_length": 8}
    tokens = np.arange(count)
    whole = list(loader.validation_batches(tokens, **options))
    parts = [list(loader.validation_batches(tokens, rows=rows, **options)) for rows in ([0, 1], [2], [3])]
    for number, batch in enumerate(whole):
        for place in range(2):
            assert np.array_equal(np.concatenate([part[number][place] for part in parts]), batch[place])


def test_a_step_does_not_depend_on_the_steps_read_before() -> None:
    tokens = np.random.default_rng(1).integers(0, 50, 500)
    options = {"micro_batches": 2, "batch_size": 3, "sequence_length": 10, "seed": 7}
    forwards = [loader.batch_at(tokens, step=step, **options) for step in range(40)]
    loader._epoch.cache_clear()
    for step in reversed(range(40)):
        again = loader.batch_at(tokens, step=step, **options)
        assert np.array_equal(again.tokens, forwards[step].tokens)
        assert np.array_equal(again.targets, forwards[step].targets)


def test_a_memory_map_gives_what_an_array_gives(tmp_path) -> None:
    tokens = np.random.default_rng(2).integers(0, 65536, 1000).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    options = {"step": 3, "micro_batches": 2, "batch_size": 2, "sequence_length": 9, "seed": 0}
    assert np.array_equal(loader.batch_at(tokens, **options).tokens, loader.batch_at(mapped, **options).tokens)


def test_the_shortest_text_is_one_sequence_and_its_target() -> None:
    assert sequences(np.arange(9), 2, 8) == [tuple(range(9))] * 2
    with pytest.raises(UserError, match=r"8 tokens.* needs 9"):
        sequences(np.arange(8), 1, 8)


@settings(deadline=None)
@given(count=st.integers(0, 1000), fraction=st.floats(0, 0.999))
def test_split_keeps_every_token_in_order(count: int, fraction: float) -> None:
    tokens = np.arange(count)
    training, validation = loader.split(tokens, fraction)
    assert np.array_equal(np.concatenate([training, validation]), tokens)
    assert abs(len(validation) - count * fraction) <= 1


def test_split_of_tiny_shakespeare_is_the_usual_one() -> None:
    training, validation = loader.split(np.zeros(1_115_394, np.uint16), 0.1)
    assert (len(training), len(validation)) == (1_003_854, 111_540)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_refuses_fractions_that_are_none(fraction: float) -> None:
    with pytest.raises(UserError, match="validation fraction"):
        loader.split(np.arange(10), fraction)


@settings(deadline=None)
@given(count=st.integers(2, 200), batch_size=st.integers(1, 6), length=st.integers(1, 20))
def test_validation_predicts_every_token_but_the_first_exactly_once(count: int, batch_size: int, length: int) -> None:
    tokens = np.random.default_rng(count).permutation(count)
    predicted = []
    for inputs, targets in loader.validation_batches(tokens, batch_size=batch_size, sequence_length=length):
        assert inputs.shape == targets.shape == (batch_size, length)
        assert inputs.dtype == targets.dtype == np.int32
        kept = targets != loader.IGNORED
        assert (inputs[~kept] == 0).all()
        assert np.array_equal(inputs[:, 1:][kept[:, 1:]], targets[:, :-1][kept[:, 1:]])  # each is the input after
        predicted += zip(inputs[kept].tolist(), targets[kept].tolist(), strict=True)
    assert predicted == list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


def test_the_mean_over_the_validation_split_does_not_depend_on_the_batch_size() -> None:
    tokens = np.random.default_rng(3).integers(0, 100, 1001)

    def mean(batch_size: int) -> float:
        batches = loader.validation_batches(tokens, batch_size=batch_size, sequence_length=16)
        pairs = [(x[y != loader.IGNORED], y[y != loader.IGNORED]) for x, y in batches]
        return sum(int((x * y).sum()) for x, y in pairs) / sum(len(x) for x, _ in pairs)

    assert len({mean(batch_size) for batch_size in (1, 2, 3, 7, 64)}) == 1


def test_limit_takes_the_first_batches() -> None:
    tokens = np.arange(100)
    every = list(loader.validation_batches(tokens, batch_size=2, sequence_length=5))
    first = list(loader.validation_batches(tokens, batch_size=2, sequence_length=5, limit=3))
    assert (len(every), len(first)) == (10, 3)
    assert all(np.array_equal(a, b) for a, b in zip(every, first, strict=False))
    assert len(list(loader.validation_batches(tokens, batch_size=2, sequence_length=5, limit=99))) == 10


def test_a_split_without_a_target_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="1 tokens and needs at least 2"):
        loader.validation_batches(np.arange(1), batch_size=1, sequence_length=4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32])
def test_the_vocabulary_is_checked(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CHECKED_AT_ONCE", 8)
    tokens = (np.arange(100) % 50).astype(dtype)
    loader.check_vocabulary(tokens, 50, "tokens.bin")
    loader.check_vocabulary(tokens, 1 << 20, "tokens.bin")
    tokens[[37, 80]] = 50, 60
    with pytest.raises(UserError, match=r"tokens\.bin: token 50 at position 37 "):
        loader.check_vocabulary(tokens, 50, "tokens.bin")


def test_negative_tokens_are_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match="token -1 at position 2 "):
        loader.check_vocabulary(np.array([0, 1, -1]), 50, "tokens.bin")


def test_the_order_does_not_depend_on_how_a_step_is_split():
    """Sequence by sequence, over several epochs: so a run may go on with another split of the same steps."""
    tokens = np.arange(1000)
    for step in range(40):
        whole = loader.batch_at(tokens, step=step, micro_batches=1, batch_size=12, sequence_length=16, seed=3)
        for micro_batches in (2, 3, 12):
            batch_size = 12 // micro_batches
            parts = loader.batch_at(
                tokens, step=step, micro_batches=micro_batches, batch_size=batch_size, sequence_length=16, seed=3
            )
            assert parts.tokens.shape == (micro_batches, batch_size, 16)
            np.testing.assert_array_equal(parts.tokens.reshape(12, 16), whole.tokens[0])
            np.testing.assert_array_equal(parts.targets.reshape(12, 16), whole.targets[0])


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=2, max_size=5)


@given(weights=WEIGHTS)
def test_a_mixture_gives_each_source_its_share(weights):
    mixed = loader.mixture([np.zeros(1 << 20, np.uint8)] * len(weights), weights)
    assert sum(mixed.quotas) == loader.ROUND
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose(np.array(mixed.quotas) / loader.ROUND, shares, atol=2 * len(weights) / loader.ROUND)
    chosen, _ = loader.places(mixed, np.arange(loader.ROUND), 8, 0)
    assert np.bincount(chosen, minlength=len(weights)).tolist() == list(mixed.quotas)


@given(seed=st.integers(0, 9), length=st.integers(4, 30))
def test_each_source_of_a_mixture_has_epochs_of_its_own(seed, length):
    """The windows of a source come as they would alone, but for the order within a round."""
    sources = [np.arange(50_000), np.arange(250_000)]
    mixed = loader.mixture(sources, [0.3, 0.7])
    chosen, starts = loader.places(mixed, np.arange(3 * loader.ROUND), length, seed)
    for k, source in enumerate(sources):
        windows, own = loader.windows_per_epoch(len(source), length), starts[chosen == k]
        assert len(own) == 3 * mixed.quotas[k]
        times = np.bincount(own, minlength=len(source))
        epochs = len(own) / windows
        offsets = {loader._epoch(len(source), length, seed, e, k)[0] for e in range(int(epochs) + 1)}
        assert set(np.flatnonzero(times) % length) == {offset % length for offset in offsets}
        assert abs(times.sum() / windows - epochs) < 1e-9


def test_a_mixtures_sequences_are_mixed_evenly():
    """In runs of 512 sequences, as steps have them, the shares vary as drawn ones do (five standard deviations)."""
    mixed = loader.mixture([np.zeros(1 << 20, np.uint8)] * 2, [0.25, 0.75])
    chosen, _ = loader.places(mixed, np.arange(loader.ROUND), 8, 0)
    counts = (chosen == 0).reshape(-1, 512).sum(axis=1)
    deviation = (512 * 0.25 * 0.75) ** 0.5
    assert np.abs(counts - 128).max() < 5 * deviation
    assert 0.7 * deviation < counts.std() < 1.3 * deviation


def test_any_step_of_a_mixture_is_found_at_once():
    sources = [np.random.default_rng(k).integers(0, 50, 300) for k in range(3)]
    mixed = loader.mixture(sources, [1, 2, 3])
    options = {"micro_batches": 2, "batch_size": 5, "sequence_length": 7, "seed": 3}
    steps = [loader.batch_at(mixed, step=step, **options).tokens for step in range(20_000, 20_020)]
    numbers = np.arange(200_000, 200_200)
    chosen, starts = loader.places(mixed, numbers, 7, 3)
    windows = [sources[k][start : start + 7] for k, start in zip(chosen, starts, strict=True)]
    np.testing.assert_array_equal(np.concatenate([step.reshape(-1, 7) for step in steps]), windows)


# The permutation that takes no memory


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 65_536, 100_003])
def test_every_number_has_its_place(count):
    for seed in range(3):
        found = loader.permuted(np.arange(count), count, loader.permutation_keys(seed))
        assert sorted(found.tolist()) == list(range(count))


def test_a_place_does_not_depend_on_what_else_is_asked_for():
    keys = loader.permutation_keys(1, 2)
    whole = loader.permuted(np.arange(1000), 1000, keys)
    assert loader.permuted(np.array([17, 3, 999]), 1000, keys).tolist() == whole[[17, 3, 999]].tolist()


def test_billions_take_no_memory():
    count = 10**11
    places = np.array([0, 1, 2, count // 2, count - 1])
    found = loader.permuted(places, count, loader.permutation_keys(0))
    assert len(set(found.tolist())) == 5
    assert 0 <= found.min() <= found.max() < count


def test_all_orders_of_four_come_up_equally_often():
    """Chi-squared of 24 orders in 4,800 draws: 23 degrees of freedom, beyond 59 with a probability of 5 in 100,000."""
    draws = [tuple(loader.permuted(np.arange(4), 4, loader.permutation_keys(i)).tolist()) for i in range(4_800)]
    counts = Counter(draws)
    assert len(counts) == 24
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 59


def test_neighbours_are_torn_apart_and_no_place_is_preferred():
    """Among 10⁵ windows there is no correlation with the place, nor between neighbours (five standard deviations)."""
    count = 100_000
    found = loader.permuted(np.arange(count), count, loader.permutation_keys(5))
    assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 5 / count**0.5
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / count**0.5
    assert 0.5 < np.sum(found == np.arange(count)) + 0.6 < 12  # a random one has 1 fixed point on average


# Batches made in the background


def batch(step: int) -> Batch:
    return Batch(np.array(step), np.array(step + 1))


def test_batches_come_in_order():
    with Feeder(batch, 5) as feeder:
        assert [int(feeder.next().tokens) for _ in range(20)] == list(range(5, 25))


def test_they_are_made_while_the_step_runs():
    made = threading.Semaphore(0)

    def make(step):
        made.release()
        return batch(step)

    with Feeder(make, 0) as feeder:
        for _ in range(AHEAD):
            assert made.acquire(timeout=30)  # before anyone asked
        feeder.next()
        assert made.acquire(timeout=30)


def test_the_wait_is_told():
    def make(step):
        if step == 1:
            time.sleep(0.3)
        return batch(step)

    with Feeder(make, 0) as feeder:
        feeder.next()
        feeder.next()
        assert feeder.waited > 0.1
        time.sleep(0.2)
        feeder.next()
        assert feeder.waited < 0.1


def test_an_error_is_raised_in_its_turn_and_the_thread_ends():
    def make(step):
        if step == 2:
            raise UserError("step 2 has no data")
        return batch(step)

    with Feeder(make, 0) as feeder:
        assert [int(feeder.next().tokens) for _ in range(2)] == [0, 1]
        with pytest.raises(UserError, match="step 2 has no data"):
            feeder.next()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
