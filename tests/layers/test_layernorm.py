import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import layernorm
from jaxgpt.proof import cases

sizes = st.integers(1, 9)
B, T, C = 2, 3, 17


@given(B=sizes, T=sizes, C=st.integers(2, 40))
@example(B=1, T=1, C=2)
@example(B=1, T=1, C=129)
@example(B=3, T=2, C=1)  # one channel is always its own mean: y = β, and dx = 0
def test_gradients(assert_exact, B, T, C):
    assert_exact(cases.layernorm_case(jax.random.key(0), B, T, C))


@pytest.fixture
def arrays(x64):
    """(x, dy) in float64."""
    rng = np.random.default_rng(0)
    return 3 + 2 * rng.normal(size=(B, T, C)), rng.normal(size=(B, T, C))


def run(x, dy, epsilon, scale=1.0, bias=0.0):
    """(y, dx) as NumPy arrays."""

    def forward_and_backward(params, x, dy):
        y, residuals = layernorm.forward(params, x, epsilon=epsilon)
        return y, layernorm.backward(params, residuals, dy)[1]

    params = layernorm.Params(np.full(C, scale, x.dtype), np.full(C, bias, x.dtype))
    return [np.asarray(array) for array in jax.jit(forward_and_backward)(params, x, dy)]


def test_output_has_mean_0_and_variance_1(arrays):
    y, _ = run(*arrays, epsilon=1e-5)
    variance = arrays[0].var(axis=-1)
    np.testing.assert_allclose(y.mean(axis=-1), np.zeros((B, T)), atol=1e-14)
    np.testing.assert_allclose(y.var(axis=-1), variance / (variance + 1e-5), rtol=1e-12)


def test_scale_and_bias_follow_the_normalisation(arrays):
    y, _ = run(*arrays, epsilon=1e-5)
    scaled, _ = run(*arrays, epsilon=1e-5, scale=3.0, bias=-5.0)
    np.testing.assert_allclose(scaled, 3 * y - 5, rtol=1e-12)


def test_neither_shift_nor_scale_of_the_input_matters(arrays):
    x, dy = arrays
    np.testing.assert_allclose(run(7 * x - 100, dy, epsilon=0.0)[0], run(x, dy, epsilon=0.0)[0], atol=1e-11)


def test_dx_is_orthogonal_to_the_constant_vector_and_to_the_output(arrays):
    """The output doesn't change with a shift or a scale of x, so the gradient has no part in these two directions."""
    y, dx = run(*arrays, epsilon=0.0)
    np.testing.assert_allclose(dx.sum(axis=-1), np.zeros((B, T)), atol=1e-13)
    np.testing.assert_allclose((dx * y).sum(axis=-1), np.zeros((B, T)), atol=1e-13)


def test_epsilon_lets_a_little_of_the_scale_through(arrays):
    """The part along x̂ is the share ε/(var + ε) of the gradient there, since x̂² averages to var/(var + ε)."""
    x, dy = arrays
    y, dx = run(x, dy, epsilon=0.1)
    variance = x.var(axis=-1)
    expected = (dy * y).sum(axis=-1) / np.sqrt(variance + 0.1) * 0.1 / (variance + 0.1)
    np.testing.assert_allclose((dx * y).sum(axis=-1), expected, rtol=1e-10)
    np.testing.assert_allclose(dx.sum(axis=-1), np.zeros((B, T)), atol=1e-13)


def test_a_constant_input_stays_finite():
    dy = jnp.broadcast_to(jnp.arange(C, dtype=jnp.float32), (1, 1, C))
    y, dx = run(np.full((1, 1, C), 3.0, np.float32), dy, epsilon=1e-5)
    assert (y == 0).all()
    assert np.isfinite(dx).all()
