import jax.numpy as jnp
import pytest

from jaxgpt.layers.numerics import accumulation_dtype, product


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_accumulation_dtype(x64, dtype, expected):
    assert accumulation_dtype(jnp.dtype(dtype)) == expected


def test_a_product_of_bfloat16_is_summed_in_float32():
    """A bfloat16 sum of ones would stop growing at 256, and 1001 is no bfloat16."""
    ones = jnp.ones((1, 1001), jnp.bfloat16)
    result = product("ik,jk->ij", ones, ones)
    assert result.dtype == jnp.float32
    assert result[0, 0] == 1001
