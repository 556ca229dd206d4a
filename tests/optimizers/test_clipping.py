import jax
import numpy as np
import optax
import pytest

from jaxgpt.optimizers import clipping


@pytest.fixture
def grads():
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": [rng.normal(size=5).astype(np.float32)]}


@jax.jit
def norm_and_clipped(grads):
    """Returns the norm, and the gradients clipped to a norm of 1."""
    norm = clipping.global_norm(grads)
    return norm, jax.tree.map(lambda grad: grad * clipping.factor(norm, 1.0), grads)


def test_norm_of_all_tensors_as_one_vector(grads):
    norm, _ = norm_and_clipped(grads)
    everything = np.concatenate([grads["a"].ravel(), grads["b"][0]])
    assert norm == pytest.approx(np.linalg.norm(everything), rel=1e-6)


@pytest.mark.parametrize("factor", [0.01, 0.2, 1.0, 1e3, 1e15])
def test_clips_as_optax_does(grads, factor):
    """Gradients longer than the limit keep their direction and get its length; shorter ones are unchanged."""
    grads = jax.tree.map(lambda grad: grad * np.float32(factor), grads)
    norm, clipped = norm_and_clipped(grads)
    expected, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)
    if norm < 1:
        jax.tree.map(np.testing.assert_array_equal, clipped, grads)
    else:
        assert clipping.global_norm(clipped) == pytest.approx(1, rel=1e-6)


def test_a_gradient_of_zero_stays_zero(grads):
    """The limit divided by its norm is infinite: that factor would make it NaN."""
    norm, clipped = norm_and_clipped(jax.tree.map(np.zeros_like, grads))
    assert norm == 0
    assert not any(np.asarray(grad).any() for grad in jax.tree.leaves(clipped))


@pytest.mark.parametrize("norm", [0.0, 1e-30, 5.0, 1e30])
def test_limit_0_never_clips(norm):
    assert clipping.factor(jax.numpy.float32(norm), 0.0) == 1


def test_not_a_number_is_not_hidden(grads):
    grads["a"][1, 2] = np.nan
    norm, _ = norm_and_clipped(grads)
    assert np.isnan(norm)
