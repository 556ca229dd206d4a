import functools

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.layers import layernorm
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import cases as proof_cases
from jaxgpt.proof import gradcheck

MODEL = Model(layers=2, heads=2, width=8, context=5, vocabulary_size=11)
COMPUTE = Compute()


@functools.cache
def rows(dtype):
    cases = proof_cases.cases(MODEL, COMPUTE, 2, 5, jax.random.key(0))
    return [row for case in cases for row in gradcheck.check(case, dtype)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_in_the_dtypes_of_training(x64, dtype):
    """The figures are real: rounding leaves none of the whole model's at 0."""
    assert [row for row in rows(dtype) if not row.passed] == []
    assert all(row.error > 0 for row in rows(dtype) if row.tensor.startswith("gpt2"))


@pytest.mark.slow
def test_every_tensor_has_a_row_of_its_own(x64):
    names = {row.tensor for row in rows("bfloat16")}
    assert len(names) == len(rows("bfloat16"))
    assert {"embedding.token", "linear.params.weight", "layernorm.x", "attention.k", "unembedding.x"} <= names
    assert {"gpt2.embedding.position", "gpt2.blocks.attention_norm.scale", "gpt2.final_norm.bias"} <= names


def test_a_wrong_gradient_is_seen_in_its_own_row_only(x64):
    case = proof_cases.linear_case(jax.random.key(0), 2, 3, 4, 5)

    def backward(inputs, dy):
        grads = case.backward(inputs, dy)
        return grads | {"params": grads["params"]._replace(bias=1.001 * grads["params"].bias)}

    rows = gradcheck.check(case._replace(backward=backward), "float64")
    (failed,) = [row for row in rows if not row.passed]
    assert failed.tensor == "linear.params.bias"
    assert failed.error == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("planted", [jnp.nan, jnp.inf])
def test_what_is_not_a_number_fails(x64, monkeypatch, planted):
    right = layernorm.backward

    def backward(params, residuals, dy):
        grads, dx = right(params, residuals, dy)
        return grads, dx.at[0, 0, 0].set(planted)

    monkeypatch.setattr(layernorm, "backward", backward)
    rows = gradcheck.check(proof_cases.layernorm_case(jax.random.key(0), 1, 2, 3), "float64")
    assert [row.tensor for row in rows if not row.passed] == ["layernorm.x"]


def test_tolerances():
    """1e-10 in float64; in the others of the order of the dtype's eps, and growing with the depth as its root."""
    assert gradcheck.tolerance("float64", 1) == gradcheck.tolerance("float64", 50) == 1e-10
    for dtype in ("float32", "bfloat16"):
        limit, eps = gradcheck.tolerance(dtype, 1), float(jnp.finfo(dtype).eps)
        assert eps < limit < 50 * eps
        assert gradcheck.tolerance(dtype, 9) == pytest.approx(3 * limit)


def test_a_gradient_of_zero_must_be_zero(x64):
    """The gradient is 0 because nothing depends on the input: 0 passes, and anything else is measured as it is."""
    case = gradcheck.Case("zero", jnp.ones(3), lambda x: 0 * x, lambda x, dy: 0 * dy)
    (row,) = gradcheck.check(case, "float64")
    assert row.tensor == "zero"
    assert row.error == 0
    (row,) = gradcheck.check(case._replace(backward=lambda x, dy: 0 * dy + 1e-9), "float64")
    assert not row.passed
