"""Drawing tokens: which ones, how often, and the same ones again."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Compute, Model, Sampling
from jaxgpt.data import tokenizers
from jaxgpt.generation import sampling
from jaxgpt.models import gpt2

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MODEL = Model(layers=1, heads=2, width=16, context=12, vocabulary_size=20)
COMPUTE = Compute()
PROMPT = np.array([3, 1, 4, 1, 5])
GREEDY = Sampling(tokens=20, temperature=0.0)  # beyond the context of 12

# ln p of tokens in no order of likelihood; the last three are ties.
PROBABILITIES = np.array([0.05, 0.3, 0.1, 0.25, 0.06, 0.08, 0.08, 0.08])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)
DRAWS = 4000


@pytest.fixture(scope="module")
def params():
    """Larger than at initialisation, so that the model's tokens are not all about as likely."""
    return jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def generate(params):
    """A function that draws a list of tokens from the module's model."""

    def draw(options=GREEDY, *, prompt=PROMPT, seed=0, model=MODEL):
        return list(sampling.generate(params, prompt, options, seed, model, COMPUTE))

    return draw


@pytest.fixture(scope="module")
def frequencies():
    """A function that draws from LOGITS often, and returns how often each token came, as a share."""

    @jax.jit
    def draws(key, temperature, top_k, top_p):
        keys = jax.random.split(key, DRAWS)
        return jax.vmap(lambda key: sampling.draw(LOGITS, key, temperature, top_k, top_p))(keys)

    def count(temperature=1.0, top_k=0, top_p=1.0, seed=0):
        tokens = draws(jax.random.key(seed), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
        return np.bincount(np.asarray(tokens), minlength=LOGITS.size) / DRAWS

    return count


def assert_drawn_from(shares: np.ndarray, expected: np.ndarray) -> None:
    """No token that has probability 0, and Pearson's χ² of the others within what chance allows.

    χ² has as many degrees of freedom n as there are other tokens but one, so mean n and variance 2n; five deviations
    above the mean happens about once in 100,000 times, at any of these n.
    """
    possible = expected > 0
    assert not shares[~possible].any()
    statistic = DRAWS * np.sum((shares[possible] - expected[possible]) ** 2 / expected[possible])
    freedom = possible.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def kept(indices: list[int], temperature: float = 1.0) -> np.ndarray:
    """The distribution over only these tokens."""
    weights = np.zeros_like(PROBABILITIES)
    weights[indices] = PROBABILITIES[indices] ** (1 / temperature)
    return weights / weights.sum()


EVERY = list(range(8))


# One token from its logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(frequencies, temperature):
    assert_drawn_from(frequencies(temperature), kept(EVERY, temperature))


@pytest.mark.parametrize(
    ("top_k", "indices"),
    [(1, [1]), (2, [1, 3]), (3, [1, 3, 2]), (8, EVERY), (100, EVERY), (0, EVERY)],
)
def test_top_k_draws_among_the_likeliest(frequencies, top_k, indices):
    """In proportion to what the model gives them, and nothing else."""
    assert_drawn_from(frequencies(top_k=top_k), kept(indices))


@pytest.mark.parametrize(
    ("top_p", "indices"),
    [
        (0.01, [1]),  # the likeliest stays, whatever it has
        (0.29, [1]),
        (0.31, [1, 3]),  # 0.3 is not enough: the one that crosses the line is in
        (0.54, [1, 3]),
        (0.6, [1, 3, 2]),
        (0.96, EVERY),
        (1.0, EVERY),
    ],
)
def test_top_p_draws_among_the_likeliest_that_together_have_it(frequencies, top_p, indices):
    assert_drawn_from(frequencies(top_p=top_p), kept(indices))


def test_equally_likely_tokens_are_kept_together(frequencies):
    """Where the line falls between tokens of the same probability, none of them is worse than another."""
    assert_drawn_from(frequencies(top_k=4), kept([1, 3, 2, 5, 6, 7]))
    assert_drawn_from(frequencies(top_p=0.7), kept([1, 3, 2, 5, 6, 7]))


def test_top_p_counts_what_top_k_has_left(frequencies):
    """Of the two of top_k, the likelier has 0.3/0.55 = 0.545 of the probability."""
    assert_drawn_from(frequencies(top_k=2, top_p=0.5), kept([1]))
    assert_drawn_from(frequencies(top_k=2, top_p=0.6), kept([1, 3]))


def test_top_p_counts_probabilities_at_the_temperature(frequencies):
    """At temperature 1/3 the likeliest has more than half: 0.3³ of 0.3³ + 0.25³ + 0.1³ + ..."""
    assert kept(EVERY, 1 / 3)[1] > 0.55
    assert_drawn_from(frequencies(1 / 3, top_p=0.5), kept([1]))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 0.5)])
