import jax
import jax.numpy as jnp
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import residual
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, C=sizes)
@example(B=1, T=1, C=1)
def test_gradients(assert_exact, B, T, C):
    assert_exact(cases.residual_case(jax.random.key(0), B, T, C))


def test_the_gradient_reaches_both_terms_whole():
    dy = jnp.arange(6.0).reshape(1, 2, 3)
    dx, dbranch = residual.backward(dy)
    assert (dx == dy).all()
    assert (dbranch == dy).all()
