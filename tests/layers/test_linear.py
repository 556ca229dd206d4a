import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import linear
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, inputs=sizes, outputs=sizes)
@example(B=1, T=1, inputs=1, outputs=1)
@example(B=1, T=5, inputs=3, outputs=130)
def test_gradients(assert_exact, B, T, inputs, outputs):
    assert_exact(cases.linear_case(jax.random.key(0), B, T, inputs, outputs))


def test_each_token_is_mapped_alone():
    """Output (b, t) is token (b, t) times the matrix plus the bias, whatever stands beside it."""
    rng = np.random.default_rng(0)
    weight, bias, x = (rng.normal(size=shape).astype(np.float32) for shape in [(3, 5), (5,), (2, 4, 3)])
    y, _ = jax.jit(linear.forward)(linear.Params(weight, bias), x)
    for b, t, o in np.ndindex(2, 4, 5):
        expected = sum(x[b, t, i] * weight[i, o] for i in range(3)) + bias[o]
        np.testing.assert_allclose(y[b, t, o], expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_bfloat16_are_summed_in_float32():
    """A bfloat16 sum of ones would stop growing at 256."""
    params = linear.Params(np.ones((2, 3), jnp.bfloat16), np.zeros(3, jnp.bfloat16))
    x, dy = np.ones((2, 501, 2), jnp.bfloat16), np.ones((2, 501, 3), jnp.bfloat16)
    grads, _ = jax.jit(linear.backward)(params, linear.Residuals(x), dy)
    np.testing.assert_array_equal(grads.bias, np.full(3, 1002, np.float32))
    np.testing.assert_array_equal(grads.weight, np.full((2, 3), 1002, np.float32))
