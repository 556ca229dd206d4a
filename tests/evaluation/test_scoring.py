"""Scores of completions: the model's own log-probabilities, one sequence at a time, however they are batched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.evaluation.scoring import SHORTEST, ScoringRequest, make_scorer, padded_length
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import arrange
from jaxgpt.options.config import Compute, Config, Model, Parallel
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training.state import layout_of
from tests import whole

CONFIG = Config(
    model=Model(layers=2, heads=2, width=16, context=40, vocabulary_size=150), compute=Compute(layers="scanned")
)


@pytest.fixture(scope="module")
def params():
    """Parameters larger than at initialisation, so that tokens differ in their likelihood."""
    return jax.tree.map(lambda array: 8 * array, gpt2.init(CONFIG.model, jax.random.key(0)))


@pytest.fixture(scope="module")
def requests(params):
    """Requests of all lengths: two the same, some too long for the context, some that the model itself would write."""
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (3, 2), (30, 5), (38, 2), (39, 2), (60, 30), (1, 40), (5, 40), (7, 1), (7, 1), (12, 20)]
    found = [ScoringRequest(*(generator.integers(150, size=size).tolist() for size in pair)) for pair in sizes]
    found[9] = found[8]
    forward = jax.jit(lambda tokens: whole.logits(params, tokens, CONFIG.model, CONFIG.compute))
    for length in (1, 4):
        text = found[1].context
        for _ in range(length):
            padded = np.zeros((1, 40), np.int32)
            padded[0, : len(text)] = text
            text = [*text, int(np.argmax(forward(padded)[0, len(text) - 1]))]
        found.append(ScoringRequest(text[: len(text) - length], text[len(text) - length :]))
    return found


@pytest.fixture(scope="module")
def expected(params, requests):
    """The log-likelihood by each sequence's logits alone, in float64, and whether each token is the likeliest."""
    forward = jax.jit(lambda tokens: whole.logits(params, tokens, CONFIG.model, CONFIG.compute))
    found = []
    for context, completion in requests:
        sequence = [*context, *completion][-41:]
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(sequence) - 1] = sequence[:-1]
        logits = np.asarray(forward(jnp.asarray(padded))[0], np.float64)
        logits = logits[len(sequence) - 1 - len(completion) : len(sequence) - 1]
        at_target = logits[np.arange(len(completion)), completion]
        normaliser = np.log(np.sum(np.exp(logits), axis=-1))
        found.append((np.sum(at_target - normaliser), bool(np.all(logits.argmax(-1) == completion))))
    return found


def assert_scores(scores, expected):
    assert [score.greedy for score in scores] == [greedy for _, greedy in expected]
    assert [score.log_likelihood for score in scores] == pytest.approx([value for value, _ in expected], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, pytest.param(32, marks=pytest.mark.slow)])
def test_scores_are_the_models_whatever_the_batch_size(params, requests, expected, batch_size):
    scores = make_scorer(CONFIG, batch_size)(params, requests)
    assert_scores(scores, expected)
    assert scores[8] == scores[9]
    assert {score.greedy for score in scores} == {True, False}


def divided(layout: Layout, params: gpt2.Params) -> gpt2.Params:
    return jax.device_put(layout.shard(arrange(params, Compute())), layout.shardings(layout.specs()))


@pytest.mark.parametrize(
    ("devices", "zero"), [(2, 3), *(pytest.param(*p, marks=pytest.mark.slow) for p in [(4, 0), (4, 1), (8, 2), (8, 3)])]
)
def test_several_devices_give_the_same_scores(params, requests, expected, devices, zero):
    """Parameters are sharded as a train state of this ZeRO stage has them, with their layers unstacked."""
    config = dataclasses.replace(CONFIG, compute=Compute(), parallel=Parallel(devices=devices, zero=zero))
    one_batch = make_scorer(config, 2)
    scores = one_batch(divided(layout_of(config), params), requests)
    assert_scores(scores, expected)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_padded_lengths_are_few_and_waste_little(length, context):
    length = min(length, context)
    padded = padded_length(length, context)
    assert length <= padded <= max(context, SHORTEST)
    assert padded <= max(SHORTEST, 1.5 * length)


def test_there_are_few_padded_lengths():
    assert sorted({padded_length(length, 1024) for length in range(1, 1025)}) == [
        *(32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    ]
    assert padded_length(5, 8) == 8
