import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.layers import soft_cap
from jaxgpt.proof import cases


@given(N=st.integers(1, 4), V=st.integers(1, 9))
def test_gradients(assert_exact, N, V):
    assert_exact(cases.soft_cap_case(jax.random.key(0), N, V))


def test_it_keeps_small_numbers_and_bounds_large_ones(x64):
    x = np.array([-1e6, -3.0, -1e-4, 0.0, 1e-4, 2.0, 1e6])
    y = np.asarray(soft_cap.forward(jnp.asarray(x), cap=30.0))
    np.testing.assert_allclose(y, 30 * np.tanh(x / 30), rtol=1e-14)
    np.testing.assert_allclose(y[2:5], x[2:5], rtol=1e-10)
    assert np.abs(y).max() <= 30
    assert (np.diff(y) > 0).all()


def test_a_number_far_beyond_the_cap_sends_nothing_back(x64):
    y = soft_cap.forward(jnp.array([1e6, -1e6]), cap=2.0)
    np.testing.assert_array_equal(soft_cap.backward(y, jnp.ones(2), cap=2.0), [0, 0])
