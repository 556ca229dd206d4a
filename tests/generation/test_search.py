"""Beam search, speculative decoding and votes, beside searching everything and drawing greedily."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.generation import beam, choosing, speculative
from jaxgpt.generation.batching import ScoredToken
from jaxgpt.generation.decoder import Decoder
from jaxgpt.models import family
from jaxgpt.options.config import Compute, Model, Sampling
from tests import whole
from tests.nightly import nightly

GPT2 = Model(layers=2, heads=2, width=16, context=64, vocabulary_size=20)
LLAMA = Model(
    family="llama", layers=2, heads=4, kv_heads=2, width=16, feed_forward=24, context=64, window=8, vocabulary_size=20
)
both = pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
PROMPT = [3, 1, 4, 1, 5]


def random_params(model: Model, seed: int = 0):
    return jax.tree.map(lambda array: 6 * array, family(model).init(model, jax.random.key(seed)))


def speaker(model: Model, seed: int = 0) -> speculative.Speaker:
    return speculative.speaker(random_params(model, seed), model, Compute())


def greedy(model: Model, count: int, seed: int = 0) -> list[int]:
    decoder = Decoder(random_params(model, seed), model, Compute(), slots=1, capacity=64)
    tokens = [decoder.start(0, PROMPT, Sampling(temperature=0.0), 0)]
    while len(tokens) < count:
        tokens += decoder.go_on()[0]
    return tokens[:count]


@both
@pytest.mark.parametrize("drafted", nightly([1, 4], every_time=[4]))
def test_a_draft_changes_no_token(model, drafted):
    """The drafts are by a model that guesses nothing right, by another, and by the same one, which guesses all
    right."""
    expected = greedy(model, 40)
    assert len(set(expected)) > 3
    small = Model(layers=1, heads=1, width=8, context=64, vocabulary_size=20)
    for drafter in (speaker(small, 1), speaker(model, 2), speaker(model)):
        rounds = list(speculative.speculate(speaker(model), drafter, PROMPT, 40, drafted))
        tokens = [token for tokens in rounds for token in tokens]
        assert tokens[:40] == expected
        assert all(len(tokens) <= drafted + 1 for tokens in rounds)
    assert [len(tokens) for tokens in rounds[1:]] == [drafted + 1] * (len(rounds) - 1)  # the last is the same model


def test_models_that_do_not_go_together():
    other = speaker(Model(layers=1, heads=1, width=8, context=64, vocabulary_size=21))
    with pytest.raises(UserError, match="take one of the same tokenizer"):
        next(speculative.speculate(speaker(GPT2), other, PROMPT, 3))
    with pytest.raises(UserError, match="a model's context is 64: draw fewer"):
        next(speculative.speculate(speaker(GPT2), speaker(GPT2), PROMPT, 60))


def everything(model: Model, tokens: int, ends: frozenset[int]) -> list[tuple[float, list[int]]]:
    """The mean log-probability of every continuation of so many tokens, or fewer where one ends it; the best first."""
    params, found = random_params(model), {}
    texts = list(itertools.product(range(model.vocabulary_size), repeat=tokens))
    inputs = jnp.array([[*PROMPT, *text] for text in texts])
    scores = np.asarray(jax.nn.log_softmax(whole.logits(params, inputs, model, Compute())))[:, len(PROMPT) - 1 : -1]
    for text, score in zip(texts, scores, strict=True):
        stop = next((i for i, token in enumerate(text) if token in ends), None)
        length = tokens if stop is None else stop + 1
        mean = float(np.mean([score[i, text[i]] for i in range(length)]))
        found[text[:length]] = mean, [token for token in text[:length] if token not in ends]
    return sorted(found.values(), reverse=True)


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(frozenset(), marks=pytest.mark.slow),
        pytest.param(frozenset({2}), marks=pytest.mark.slow),
        pytest.param(frozenset({0, 5}), marks=pytest.mark.slow),
    ],
)
def test_with_beams_for_all_beginnings_it_finds_the_likeliest_of_all(ends):
    model = Model(layers=1, heads=2, width=16, context=16, vocabulary_size=6)
    expected = everything(model, 4, ends)[:10]
    found = beam.search(speaker(model), PROMPT, 4, 216, ends)[:10]
    assert [one.score for one in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [one.tokens for one in found] == [text for _, text in expected]


@both
def test_one_beam_is_greedy_and_more_are_no_worse(model):
    (found,) = beam.search(speaker(model), PROMPT, 12, 1)
    assert found.tokens == greedy(model, 12)
    better = beam.search(speaker(model), PROMPT, 12, 8)
    assert better[0].score >= found.score
    assert [one.score for one in better] == sorted((one.score for one in better), reverse=True)
    assert len({tuple(one.tokens) for one in better}) == 8


def test_a_text_that_does_not_fit():
    with pytest.raises(UserError, match="context is 64"):
        beam.search(speaker(GPT2), PROMPT, 60, 2)


def test_votes():
    answer = re.compile(r"answer: *(\d+)")
    texts = ["2 + 2, answer: 5, no, answer: 4", "answer: 5", "answer:4", "none", "answer: 7"]
    assert choosing.vote(texts, answer) == ("4", 2)
    assert choosing.vote(["none"], answer) is None
    assert choosing.vote(["a b", "c b"], re.compile(r"\w")) == ("b", 2)
    assert choosing.vote(["x", "y"], re.compile(r"x|(y)")) == ("y", 1)


def test_the_best_by_another_score():
    texts = [choosing.Whole(text=text) for text in ("aa", "b", "cccc", "ddd")]
    assert [one.text for one in choosing.best(texts, 2, score=lambda text: len(text.text))] == ["cccc", "ddd"]
    assert choosing.best(texts, 4) == texts
    scored = choosing.Whole(scored=[ScoredToken(0, -1.0, [], 0), ScoredToken(0, -3.0, [], 1)])
    assert choosing.mean_log_probability(scored) == -2
    assert choosing.mean_log_probability(choosing.Whole()) == -np.inf
