"""Conversations packed in rows: what is in them, which ones don't fit, and the loader's promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.data import loader, packing
from jaxgpt.data.packing import BEGINS, TRAINED, Conversations
from jaxgpt.errors import UserError
from jaxgpt.layers.cross_entropy import IGNORED


def conversations(lengths, seed=0, answers=None):
    """Conversations of so many tokens, all different; of each a random part is trained, or `answers` say which."""
    rng, tokens, marks = np.random.default_rng(seed), [], []
    for number, length in enumerate(lengths):
        trained = rng.random(length) < 0.5 if answers is None else np.array(answers[number], bool)
        mark = trained * np.uint8(TRAINED)
        mark[0] |= BEGINS
        tokens.append(np.arange(length) + 1000 * number + 1)
        marks.append(mark)
    return Conversations(np.concatenate(tokens).astype(np.uint32), np.concatenate(marks))


def unpacked(row):
    """The conversations of a row: the inputs and the targets of each, and where it begins."""
    ends = [*(np.flatnonzero(np.diff(row.starts)) + 1), len(row.starts)]
    begins = [0, *ends[:-1]]
    assert all((row.starts[begin:end] == begin).all() for begin, end in zip(begins, ends, strict=True))
    return [(row.tokens[b:e], row.targets[b:e]) for b, e in zip(begins, ends, strict=True) if row.tokens[b]]


@given(st.lists(st.integers(2, 12), min_size=1, max_size=40), st.integers(11, 30))
def test_every_conversation_is_in_one_row_whole(lengths, length):
    source = conversations(lengths)
    packed = source.packed(length)
    found = {}
    for row in source.rows(range(packed.rows), length):
        assert all(array.shape == (length,) and array.dtype == np.int32 for array in row)
        for tokens, targets in unpacked(row):
            number = int(tokens[0]) // 1000
            assert number not in found
            found[number] = tokens, targets
    assert sorted(found) == list(range(len(lengths)))
    for number, (tokens, targets) in found.items():
        begin, end = source.begins[number : number + 2]
        trained = source.marks[begin + 1 : end] & TRAINED != 0
        assert tokens.tolist() == source.tokens[begin : end - 1].tolist()
        assert targets.tolist() == np.where(trained, source.tokens[begin + 1 : end].astype(int), IGNORED).tolist()
    assert packed.words(length) == []
    kept = np.concatenate([*source.targets(length, packed.rows), []])
    assert sorted(kept) == sorted(np.concatenate([t[t != IGNORED] for _, t in found.values()]))


@given(st.lists(st.integers(2, 20), min_size=1, max_size=200))
def test_few_places_stay_empty(lengths):
    """Best fit, decreasing, needs at most 11/9 of the best number of rows, and 1 more (Johnson et al. 1974)."""
    length = 19
    at_least = -(-sum(number - 1 for number in lengths) // length)
    # The bound is of the best packing, which may need more than all places together; two rows of slack cover that here.
    packed = conversations(lengths).packed(length)
    assert at_least <= packed.rows
    assert packed.rows <= 11 / 9 * max(at_least, sum(number - 1 > length / 2 for number in lengths)) * 1.25 + 2


A, U = [1], [0]
TWO = U * 3 + A * 3 + U * 2 + A * 4  # 12 tokens: a question and its answer, twice


@pytest.mark.parametrize(
    ("length", "taken"),
    [(11, 12), (10, 6), (6, 6), (5, 6), (4, 0), (2, 0)],
    ids=["whole", "one short", "between", "the first answer", "not even that", "far from it"],
)
def test_a_long_conversation_ends_behind_its_last_whole_answer(length, taken):
    source = conversations([12, 3], answers=[TWO, U * 1 + A * 2])
    packed = source.packed(length)
    found = dict(zip(packed.chosen.tolist(), packed.lengths.tolist(), strict=True))
    assert found.get(0, 0) == taken
    assert found[1] == 3
    assert packed.cut == ((0,) if taken == 6 else ())
    assert packed.left_out == (() if taken else (0,))
    targets = [t for row in source.rows(range(packed.rows), length) for t in row.targets.tolist() if t != IGNORED]
    answers = {12: [4, 5, 6, 9, 10, 11, 12], 6: [4, 5, 6], 0: []}[taken]
    assert sorted(targets) == [*answers, 1002, 1003]  # answers whole, or not at all


def test_it_says_which_were_cut_and_left_out():
    source = conversations([12, 3, 12, 12, 12, 20], answers=[TWO, U + A * 2, TWO, TWO, TWO, U * 10 + A * 10])
    assert source.packed(8).words(8) == [
        "4 of 6 conversations are too long for 8 tokens and end behind their last whole answer that fits: number 1, 3, "
        "4 and more",
        "1 of 6 conversations are too long for 8 tokens and are left out: number 6",
    ]
    with pytest.raises(UserError, match="none of 1 conversations fits in 8 tokens: choose a larger"):
        conversations([20], answers=[U * 10 + A * 10]).packed(8)


def batches(source, steps, **options):
    options = {"micro_batches": 2, "batch_size": 3, "sequence_length": 16, "seed": 5} | options
    return [loader.batch_at(source, step=step, **options) for step in range(steps)]


def seen(found):
    """The numbers of the conversations in batches, in order of time."""
    for batch in found:
        T = batch.tokens.shape[-1]
        for tokens, starts in zip(batch.tokens.reshape(-1, T), batch.starts.reshape(-1, T), strict=True):
            yield sorted({int(tokens[start]) // 1000 for start in np.unique(starts) if tokens[start]})


def test_every_conversation_once_an_epoch_in_another_order():
    source = conversations(np.random.default_rng(0).integers(2, 15, size=60))
    rows = source.packed(16).rows
    found = list(seen(batches(source, 40)))
    epochs = [found[start : start + rows] for start in range(0, len(found) - rows + 1, rows)]
    assert len(epochs) > 3
    for epoch in epochs:
        assert sorted(number for row in epoch for number in row) == list(range(60))
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step():
    source = conversations([5, 9, 3, 7] * 10)
    for step in (0, 7, 1000):
        options = {"step": step, "micro_batches": 2, "batch_size": 4, "sequence_length": 12}
        whole = loader.batch_at(source, seed=1, **options)
        again = loader.batch_at(conversations([5, 9, 3, 7] * 10), seed=1, **options)
        assert all((one == other).all() for one, other in zip(whole, again, strict=True))
        other_seed = loader.batch_at(source, seed=2, **options)
        assert (whole.tokens != other_seed.tokens).any()
        part = loader.batch_at(source, seed=1, rows=[1, 3], **options)
        assert all((one[:, [1, 3]] == other).all() for one, other in zip(whole, part, strict=True))


def test_a_mixture_with_text():
    chats, text = conversations([5, 9, 3, 7] * 20), np.arange(100_000, 140_000, dtype=np.uint32)
    mixed = loader.mixture([chats, text], [1, 3])
    found = batches(mixed, 100)
    rows = [row for batch in found for row in zip(*(array.reshape(-1, 16) for array in batch), strict=True)]
    of_text = [row for row in rows if row[0][0] >= 100_000]
    assert 0.7 < len(of_text) / len(rows) < 0.8
    for tokens, targets, starts in of_text:
        assert (targets == tokens + 1).all()
        assert not starts.any()
    assert all(IGNORED in targets for tokens, targets, _ in rows if tokens[0] < 100_000)


def test_validation_has_every_row_once_and_empty_ones_behind():
    source = conversations([5, 9, 3, 7] * 5)
    found = list(loader.validation_batches(source, batch_size=4, sequence_length=12))
    rows = source.packed(12).rows
    assert len(found) == -(-rows // 4)
    targets = np.concatenate([batch[1].ravel() for batch in found])
    assert sorted(targets[targets != IGNORED]) == sorted(np.concatenate([*source.targets(12, rows)]))
    assert (found[-1][1][rows % 4 or 4 :] == IGNORED).all()
    part = list(loader.validation_batches(source, batch_size=4, sequence_length=12, limit=1, rows=[2]))
    assert len(part) == 1
    assert (part[0][0][0] == found[0][0][2]).all()


def test_text_has_no_starts():
    assert (
        loader.batch_at(np.arange(100), step=0, micro_batches=1, batch_size=2, sequence_length=8, seed=0).starts is None
    )


def test_tokens_outside_the_vocabulary_are_found_and_ignored_targets_are_not():
    (batch,) = batches(conversations([5, 9]), 1)
    loader.check_batch(batch, 2000, "here")
    with pytest.raises(UserError, match=r"here: token .* is outside the vocabulary"):
        loader.check_batch(batch, 1000, "here")
    text = loader.Batch(np.zeros((1, 1, 2), np.int32), np.full((1, 1, 2), IGNORED, np.int32))
    with pytest.raises(UserError, match="token -1"):
        loader.check_batch(text, 1000, "here")


def test_damaged_marks():
    with pytest.raises(UserError, match="3 tokens have 2 marks"):
        Conversations(np.zeros(3, np.uint16), np.zeros(2, np.uint8))
    with pytest.raises(UserError, match="no conversation begins at their first token"):
        Conversations(np.zeros(3, np.uint16), np.array([0, BEGINS, 0], np.uint8))


def test_several_sources_one_after_another():
    first, second = conversations([3, 4]), conversations([5])
    both = packing.joined([first, second])
    assert both.count == 3
    assert np.asarray(both.tokens).tolist() == [*np.asarray(first.tokens), *np.asarray(second.tokens)]
    assert packing.joined([first]) is first
    assert (
        first.prompt().tolist()
        == np.asarray(first.tokens)[: int(np.argmax(np.asarray(first.marks) & TRAINED))].tolist()
    )
