import math

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import cross_entropy
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.proof import cases

N, V, Vp = 5, 7, 10


@given(N=st.integers(1, 9), V=st.integers(1, 20), padding=st.integers(0, 9))
@example(N=1, V=2, padding=0)
@example(N=2, V=1, padding=3)  # one word only: probability 1, loss and gradient 0
@example(N=3, V=128, padding=0)
@example(N=3, V=129, padding=127)
def test_gradients(assert_exact, N, V, padding):
    assert_exact(cases.cross_entropy_case(jax.random.key(0), N, V, V + padding))


@pytest.fixture
def logits(x64):
    return np.random.default_rng(0).normal(size=(N, Vp))


TARGETS = np.array([0, 6, IGNORED, 3, IGNORED])
KEPT = TARGETS != IGNORED


@jax.jit
def _loss_and_gradient(logits, targets, dlosses):
    losses, residuals = cross_entropy.forward(logits, targets, vocabulary_size=V)
    return losses, cross_entropy.backward(residuals, dlosses, vocabulary_size=V)


def loss_and_gradient(logits):
    """Returns losses and gradient as NumPy arrays, where token n's loss has the gradient n + 1."""
    dlosses = (np.arange(N) + 1).astype(logits.dtype)
    losses, gradient = _loss_and_gradient(logits, TARGETS, dlosses)
    return np.asarray(losses), np.asarray(gradient)


def test_uniform_logits_cost_log_of_the_vocabulary(x64):
    losses, gradient = loss_and_gradient(np.full((N, Vp), 3.5))
    np.testing.assert_allclose(losses, np.where(KEPT, math.log(V), 0), rtol=1e-14)
    np.testing.assert_allclose(gradient[0, 1:V], np.full(V - 1, 1 / V), rtol=1e-14)
    np.testing.assert_allclose(gradient[0, 0], 1 / V - 1, rtol=1e-14)


def test_losses_are_minus_the_log_of_the_probability(logits):
    losses, _ = loss_and_gradient(logits)
    powers = np.exp(logits[:, :V])
    for n in np.flatnonzero(KEPT):
        assert losses[n] == pytest.approx(-math.log(powers[n, TARGETS[n]] / powers[n].sum()), rel=1e-13)


def test_padded_columns_have_no_part(logits):
    """Their content changes nothing, and their gradient is 0, not merely small."""
    losses, gradient = loss_and_gradient(logits)
    logits[:, V:] = 1e4
    other_losses, other_gradient = loss_and_gradient(logits)
    assert (gradient[:, V:] == 0).all()
    np.testing.assert_array_equal(other_losses, losses)
    np.testing.assert_array_equal(other_gradient, gradient)


def test_ignored_targets_cost_nothing_and_get_no_gradient(logits):
    losses, gradient = loss_and_gradient(logits)
    assert (losses[~KEPT] == 0).all()
    assert (gradient[~KEPT] == 0).all()
    assert (gradient[KEPT, :V] != 0).all()


def test_gradient_rows_add_up_to_zero(logits):
    """A constant added to all logits of a token changes no probability."""
    losses, gradient = loss_and_gradient(logits)
    np.testing.assert_allclose(gradient.sum(axis=-1), np.zeros(N), atol=1e-14)
    np.testing.assert_allclose(loss_and_gradient(logits + 50)[0], losses, rtol=1e-12)


def test_huge_logits_stay_finite():
    """In float32 exp of these would overflow."""
    logits = np.zeros((N, Vp), np.float32)
    logits[:, 0], logits[:, 1] = 1e4, -1e4
    losses, gradient = loss_and_gradient(logits)
    np.testing.assert_array_equal(losses, np.array([0, 1e4, 0, 1e4, 0], np.float32))
    assert np.isfinite(gradient).all()
