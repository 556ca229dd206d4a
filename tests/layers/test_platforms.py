"""The forms that a GPU's program takes, run on a CPU: the same functions as a CPU's forms, and the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgpt.layers import cross_entropy, gelu, layernorm, linear
from jaxgpt.layers.numerics import GROUPS, not_before, product, product_over_tokens
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import objective_cases
from tests.nightly import nightly


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Takes the branch of every other platform than a CPU."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *operands, default, **_: default(*operands))


def normal(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "recompute",
    ["none", *(pytest.param(level, marks=pytest.mark.slow) for level in ("gelu", "norms", "projection")), "block"],
)
@pytest.mark.parametrize("family", nightly(["gpt2", "llama", "mixtral"], every_time=["llama"]))
def test_a_models_gradients(assert_exact, as_on_a_gpu, family, recompute):
    model = Model(layers=2, heads=2, width=8, context=6, vocabulary_size=130, family=family, experts=3)
    compute = Compute(recompute=recompute, classifier_chunk=5, attention_block=4)
    assert_exact(objective_cases.model_case(jax.random.key(0), 2, 6, model, compute))


def test_more_rows_than_few_are_multiplied_in_parts(as_on_a_gpu):
    """Each part is a product of its own; one whole product, which few rows take, gives the same columns."""
    params = linear.Params(normal(5, 12), normal(12, seed=1))
    x = normal(linear.FEW, 5, seed=2)
    parts, residuals = linear.forward_in_parts(params, x, 3)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=-1), linear.forward(params, x)[0], rtol=1e-5, atol=1e-5)
    assert residuals.x is x
    program = str(jax.make_jaxpr(lambda x: linear.forward_in_parts(params, x, 3)[0])(x))
    few = str(jax.make_jaxpr(lambda x: linear.forward_in_parts(params, x, 3)[0])(x[:4]))
    assert (program.count("dot_general"), few.count("dot_general")) == (3, 1)


@pytest.mark.parametrize("shift", [0.0, 60.0, -80.0])
def test_logsumexp_in_one_pass(shift):
    z = 3 * normal(7, 50) + shift
    z = z.at[:, 40:].set(-jnp.inf).at[2, 1:].set(-jnp.inf).at[3, 5].set(3e38)
    expected = cross_entropy._logsumexp_in_two_passes(z)
    np.testing.assert_allclose(cross_entropy._logsumexp_in_one_pass(z), expected, rtol=2e-6)


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_statistics_in_one_pass(mean):
    """A mean of m deviations costs the variance m² in its error, 2⁻²⁴ at the least."""
    x = normal(5, 768) + mean
    for one, two in zip(layernorm._in_one_pass(x), layernorm._in_two_passes(x), strict=True):
        np.testing.assert_allclose(one, two, rtol=8 * 2**-24 * (1 + mean**2), atol=1e-6)


def test_a_constant_row_has_no_variance_below_zero():
    _, variance = layernorm._in_one_pass(jnp.full((3, 77), 1.1))
    assert (variance >= 0).all()


def test_gelu_within_the_rounding_of_its_input(as_on_a_gpu):
    """A GPU's y is computed in bfloat16 where it is no part of a product, in some operations of 2⁻⁸ each."""
    x = normal(3, 400, dtype="bfloat16") * 3
    exact = gelu.forward(x.astype(jnp.float32))[0]
    np.testing.assert_allclose(gelu.forward(x)[0].astype(jnp.float32), exact, rtol=4 * 2**-8, atol=4 * 2**-8)


def test_a_product_writes_what_is_wanted(as_on_a_gpu):
    a, b, bias = normal(4, 9, dtype="bfloat16"), normal(9, 6, dtype="bfloat16", seed=1), normal(6)
    exact = a.astype(jnp.float32) @ b.astype(jnp.float32) + bias
    y = product("ik,kj->ij", a, b, dtype=jnp.bfloat16, bias=bias)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=3 * 2**-8, atol=3 * 2**-8)


@pytest.mark.parametrize("tokens", [8 * GROUPS, 8 * GROUPS + 1])
@pytest.mark.parametrize("multiplies", [True, False])
def test_a_product_over_tokens(monkeypatch, tokens, multiplies):
    """In groups or not, on any processor, it is the sum over all tokens in float32."""
    monkeypatch.setattr("jaxgpt.layers.numerics._cpu_multiplies_bfloat16", lambda: multiplies)
    a, b = normal(tokens, 5, dtype="bfloat16"), normal(tokens, 7, dtype="bfloat16", seed=1)
    y = product_over_tokens("nc,nf->cf", a, b)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, a.astype(jnp.float32).T @ b.astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_a_gpu_takes_a_blocks_zero_and_a_cpu_each_its_own(as_on_a_gpu):
    nan, one = jnp.full((2, 2), jnp.nan), jnp.ones((2, 2))
    assert not jnp.isnan(not_before(nan, one, earlier=one)).any()
    assert jnp.isnan(not_before(one, one, earlier=nan)).all()


def test_on_a_cpu_the_later_gradient_counts():
    nan, one = jnp.full((2, 2), jnp.nan), jnp.ones((2, 2))
    assert jnp.isnan(not_before(nan, one, earlier=one)).all()
    assert not jnp.isnan(not_before(one, one, earlier=nan)).any()
