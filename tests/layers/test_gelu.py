import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import gelu
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, F=sizes)
@example(B=1, T=1, F=1)
@example(B=2, T=3, F=129)
def test_gradients(assert_exact, B, T, F):
    assert_exact(cases.gelu_case(jax.random.key(0), B, T, F))


@jax.jit
def _value_and_derivative(x):
    y, residuals = gelu.forward(x)
    return y, gelu.backward(residuals, jnp.ones_like(x))


def value_and_derivative(x):
    """Returns both as NumPy arrays in float32."""
    return [np.asarray(array)[0, 0] for array in _value_and_derivative(np.array([[x]], np.float32))]


def test_close_to_the_exact_gelu():
    """x Φ(x) with the normal distribution's Φ, and its derivative Φ(x) + x φ(x).

    The tanh form is an approximation of it; its largest errors, found once in float64, are 4.8e-4 and 8.7e-4.
    """
    x = np.linspace(-8, 8, 1601)
    y, derivative = value_and_derivative(x)
    cumulative = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    assert np.abs(y - x * cumulative).max() < 5e-4
    assert np.abs(derivative - (cumulative + x * density)).max() < 9e-4


def test_odd_part_is_half_of_x():
    """gelu(x) - gelu(-x) = x, and so the derivatives at x and -x add up to 1."""
    x = np.linspace(0, 6, 61)
    y, derivative = value_and_derivative(x)
    mirrored, mirrored_derivative = value_and_derivative(-x)
    np.testing.assert_allclose(y - mirrored, x, atol=1e-6)
    np.testing.assert_allclose(derivative + mirrored_derivative, np.ones(61), atol=2e-6)


def test_far_from_zero():
    """x where x is large, 0 where -x is; nothing overflows."""
    y, derivative = value_and_derivative([1e4, -1e4])
    assert y.tolist() == [1e4, 0]
    assert derivative.tolist() == [1, 0]
