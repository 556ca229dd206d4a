"""The fused softmax in Pallas: interpreted on the CPU beside the layer, and what is handed to XLA for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.kernels import pallas_softmax
from jaxgpt.layers import cross_entropy
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.proof import cases
from tests.kernels.triton_calls import calls, deprecated, lowered
from tests.proof import test_mutations as mutation

SHAPES = [(1, 1, 128), (5, 100, 128), (7, 250, 384), (3, 64, 64), (3, 70, 300)]  # N, V, Vp; a piece has 64 columns


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pallas_softmax, "PIECE", 64)


def arrays(shape, dtype=jnp.float64):
    """Logits, with anything beyond the vocabulary, and targets, of several the last one ignored."""
    N, V, Vp = shape
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, N)
    if N > 1:
        targets[-1] = IGNORED
    return jnp.asarray(5 * rng.normal(size=(N, Vp)), dtype), jnp.asarray(targets, jnp.int32)


def by_layer(logits, targets, vocabulary_size):
    """The losses, and the gradients of those that aren't ignored."""
    losses, residuals = cross_entropy.forward(logits, targets, vocabulary_size=vocabulary_size)
    return losses, cross_entropy.backward(residuals, jnp.ones_like(losses), vocabulary_size=vocabulary_size)


def by_kernel(logits, targets, vocabulary_size, dtype=None):
    dtype = dtype or logits.dtype
    losses, dlogits = pallas_softmax.forward(logits, targets, vocabulary_size=vocabulary_size, dtype=dtype)
    return losses, jnp.where((targets == IGNORED)[:, None], 0, dlogits)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_layer(x64, small_pieces, shape):
    made = arrays(shape)
    for ours, exact in zip(by_kernel(*made, shape[1]), by_layer(*made, shape[1]), strict=True):
        assert (ours.shape, ours.dtype) == (exact.shape, exact.dtype)
        np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 2.0**-20), (jnp.bfloat16, 2.0**-9)])
def test_rounds_no_more_than_its_dtype(x64, small_pieces, dtype, limit):
    """The logits are of float32, as their product gives them; the gradient is rounded once, to nearest."""
    logits, targets = arrays((7, 250, 384), jnp.float32)
    losses, dlogits = by_kernel(logits, targets, 250, dtype)
    exact, exact_dlogits = by_layer(logits.astype(jnp.float64), targets, 250)
    assert dlogits.dtype == dtype
    assert np.linalg.norm(losses - exact) <= 2.0**-20 * np.linalg.norm(exact)
    difference = np.asarray(dlogits, np.float64) - exact_dlogits
    assert np.linalg.norm(difference) <= limit * np.linalg.norm(exact_dlogits)


@pytest.mark.parametrize("value", [1e30, -1e30, 0.0])
def test_logits_of_any_size(small_pieces, value):
    """All the same: each token of the vocabulary has an equal share, and what is beyond it none."""
    targets = jnp.zeros(2, jnp.int32)
    losses, dlogits = by_kernel(jnp.full((2, 200), value, jnp.float32), targets, 150)
    # logsumexp - z is a difference of numbers of that size
    np.testing.assert_allclose(losses, np.log(150), atol=max(1e-5, abs(value) * 2.0**-23))
    if not value:
        np.testing.assert_allclose(dlogits[:, 1:150], 1 / 150, rtol=1e-5)
    assert not np.any(dlogits[:, 150:])


def test_what_is_not_a_number_shows(small_pieces):
    logits = jnp.zeros((2, 200), jnp.float32).at[1, 70].set(jnp.nan)
    losses, _ = by_kernel(logits, jnp.zeros(2, jnp.int32), 150)
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_unembedding_by_it_has_autodiffs_gradients(assert_exact, small_pieces, cap):
    """The objective weighs every token otherwise; there are two chunks, and ignored targets."""
    assert_exact(
        cases.unembedding_case(jax.random.key(0), 2, 5, 3, 70, 128, 8, cap=cap, softmax=pallas_softmax.forward)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("module", "tree"), list(mutation.mutants([(pallas_softmax, "_softmax_kernel")])))
def test_a_dropped_term_is_noticed(x64, small_pieces, monkeypatch, module, tree):
    monkeypatch.setattr(module, tree.name, mutation.compiled(module, tree))
    made = arrays((5, 100, 200))
    found, exact = by_kernel(*made, 100), by_layer(*made, 100)
    assert not all(np.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, exact, strict=True))


@deprecated
def test_one_kernel_reads_the_logits_once():
    """And nothing else does, nor is anything of their size written but the gradient."""
    run = functools.partial(pallas_softmax.forward, vocabulary_size=50257, dtype=jnp.bfloat16)
    logits, targets = jax.ShapeDtypeStruct((256, 50304), jnp.float32), jax.ShapeDtypeStruct((256,), jnp.int32)
    text = lowered(run, logits, targets)
    assert calls(text) == [("softmax_kernel", ["%arg0", "%arg1"])]
    others = [line for line in text.splitlines() if "50304" in line and "custom_call" not in line]
    assert re.findall(r"stablehlo\.(?!return)\w+", "\n".join(others)) == []
