import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import unembedding
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.proof import cases

sizes = st.integers(1, 6)
B, T, C, V, Vp = 2, 5, 3, 7, 10


@given(B=sizes, T=sizes, C=sizes, V=st.integers(2, 20), padding=st.integers(0, 9), chunk=st.integers(1, 40))
@example(B=1, T=1, C=1, V=2, padding=0, chunk=1)
@example(B=2, T=5, C=3, V=100, padding=28, chunk=4)  # a last chunk of two tokens
@example(B=2, T=5, C=3, V=128, padding=0, chunk=64)  # a chunk larger than the batch
@example(B=1, T=7, C=2, V=129, padding=127, chunk=7)
def test_gradients(assert_exact, B, T, C, V, padding, chunk):
    assert_exact(cases.unembedding_case(jax.random.key(0), B, T, C, V, V + padding, chunk))


@pytest.mark.parametrize("cap", [0.3, 5.0])
def test_gradients_of_capped_logits(assert_exact, cap):
    assert_exact(cases.unembedding_case(jax.random.key(0), 2, 5, 3, 6, 8, 4, cap=cap))


@pytest.fixture
def inputs(x64):
    """(params, x, targets) in float64."""
    rng = np.random.default_rng(0)
    targets = rng.integers(V, size=(B, T))
    targets[0, 1] = targets[1, 4] = IGNORED
    return unembedding.Params(rng.normal(size=(Vp, C))), rng.normal(size=(B, T, C)), targets


def summed(scale):
    """The objective that is `scale` times the sum of the tokens' losses."""
    return lambda logp: (-scale * jnp.sum(logp), jnp.full(logp.shape, -scale))


def run(inputs, chunk, scale=1.0, dloss=1.0):
    """(loss, gradient by the weight, gradient by x) as NumPy arrays."""

    def forward_and_backward(params, x, targets, scale, dloss):
        loss, residuals = unembedding.forward(params, x, targets, summed(scale), vocabulary_size=V, chunk=chunk)
        dparams, dx = unembedding.backward(residuals, dloss)
        return loss, dparams.weight, dx

    return [np.asarray(array) for array in jax.jit(forward_and_backward)(*inputs, scale, dloss)]


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 3, 11])
def test_independent_of_the_chunk(inputs, chunk):
    assert_close(run(inputs, chunk), run(inputs, B * T))


def test_loss_and_gradients_of_a_loop_over_tokens(inputs):
    """NumPy computes them a token at a time, with the gradient as (p - onehot) by the chain rule."""
    (weight,), x, targets = inputs
    loss, dweight, dx = 0.0, np.zeros_like(weight), np.zeros_like(x)
    for b, t in np.ndindex(B, T):
        if targets[b, t] == IGNORED:
            continue
        p = np.exp(weight[:V] @ x[b, t])
        p /= p.sum()
        loss -= 0.25 * np.log(p[targets[b, t]])
        p[targets[b, t]] -= 1
        dx[b, t] = 0.25 * weight[:V].T @ p
        dweight[:V] += 0.25 * np.outer(p, x[b, t])
    assert_close(run(inputs, 4, scale=0.25), (loss, dweight, dx))


def test_gradients_are_zero_where_nothing_was_read(inputs):
    """Padded rows of the weight and tokens whose target is ignored: 0, not merely small."""
    _, dweight, dx = run(inputs, 4)
    assert (dweight[V:] == 0).all()
    assert (dx[inputs[2] == IGNORED] == 0).all()
    assert (dweight[:V] != 0).all()


def test_loss_gradient_is_a_factor(inputs):
    _, dweight, dx = run(inputs, 4)
    _, *doubled = run(inputs, 4, dloss=2.0)
    assert_close(doubled, (2 * dweight, 2 * dx))


def test_logits_are_the_inner_products_with_the_rows(inputs):
    params, x, _ = inputs
    expected = [[np.dot(token, row) for row in params.weight] for token in x[0]]
    np.testing.assert_allclose(jax.jit(unembedding.logits)(params, x[0]), expected, rtol=1e-13)
