import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import swiglu
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, F=st.integers(1, 40))
@example(B=1, T=1, F=1)
def test_gradients(assert_exact, B, T, F):
    assert_exact(cases.swiglu_case(jax.random.key(0), B, T, F))


def test_against_numpy(x64):
    gate, up = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    y, _ = jax.jit(swiglu.forward)(jnp.asarray(gate), jnp.asarray(up))
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-14)


def test_far_from_zero_the_gate_is_open_or_closed():
    gate = jnp.array([-200.0, 200.0], jnp.float32)
    y, residuals = swiglu.forward(gate, jnp.full(2, 3, jnp.float32))
    np.testing.assert_array_equal(y, [0, 600])
    dgate, dup = swiglu.backward(residuals, jnp.ones(2, jnp.float32))
    np.testing.assert_array_equal(dgate, [0, 3])
    np.testing.assert_array_equal(dup, [0, 200])
