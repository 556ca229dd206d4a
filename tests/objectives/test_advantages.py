import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.objectives import advantages


def texts(rng, B=4, T=9):
    """Marks of answers of 0 to T-2 tokens, each with two tokens of prompt before it."""
    lengths = rng.integers(0, T - 1, size=B)
    places = np.arange(T)
    return (places >= 2) & (places < 2 + lengths[:, None])


@given(seed=st.integers(0, 100), discount=st.sampled_from([0.9, 1.0]), decay=st.sampled_from([0.0, 0.7, 1.0]))
def test_generalised_advantages_are_the_sums_of_the_paper(seed, discount, decay):
    """Σ_k (γλ)^k δ_{t+k}, an answer at a time, δ written out; returns are advantages plus values."""
    rng = np.random.default_rng(seed)
    answer = texts(rng)
    rewards, values = rng.normal(size=(2, *answer.shape))
    found, returns = advantages.generalised(rewards, values, answer, discount=discount, decay=decay)
    for b, row in enumerate(answer):
        places = np.flatnonzero(row)
        n = len(places)
        r, v = rewards[b, places], [*values[b, places], 0.0]
        deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((discount * decay) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        np.testing.assert_allclose(found[b, places], expected, atol=1e-12)
        np.testing.assert_allclose(returns[b, places], np.array(expected) + v[:n], atol=1e-12)
    assert not found[~answer].any()
    assert not returns[~answer].any()


def test_without_decay_the_return_is_the_discounted_reward(x64):
    """λ = 1: whatever the values say, the return is what was earned from there on."""
    rng = np.random.default_rng(0)
    answer = texts(rng)
    rewards, values = rng.normal(size=(2, *answer.shape))
    _, returns = advantages.generalised(rewards, values, answer, discount=0.9, decay=1.0)
    for b, t in zip(*np.nonzero(answer), strict=True):
        rest = rewards[b, t:][answer[b, t:]]
        assert returns[b, t] == pytest.approx(rest @ 0.9 ** np.arange(len(rest)))


def test_token_rewards():
    """The score comes once, at the last drawn token; an empty answer earns nothing."""
    answer = np.array([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    logp = np.array([[5.0, -1, -2, 5]] * 3)
    reference = np.array([[7.0, -3, -1, 7]] * 3)
    found = advantages.token_rewards(np.array([10.0, 20, 30]), logp, reference, answer, kl_coefficient=0.5)
    np.testing.assert_allclose(found, [[0, -1, 10.5, 0], [0, 0, 0.5, 21], [0, 0, 0, 0]])


def test_groups():
    scores = np.array([[1.0, 2, 3, 6], [4, 4, 4, 4]])
    plain = advantages.of_groups(scores, divide=False)
    np.testing.assert_allclose(plain, [[-2, -1, 0, 3], [0, 0, 0, 0]])
    divided = advantages.of_groups(scores, divide=True)
    np.testing.assert_allclose(divided[0], plain[0] / (np.sqrt(14 / 3) + 1e-4))
    assert not divided[1].any()  # of a group that is all alike nothing is learnt
    assert advantages.of_groups(np.ones((2, 1)), divide=True).tolist() == [[0], [0]]


def test_dividing_by_the_deviation_forgets_the_rewards_unit():
    scores = np.random.default_rng(0).normal(size=(3, 5))
    one, other = (advantages.of_groups(factor * scores + 7, divide=True) for factor in (100, 1000))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_whitened():
    rng = np.random.default_rng(0)
    answer = texts(rng)
    found = advantages.whitened(5 + 3 * rng.normal(size=answer.shape), answer)
    assert found[answer].mean() == pytest.approx(0, abs=1e-12)
    assert found[answer].std() == pytest.approx(1)
    assert not found[~answer].any()


def test_token_weights():
    answer = np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    assert advantages.token_weights(answer, by_sequence=False).sum() == 4
    np.testing.assert_allclose(advantages.token_weights(answer, by_sequence=True).sum(axis=1), [1, 1, 0])


@pytest.mark.parametrize(("divergence", "change"), [(6.0, 0), (5.4, -0.01), (100, 0.02), (0, -0.02)])
def test_the_coefficient_follows_the_divergence(divergence, change):
    """Ziegler et al.: a tenth of the relative error, which is taken to be at most 0.2."""
    assert advantages.adapted(0.2, divergence, target=6.0) == pytest.approx(0.2 * (1 + change))
