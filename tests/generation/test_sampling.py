"""Drawing tokens: which ones, how often, and the same ones again."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.generation import sampling
from jaxgpt.options.config import Model, Sampling

# ln p of tokens in no order of likelihood; the last three are ties.
PROBABILITIES = np.array([0.05, 0.3, 0.1, 0.25, 0.06, 0.08, 0.08, 0.08])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)
DRAWS = 4000


@pytest.fixture(scope="module")
def frequencies():
    """A function that draws from LOGITS often, and returns how often each token came, as a share.

    The draws are those of as many texts side by side, which differ in their seeds alone.
    """
    draw = jax.jit(sampling.draw)
    logits = jnp.tile(LOGITS, (DRAWS, 1))
    places = jnp.zeros(DRAWS, jnp.int32)

    def count(temperature=1.0, seed=0, seen=(), **options):
        chosen = Sampling(temperature=temperature, **options)
        settings = sampling.settings([(chosen, seed + number) for number in range(DRAWS)])
        has = np.zeros((DRAWS, LOGITS.size), bool)
        has[:, list(seen)] = True
        return np.bincount(np.asarray(draw(logits, settings, places, has)), minlength=LOGITS.size) / DRAWS

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
    """They are drawn in proportion to their probabilities, and no other token is."""
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
    """Tokens that tie with the last one kept are kept as well."""
    assert_drawn_from(frequencies(top_k=4), kept([1, 3, 2, 5, 6, 7]))
    assert_drawn_from(frequencies(top_p=0.7), kept([1, 3, 2, 5, 6, 7]))


def test_top_p_counts_what_top_k_has_left(frequencies):
    """The likelier of the two that top_k keeps has 0.3/0.55 = 0.545 of the probability."""
    assert_drawn_from(frequencies(top_k=2, top_p=0.5), kept([1]))
    assert_drawn_from(frequencies(top_k=2, top_p=0.6), kept([1, 3]))


def test_top_p_counts_probabilities_at_the_temperature(frequencies):
    """The likeliest has more than half at temperature 1/3: 0.3³ of 0.3³ + 0.25³ + 0.1³ + ..."""
    assert kept(EVERY, 1 / 3)[1] > 0.55
    assert_drawn_from(frequencies(1 / 3, top_p=0.5), kept([1]))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 0.5)])
def test_temperature_0_takes_the_likeliest(frequencies, top_k, top_p):
    assert frequencies(0.0, top_k=top_k, top_p=top_p)[1] == 1


def test_seeds_are_jaxs_keys():
    """Seeds that fit an int32 are taken as they are, others with their upper half too."""
    seeds = [0, 1, 2**31 - 1, 2**32 + 5, -1]
    found = sampling.settings([(Sampling(), seed) for seed in seeds]).seed
    with jax.enable_x64(True):
        expected = [jax.random.key_data(jax.random.key(seed)) for seed in seeds]
    np.testing.assert_array_equal(found, expected)


def test_other_seeds_draw_others(frequencies):
    assert not np.array_equal(frequencies(seed=0), frequencies(seed=DRAWS))


@pytest.mark.parametrize(
    ("min_p", "indices"),
    [
        (0.01, EVERY),
        (0.19, [1, 2, 3, 4, 5, 6, 7]),  # 0.06 / 0.3 is 0.2, and 0.05 / 0.3 is 0.17
        (0.25, [1, 2, 3, 5, 6, 7]),
        (0.3, [1, 2, 3]),
        (0.5, [1, 3]),
        (1.0, [1]),
    ],
)
def test_min_p_draws_among_those_that_have_a_share_of_the_likeliest(frequencies, min_p, indices):
    assert_drawn_from(frequencies(min_p=min_p), kept(indices))


def test_min_p_is_of_probabilities_at_the_temperature(frequencies):
    """The least likely has √(0.05 / 0.3) = 0.41 of the likeliest's weight at temperature 2, and only 0.03 at 1/2."""
    assert_drawn_from(frequencies(2.0, min_p=0.4), kept(EVERY, 2.0))
    assert_drawn_from(frequencies(0.5, min_p=0.1), kept([1, 2, 3], 0.5))


def test_min_p_together_with_top_k(frequencies):
    """The stricter of the two counts."""
    assert_drawn_from(frequencies(top_k=2, min_p=0.25), kept([1, 3]))
    assert_drawn_from(frequencies(top_k=5, min_p=0.5), kept([1, 3]))


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_repetition_penalty(frequencies, penalty):
    """All of LOGITS are negative, so those of tokens that were seen are multiplied; then comes the temperature."""
    logits = np.log(PROBABILITIES)
    logits[[1, 4]] *= penalty
    weights = np.exp(logits / 2)
    assert_drawn_from(frequencies(2.0, repetition_penalty=penalty, seen=[1, 4]), weights / weights.sum())


def test_repetition_penalty_makes_the_greedy_choice_another(frequencies):
    """0.3 to the power of 1.3 is 0.21, less than 0.25."""
    assert frequencies(0.0, repetition_penalty=1.3, seen=[1])[3] == 1
    assert frequencies(0.0, repetition_penalty=1.1, seen=[1])[1] == 1


def test_repetition_penalty_divides_what_is_positive():
    logits = jnp.array([[3.0, 2.0, -1.0, -4.0]])

    def likeliest(seen, penalty):
        settings = sampling.settings([(Sampling(temperature=0.0, repetition_penalty=penalty), 0)])
        has = np.isin(np.arange(4), seen)[None]
        return int(sampling.draw(logits, settings, jnp.zeros(1, jnp.int32), has)[0])

    assert likeliest([0], 1.4) == 0  # 3 / 1.4 = 2.14
    assert likeliest([0], 1.6) == 1  # 3 / 1.6 = 1.88
    assert likeliest([0, 1], 1.6) == 0


def test_texts_side_by_side_have_their_own_settings():
    """Each draws what it draws alone."""
    rows = [
        (Sampling(temperature=0.0), 1),
        (Sampling(temperature=1.0), 1),
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=2.0, top_p=0.5), 3),
        (Sampling(temperature=2.0, min_p=0.5, repetition_penalty=2.0), 4),
    ]
    logits = jax.random.normal(jax.random.key(0), (len(rows), 50))
    seen = np.arange(50) % 3 == np.zeros((len(rows), 1))
    places = np.arange(len(rows), dtype=np.int32)
    draw = jax.jit(sampling.draw)
    together = draw(logits, sampling.settings(rows), places, seen)
    alone = [
        int(draw(logits[i : i + 1], sampling.settings([row]), places[i : i + 1], seen[i : i + 1])[0])
        for i, row in enumerate(rows)
    ]
    assert together.tolist() == alone


def test_a_model_draws_no_token_that_the_tokenizer_has_not_got():
    model = Model(vocabulary_size=20)
    assert sampling.only_known_tokens(model, tokenizers.make("characters", "abcde")).vocabulary_size == 5
    assert sampling.only_known_tokens(model, tokenizers.make("bytes", "")) == model
