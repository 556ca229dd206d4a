import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import rmsnorm
from jaxgpt.proof import cases

sizes = st.integers(1, 9)
B, T, C = 2, 3, 17


@given(B=sizes, T=sizes, C=st.integers(2, 40))
@example(B=1, T=1, C=2)
@example(B=1, T=1, C=129)
def test_gradients(assert_exact, B, T, C):
    assert_exact(cases.rmsnorm_case(jax.random.key(0), B, T, C))


@pytest.fixture
def arrays(x64):
    """(x, dy) in float64."""
    rng = np.random.default_rng(0)
    return 3 + 2 * rng.normal(size=(B, T, C)), rng.normal(size=(B, T, C))


def run(x, dy, epsilon, scale=1.0):
    """(y, dx) as NumPy arrays."""

    def forward_and_backward(params, x, dy):
        y, residuals = rmsnorm.forward(params, x, epsilon=epsilon)
        return y, rmsnorm.backward(params, residuals, dy)[1]

    params = rmsnorm.Params(np.full(C, scale, x.dtype))
    return [np.asarray(array) for array in jax.jit(forward_and_backward)(params, x, dy)]


def test_output_has_mean_square_1(arrays):
    y, _ = run(*arrays, epsilon=1e-5)
    square = np.square(arrays[0]).mean(axis=-1)
    np.testing.assert_allclose(np.square(y).mean(axis=-1), square / (square + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(run(*arrays, epsilon=1e-5, scale=3.0)[0], 3 * y, rtol=1e-12)


def test_only_the_direction_of_the_input_matters(arrays):
    x, dy = arrays
    y, dx = run(x, dy, epsilon=0.0)
    np.testing.assert_allclose(run(7 * x, dy, epsilon=0.0)[0], y, rtol=1e-11)
    assert not np.allclose(run(x - 1, dy, epsilon=0.0)[0], y)  # a shift does, unlike LayerNorm's
    np.testing.assert_allclose((dx * y).sum(axis=-1), np.zeros((B, T)), atol=1e-13)


def test_zeros_stay_finite():
    y, dx = run(np.zeros((1, 1, C), np.float32), np.ones((1, 1, C), np.float32), epsilon=1e-5)
    assert (y == 0).all()
    assert np.isfinite(dx).all()
