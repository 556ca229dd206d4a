import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import cross_entropy, entropy
from jaxgpt.proof import objective_cases as cases


def entropies(logits, targets, V):
    _, kept = cross_entropy.forward(jnp.asarray(logits), jnp.asarray(targets), vocabulary_size=V)
    return entropy.forward(kept, vocabulary_size=V)


@given(N=st.integers(1, 6), V=st.integers(2, 20), padding=st.integers(0, 9))
@example(N=1, V=2, padding=126)
def test_gradients(assert_exact, N, V, padding):
    assert_exact(cases.entropy_case(jax.random.key(0), N, V, V + padding))


def test_entropies_of_numpy(x64):
    """-Σ p log p, 0 where the target is ignored, and nothing of the padded columns."""
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.normal(size=(4, 9)), np.array([1, -1, 0, 2])
    p = np.exp(logits[:, :6])
    p /= p.sum(axis=1, keepdims=True)
    found, _ = entropies(logits, targets, 6)
    np.testing.assert_allclose(found, -(p * np.log(p)).sum(axis=1) * (targets >= 0), rtol=1e-13)


def test_the_most_and_the_least_uncertain(x64):
    """log V where all tokens are alike, with the gradient 0 there; 0 where one has all of the probability."""
    logits = np.array([[0.0] * 5, [800.0, 0, 0, 0, 0]])
    found, residuals = entropies(logits, [0, 0], 5)
    np.testing.assert_allclose(found, [np.log(5), 0], atol=1e-15)
    np.testing.assert_allclose(entropy.backward(residuals, jnp.ones(2), vocabulary_size=5), 0, atol=1e-15)


def test_a_shift_of_all_logits_changes_nothing(x64):
    logits = np.random.default_rng(0).normal(size=(3, 7))
    one, residuals = entropies(logits, [0, 1, 2], 7)
    other, _ = entropies(logits + 100, [0, 1, 2], 7)
    np.testing.assert_allclose(one, other, rtol=1e-12)
    gradient = entropy.backward(residuals, jnp.ones(3), vocabulary_size=7)
    assert np.asarray(gradient).sum(axis=1) == pytest.approx(0, abs=1e-14)
