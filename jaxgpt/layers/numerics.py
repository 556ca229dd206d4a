"""The dtype in which sums are taken, for every layer, and the order in which things are computed again."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for sums over values of `dtype`: at least float32, and float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` of two arrays, summed and returned in their accumulation dtype.

    A CPU with bfloat16 products is fast at them only when their result is asked for in float32. Without them XLA widens
    the numbers inside of the product, and takes half as long again as where they are widened before.
    """
    wide = accumulation_dtype(a.dtype)

    def direct(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=wide)

    if a.dtype != jnp.bfloat16 or _cpu_multiplies_bfloat16():
        return direct(a, b)
    return lax.platform_dependent(a, b, cpu=lambda a, b: direct(a.astype(wide), b.astype(wide)), default=direct)


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Returns whether this machine's CPU says so; where it says nothing (not on Linux), it is taken not to."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def sum_over_last(x: Float[Array, "N M"]) -> Float[Array, "N 1"]:
    """The sums of the rows of something that has just been computed.

    On a CPU the compiler would compute it inside of the summing loop, one number at a time: exp over a vocabulary takes
    twice as long that way. A product with ones has it computed first, many numbers at a time.
    """

    def by_product(x: Array) -> Array:
        return jnp.einsum("nm,m->n", x, jnp.ones(x.shape[-1], x.dtype))[:, None]

    return lax.platform_dependent(x, cpu=by_product, default=lambda x: jnp.sum(x, axis=-1, keepdims=True))


def not_before(gradient: Float[Array, "..."], residuals: Any) -> Any:
    """The residuals, from which something is to be computed again once the backward pass has come to `gradient`.

    Left alone, the compiler finds out that it had the result in the forward pass (it drops `lax.optimization_barrier`
    before its last search for equal operations) and keeps the memory that computing it again is to free. So a zero is
    added that only the gradient gives: NaN if that is not finite, and then so is the whole gradient in any case.
    """
    zero = 0 * gradient[(0,) * gradient.ndim]
    return jax.tree.map(lambda residual: residual + zero.astype(residual.dtype), residuals)
