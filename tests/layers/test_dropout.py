"""Dropout: the share that is dropped, the mean that is kept, and masks that depend on places alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers import attention, dropout
from jaxgpt.layers.dropout import Masks

KEY = jax.random.key(3)


def masks(rows, rate):
    return Masks(KEY, jnp.asarray(rows), rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_and_the_mean_stays(rate):
    """A share p of n ones is dropped, give or take √(p (1 - p) / n); five of these are one case in a million."""
    y = np.asarray(dropout.forward(jnp.ones((4 * 64, 256)), masks(range(4), rate)))
    n, deviation = y.size, math.sqrt(rate * (1 - rate) / y.size)
    assert abs(np.sum(y == 0) / n - rate) <= 5 * deviation
    assert abs(y.mean(dtype=np.float64) - 1) <= 5 * deviation / (1 - rate) + 1e-6
    assert set(np.unique(y)) <= {0, np.float32(1) / np.float32(1 - rate)}


def test_rows_columns_and_places_in_the_model_are_independent():
    """A share (1 - p)² of pairs of numbers is kept together, within five deviations of the count."""
    kept = np.asarray(dropout.forward(jnp.ones((2 * 128, 128)), masks([0, 1], 0.5))) > 0
    other = np.asarray(dropout.forward(jnp.ones((2 * 128, 128)), masks([0, 1], 0.5).at(1))) > 0
    for a, b in ((kept[:128], kept[128:]), (kept[:, :64], kept[:, 64:]), (kept[::2], kept[1::2]), (kept, other)):
        assert abs(np.mean(a & b) - 0.25) <= 5 * math.sqrt(0.25 * 0.75 / a.size)


def test_a_sequence_has_its_masks_wherever_it_is_computed():
    """A device, or a micro-batch, has some of the rows, and they are masked as among all of them."""
    x = jax.random.normal(jax.random.key(0), (6, 5, 8))
    whole = dropout.forward(x, masks(range(6), 0.4))
    parts = [
        dropout.forward(x[rows], masks(rows, 0.4)) for rows in (np.array([0, 1, 2]), np.array([3]), np.array([4, 5]))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(dropout.backward(masks(range(6), 0.4), x), whole)


def test_without_masks_nothing_is_dropped():
    x = jnp.ones((3, 4))
    assert dropout.forward(x, None) is x
    assert dropout.backward(None, x) is x


def test_bfloat16_is_scaled_in_float32():
    """The reference is the exact product, rounded once."""
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    y = dropout.forward(x, masks(range(4), 0.1))
    exact = (np.asarray(x, np.float64) / 0.9).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, np.where(np.asarray(y, np.float32) == 0, 0, exact).astype(jnp.bfloat16))


def plain_attention(q, k, v, keep, rate):
    """Softmax of the whole square, in NumPy: keep is (B, H, T, T)."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (np.repeat(part, group, axis=2) for part in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", p * keep / (1 - rate), v)


@pytest.mark.parametrize("block", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)])
def test_attention_drops_the_probabilities_of_places_whatever_the_blocks_are(block):
    """The masks that the square has by the definition of a place: text and head, query and key."""
    B, T, H, K, D, rate = 2, 7, 4, 2, 3, 0.3
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, heads, D)) for heads in (H, K, K))
    rows = np.array([5, 9])
    of = masks(rows, rate)
    first = (rows[:, None] * H + np.arange(H)).astype(np.uint32)[..., None, None]
    second = np.arange(T * T, dtype=np.uint32).reshape(T, T)
    keep = np.asarray(of.keeps(jnp.asarray(first), jnp.asarray(second)))
    assert 0 < keep.mean() < 1
    out, _ = attention.forward(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), block=block, masks=of)
    np.testing.assert_allclose(out, plain_attention(q, k, v, keep, rate), rtol=2e-5, atol=2e-6)