def test_temperature_0_takes_the_likeliest(frequencies, top_k, top_p):
    assert frequencies(0.0, top_k, top_p)[1] == 1


def test_other_seeds_draw_others(frequencies):
    assert not np.array_equal(frequencies(seed=0), frequencies(seed=1))


# A text from a model


def test_greedy_is_the_argmax_of_the_forward_pass(params, generate):
    """Beyond the context too, where the oldest tokens are forgotten; `gpt2.forward` sees the window alone, unpadded."""
    forward = jax.jit(functools.partial(gpt2.forward, model=MODEL, compute=COMPUTE))
    text = PROMPT.tolist()
    for _ in range(GREEDY.tokens):
        logits = forward(params, jnp.asarray([text[-MODEL.context :]]))
        text.append(int(jnp.argmax(logits[0, -1])))
    assert generate() == text[len(PROMPT) :]
    assert len(set(text)) > 3  # it is a text in which a mistake would show


def test_top_k_1_is_greedy_at_any_temperature(generate):
    assert generate(Sampling(tokens=20, temperature=2.0, top_k=1)) == generate()


def test_a_tiny_top_p_is_greedy(generate):
    assert generate(Sampling(tokens=20, temperature=2.0, top_p=1e-6)) == generate()


def test_the_same_seed_draws_the_same_text_and_another_another(generate):
    options = Sampling(tokens=20, temperature=1.0)
    assert generate(options, seed=1) == generate(options, seed=1)
    assert generate(options, seed=1) != generate(options, seed=2)


def test_a_longer_text_begins_with_the_shorter_one(generate):
    options = [Sampling(tokens=tokens, temperature=1.0) for tokens in (0, 5, 20)]
    none, short, long = (generate(option, seed=3) for option in options)
    assert none == []
    assert short == long[:5]


def test_tokens_come_one_by_one(params):
    """The first is there before the second is asked for, so that a terminal can show it."""
    stream = sampling.generate(params, PROMPT, GREEDY, 0, MODEL, COMPUTE)
    assert next(stream) == next(iter(sampling.generate(params, PROMPT, GREEDY, 0, MODEL, COMPUTE)))


def test_of_a_prompt_longer_than_the_context_the_end_counts(generate):
    long = np.concatenate([np.zeros(30, np.int64), np.arange(MODEL.context)])
    assert generate(prompt=long) == generate(prompt=np.arange(MODEL.context))


def test_what_lies_behind_the_last_token_has_no_influence(params, generate):
    """The array is filled up to its length with token 0; with any other, the same tokens are drawn."""
    padded = np.full((1, MODEL.context), 7, np.int32)
    padded[0, : len(PROMPT)] = PROMPT
    zero, one, all_of_it = np.float32(0), np.float32(1), 0
    token = sampling._next_token(
        params, padded, len(PROMPT) - 1, jax.random.key(0), 0, zero, all_of_it, one, model=MODEL, compute=COMPUTE
    )
    assert int(token) == generate()[0]


def test_one_program_serves_every_setting(generate):
    """The number of compiled programs stays what it is, whatever is asked for."""
    program: Any = sampling._next_token
    generate()
    before = program._cache_size()
    for options in (Sampling(3, 0.7, 5, 0.9), Sampling(9, 2.0, 0, 1.0), Sampling(1, 0.0, 0, 0.5)):
        generate(options, seed=options.tokens)
        generate(options, prompt=PROMPT[:2])
    assert program._cache_size() == before


def test_a_short_text_does_not_pay_for_the_whole_context(params, monkeypatch):
    """The array that is computed over is as long as the text, rounded up, and not as the context."""
    lengths = []

    def next_token(params, tokens, *args, **kwargs):
        lengths.append(tokens.shape[1])
        return 0

    monkeypatch.setattr(sampling, "_next_token", next_token)
    model = Model(layers=1, heads=2, width=16, context=1000, vocabulary_size=20)
    for tokens in (3, 60, 2000):
        list(sampling.generate(params, PROMPT, Sampling(tokens=tokens), 0, model, COMPUTE))
    assert lengths == 3 * [64] + 60 * [128] + 2000 * [1000]


def test_padding_of_the_vocabulary_is_never_drawn(params, generate):
    """Vp is 128 here and V 20; neither is a token that the tokenizer hasn't got, however likely it is."""
    assert max(generate(Sampling(tokens=100, temperature=50.0))) < 20
    tokenizer = tokenizers.make("characters", "abcde")
    model = sampling.only_known_tokens(MODEL, tokenizer)
    assert set(generate(Sampling(tokens=100, temperature=50.0), model=model)) == set(range(5))
    assert sampling.only_known_tokens(MODEL, tokenizers.make("bytes", "")) == MODEL
