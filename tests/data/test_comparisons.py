"""Comparisons in tokens: the answers, all pairs of a ranking, what doesn't fit, and the order of the examples."""

import itertools
import json

import numpy as np
import pytest

from jaxgpt.data import chat_templates, comparisons, tokenizers
from jaxgpt.errors import UserError
from jaxgpt.layers.cross_entropy import IGNORED

TOKENIZER = tokenizers.make("bytes", "")
TEMPLATE = chat_templates.built_in("chatml")


def read(tmp_path, *lines, length=400, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return comparisons.read([path], TEMPLATE, TOKENIZER, length, **options)


def words(tokens):
    return TOKENIZER.decode([int(token) for token in tokens])


TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two?"},
]


def test_the_answer_is_the_completion_alone(tmp_path):
    """The answer includes the token that ends it, and no earlier turns of the assistant; both texts have the
    prompt."""
    ((better, worse),) = read(tmp_path, {"prompt": TALK, "chosen": "yes", "rejected": "nope"}).rankings
    end = chat_templates.end_of_turn(TEMPLATE)
    for text, completion in ((better, "yes"), (worse, "nope")):
        assert words(text.tokens[text.answer]).strip() == completion + end
        assert "first answer" in words(text.tokens[~text.answer])
        whole = chat_templates.render([*TALK, {"role": "assistant", "content": completion}], TEMPLATE)
        assert words(text.tokens) == whole


def test_rankings_make_all_their_pairs(tmp_path):
    found = read(
        tmp_path,
        {"prompt": "p", "ranked": ["a", "b", "c", "d"]},
        {"prompt": "p", "chosen": "e", "rejected": "f"},
    ).rankings
    names = [[words(text.tokens[text.answer])[0] for text in ranking] for ranking in found]
    assert names == [["a", "b", "c", "d"], ["e", "f"]]
    pairs = [tuple(words(text.tokens[text.answer])[0] for text in pair) for pair in comparisons.pairs_of(found)]
    assert pairs == [*itertools.combinations("abcd", 2), ("e", "f")]

    arrays = comparisons.ranked_texts(found, 3, 80)
    assert arrays.ranks.tolist() == [[0, 1, 2], [0, 1, -1]]
    for row, column in ((0, 0), (0, 2), (1, 1)):
        text, last = found[row][column].tokens, arrays.last[row, column]
        assert last == len(text) - 1
        assert (arrays.tokens[row, column, : last + 1] == text).all()
        assert not arrays.tokens[row, column, last + 1 :].any()


def test_targets_of_pairs_are_the_next_tokens_of_the_answers(tmp_path):
    found = read(tmp_path, {"prompt": TALK, "chosen": "yes", "rejected": "nope"}).rankings
    arrays = comparisons.paired_texts(comparisons.pairs_of(found), 300)
    assert arrays.tokens.shape == arrays.targets.shape == (1, 2, 300)
    for side, text in enumerate(found[0]):
        there = np.flatnonzero(arrays.targets[0, side] != IGNORED)
        assert (arrays.targets[0, side, there] == text.tokens[text.answer]).all()
        assert (arrays.tokens[0, side, there + 1][:-1] == text.tokens[text.answer][:-1]).all()


def test_a_text_that_does_not_fit_takes_its_ranking_with_it(tmp_path):
    lines = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "b" * 300}
    found = read(tmp_path, *lines, length=100)
    assert len(found.rankings) == 1
    (place,) = found.left_out
    assert place.endswith("pairs.jsonl, line 2")
    with pytest.raises(UserError, match=r"pairs\.jsonl: no comparison to train on: all 2 have a text of more than 20"):
        read(tmp_path, *lines, length=20)


def test_bad_lines_are_named_and_skipped(tmp_path):
    lines = {"prompt": "p", "chosen": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 1: a comparison without a field 'rejected'"):
        read(tmp_path, *lines)
    assert len(read(tmp_path, *lines, skip_bad=1).rankings) == 1


@pytest.mark.parametrize(("count", "per_step"), [(7, 3), (4, 4), (3, 8), (1, 2)])
def test_each_example_is_there_once_an_epoch(count, per_step):
    """This holds for any step size; each epoch and each seed has another order; any step can be computed alone."""
    steps = 4 * count
    numbers = np.concatenate([comparisons.numbers_at(step, per_step, count, seed=3) for step in range(steps)])
    epochs = numbers[: len(numbers) // count * count].reshape(-1, count)
    assert (np.sort(epochs) == np.arange(count)).all()
    if count > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 1
        assert [comparisons.numbers_at(0, count, count, seed).tolist() for seed in range(3)] != [[*epochs[0]]] * 3


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.1), (100, 0.1), (7, 0.5), (2, 0.9), (3, 0.001), (40, 0.99)])
def test_the_held_out_part_is_a_share_spread_over_all(count, fraction):
    train, held_out = comparisons.split(list(range(count)), fraction)  # type: ignore[arg-type]
    assert sorted([*train, *held_out]) == list(range(count))
    assert train == sorted(train)
    assert min(len(train), len(held_out)) >= 1
    assert abs(len(held_out) - fraction * count) <= 1
    if len(held_out) > 2:
        assert max(np.diff(held_out)) - min(np.diff(held_out)) <= 1


def test_one_comparison_is_too_few_to_hold_one_out():
    with pytest.raises(UserError, match="two are needed"):
        comparisons.split([()], 0.1)  # type: ignore[arg-type]
