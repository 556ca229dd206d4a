"""The dtype in which sums are taken, for every layer."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for sums over values of `dtype`: at least float32, and float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` of two arrays, summed and returned in their accumulation dtype.

    On a CPU a bfloat16 product is fast only when its result is asked for in float32.
    """
    return jnp.einsum(equation, a, b, preferred_element_type=accumulation_dtype(a.dtype))
