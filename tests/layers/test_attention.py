import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import attention
from jaxgpt.proof import cases

sizes = st.integers(1, 4)
B, T, H, D = 2, 5, 3, 4


@given(B=sizes, T=st.integers(1, 9), H=sizes, D=sizes, block=st.integers(3, 12))
@example(B=1, T=1, H=1, D=1, block=1)
@example(B=1, T=5, H=1, D=3, block=2)  # one head, and a last block of one query
@example(B=2, T=3, H=3, D=5, block=1)
@example(B=2, T=4, H=2, D=2, block=100)
def test_gradients(assert_exact, B, T, H, D, block):
    assert_exact(cases.attention_case(jax.random.key(0), B, T, H, D, block))


@given(B=sizes, T=st.integers(1, 9), H=sizes, D=sizes, block=st.integers(3, 12))
@example(B=2, T=9, H=2, D=3, block=2)
def test_gradients_of_documents(assert_exact, B, T, H, D, block):
    assert_exact(cases.attention_case(jax.random.key(0), B, T, H, D, block, documents=True))


@given(B=sizes, T=st.integers(1, 9), K=sizes, D=sizes, group=sizes, block=st.integers(3, 12), window=st.integers(0, 11))
@example(B=2, T=9, K=2, D=3, group=3, block=2, window=4)
@example(B=1, T=9, K=1, D=2, group=4, block=4, window=1)
@example(B=1, T=9, K=2, D=2, group=2, block=9, window=3)
@example(B=1, T=9, K=2, D=2, group=2, block=3, window=9)
def test_gradients_of_groups_in_a_window(assert_exact, B, T, K, D, group, block, window):
    assert_exact(cases.attention_case(jax.random.key(0), B, T, K, D, block, group=group, window=window))


def normals(dtype, seed=0):
    """q, k, v and dout."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, H, D)).astype(dtype) for _ in range(4)]


def run(q, k, v, dout, block, starts=None, window=0):
    """(out, dq, dk, dv) as NumPy arrays."""

    def forward_and_backward(q, k, v, dout):
        out, residuals = attention.forward(q, k, v, block=block, starts=starts, window=window)
        return out, *attention.backward(residuals, dout, block=block, starts=starts, window=window)

    return [np.asarray(array) for array in jax.jit(forward_and_backward)(q, k, v, dout)]


def test_equals_dense_softmax(x64):
    """A query and head at a time, in NumPy."""
    q, k, v, dout = normals(np.float64)
    out, *_ = run(q, k, v, dout, block=3)
    for b, t, h in np.ndindex(B, T, H):
        scores = k[b, : t + 1, h] @ q[b, t, h] / math.sqrt(D)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[b, t, h], weights @ v[b, : t + 1, h], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("window", [1, 2, 4, 5])
@pytest.mark.parametrize("block", [2, 5])
def test_a_window_in_numpy(x64, window, block):
    """Each query sees the newest keys, itself among them."""
    q, k, v, dout = normals(np.float64)
    out, *_ = run(q, k, v, dout, block=block, window=window)
    for b, t, h in np.ndindex(B, T, H):
        seen = slice(max(0, t + 1 - window), t + 1)
        scores = k[b, seen, h] @ q[b, t, h] / math.sqrt(D)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[b, t, h], weights @ v[b, seen, h], rtol=1e-12, atol=1e-14)


def test_groups_are_repeated_keys(x64):
    """Key head h // G for query head h; its gradient is the sum of those that its copies would have."""
    rng = np.random.default_rng(0)
    q, dout = rng.normal(size=(2, B, T, 6, D))
    k, v = rng.normal(size=(2, B, T, 2, D))
    out, dq, dk, dv = run(q, k, v, dout, block=2)
    repeated = run(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), dout, block=2)
    np.testing.assert_allclose(out, repeated[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dq, repeated[1], rtol=1e-12, atol=1e-14)
    for ours, theirs in zip((dk, dv), repeated[2:], strict=True):
        np.testing.assert_allclose(ours, theirs.reshape(B, T, 2, 3, D).sum(axis=3), rtol=1e-12, atol=1e-13)


def test_no_product_with_keys_out_of_the_window():
    """A block of 4 queries with a window of 8 has at most 11 keys, however long the sequence.

    The two query heads of a key head are one product's rows.
    """
    q, k = (jax.ShapeDtypeStruct((1, 64, heads, D), jnp.float32) for heads in (4, 2))
    program = str(jax.make_jaxpr(lambda q, k, v: attention.forward(q, k, v, block=4, window=8)[0])(q, k, k))
    scores = [int(keys) for keys in re.findall(r"f32\[1,2,8,(\d+)\] = dot_general", program)]
    assert len(scores) >= 16
    assert max(scores) == 11


@pytest.mark.parametrize("block", [1, 2, 5])
def test_documents_are_as_each_is_alone(x64, block):
    """Documents of 2 and 3 tokens share one sequence, and of 4 and 1 the other; outputs and gradients of each."""
    arrays = normals(np.float64)
    together = run(*arrays, block=block, starts=jnp.array([[0, 0, 2, 2, 2], [0, 0, 0, 0, 4]]))
    for b, places in ((0, slice(0, 2)), (0, slice(2, 5)), (1, slice(0, 4)), (1, slice(4, 5))):
        alone = run(*(array[b : b + 1, places] for array in arrays), block=block)
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_allclose(whole[b : b + 1, places], part, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 5, 6])
def test_independent_of_the_block(x64, block):
    arrays = normals(np.float64)
    for actual, expected in zip(run(*arrays, block=block), run(*arrays, block=4), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_causal(block):
    """A later token changes no earlier output, and an earlier output sends no gradient to a later token: not a bit."""
    *arrays, dout = normals(np.float32)
    early = 3  # the tokens that stay
    dout[:, early:] = 0
    others = normals(np.float32, seed=1)[:3]
    changed = [np.concatenate([a[:, :early], b[:, early:]], axis=1) for a, b in zip(arrays, others, strict=True)]
    before, after = run(*arrays, dout, block=block), run(*changed, dout, block=block)

    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:, :early], b[:, :early])
    assert (before[0][:, early:] != after[0][:, early:]).all()
    for gradient in before[1:]:
        assert (gradient[:, early:] == 0).all()


def test_first_query_sees_only_itself():
    """Its one weight is 1, whatever q is."""
    q, k, v, dout = normals(np.float32)
    out, dq, _, _ = run(q, k, v, dout, block=2)
    np.testing.assert_allclose(out[:, 0], v[:, 0], rtol=1e-6)
    np.testing.assert_allclose(dq[:, 0], np.zeros((B, H, D)), atol=1e-6)


def test_heads_and_sequences_are_apart():
    """Other numbers in one head of one sequence change the output there and nowhere else."""
    q, k, v, dout = normals(np.float32)
    out, *_ = run(q, k, v, dout, block=2)
    v[1, :, 2] += 1
    changed_out, *_ = run(q, k, v, dout, block=2)
    changed = (out != changed_out).any(axis=(1, 3))
    assert changed.tolist() == [[False, False, False], [False, False, True]]


def test_large_scores_stay_finite():
    """In float32 exp of these scores would overflow; the largest score then takes all of the weight."""
    q, k, v, dout = normals(np.float32)
    out, *grads = run(100 * q, 100 * k, v, dout, block=2)
    assert all(np.isfinite(array).all() for array in (out, *grads))
    for b, h in np.ndindex(B, H):
        likeliest = (k[b, :, h] @ q[b, -1, h]).argmax()
        np.testing.assert_allclose(out[b, -1, h], v[b, likeliest, h], rtol=1e-5)
