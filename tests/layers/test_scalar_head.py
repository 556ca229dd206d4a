import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.layers import scalar_head
from jaxgpt.proof import objective_cases as cases


@given(N=st.integers(2, 7), C=st.integers(1, 9), read=st.integers(0, 2))
def test_gradients(assert_exact, N, C, read):
    assert_exact(cases.scalar_head_case(jax.random.key(0), N, C, read=read))


def test_only_what_is_read_has_a_gradient(x64):
    rng = np.random.default_rng(0)
    params, x = (
        scalar_head.Params(jnp.asarray(rng.normal(size=3)), jnp.asarray(0.5)),
        jnp.asarray(rng.normal(size=(5, 3))),
    )
    y, residuals = scalar_head.forward(params, x, jnp.asarray([4, 1]))
    np.testing.assert_allclose(y, [x[4] @ params.weight + 0.5, x[1] @ params.weight + 0.5])
    _, dx = scalar_head.backward(params, residuals, jnp.asarray([2.0, -3.0]))
    np.testing.assert_allclose(dx, [0 * x[0], -3 * params.weight, 0 * x[0], 0 * x[0], 2 * params.weight])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("of_places", [True, False])
def test_dtypes(x64, dtype, of_places):
    """Numbers and the parameters' gradients are in at least float32, dx in the dtype of x."""
    params = scalar_head.Params(jnp.ones(3), jnp.zeros(()))
    places = jnp.arange(2) if of_places else None
    y, residuals = scalar_head.forward(params, jnp.ones((5, 3), dtype), places)
    grads, dx = scalar_head.backward(params, residuals, y)
    wide = jnp.promote_types(dtype, jnp.float32)
    assert {leaf.dtype for leaf in (y, *grads)} == {wide}
    assert (dx.dtype, dx.shape) == (dtype, (5, 3))


def test_standardised_scores_have_mean_0_and_deviation_1(x64):
    rng = np.random.default_rng(0)
    params, x = (
        scalar_head.Params(jnp.asarray(rng.normal(size=3)), jnp.asarray(7.0)),
        jnp.asarray(rng.normal(size=(50, 3))),
    )
    before, _ = scalar_head.forward(params, x)
    after, _ = scalar_head.forward(scalar_head.standardised(params, before.mean(), before.std()), x)
    np.testing.assert_allclose((after.mean(), after.std()), (0, 1), atol=1e-12)
    assert (np.argsort(after) == np.argsort(before)).all()
