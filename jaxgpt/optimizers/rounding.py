"""Stochastic rounding to bfloat16 (Gupta et al. 2015, arXiv:1502.02551, section 2.1).

    x  ↦  the bfloat16 next below or next above x in magnitude, the nearer one the likelier, so that the mean is x

A float32 is a bfloat16 and 16 more bits. A uniform number of 16 bits is added to those, a carry moves the bfloat16 up,
and the 16 bits are dropped. An update much smaller than a parameter's last bit then still counts, one time in many,
where rounding to nearest would lose it every time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Key

from jaxgpt.layers import random


def stochastic(x: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """Rounds at random to bfloat16. NaN, infinities and what is a bfloat16 already stay what they are."""
    noise = random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def kept(
    new: Float[Array, "..."], dtype: DTypeLike, key: Key[Array, ""] | None, step: ArrayLike, place: ArrayLike
) -> Float[Array, "..."]:
    """Returns a parameter's new value as it is kept: itself, or of a bfloat16 parameter rounded at random.

    `place` is the parameter's number among all, so that each is rounded by numbers of its own.
    """
    if dtype != jnp.bfloat16:
        return new
    assert key is not None
    return stochastic(new, jax.random.fold_in(jax.random.fold_in(key, step), place))
