"""Rotary positions (Su et al. 2021, arXiv:2104.09864, equation 34), with the pairs half a head apart.

Columns i and i + D/2 of a head are a pair, which the place n of its token turns by the angle n ω_i, ω_i = base^(-2i/D):

    y_i = x_i cos - x_{i+D/2} sin           y_{i+D/2} = x_{i+D/2} cos + x_i sin

So the product of a turned query and a turned key depends on how far apart they are, and not on where. Backward: a turn
is orthogonal, so the gradient is turned back, by the opposite angle:

    ∂x_i = ∂y_i cos + ∂y_{i+D/2} sin        ∂x_{i+D/2} = ∂y_{i+D/2} cos - ∂y_i sin

The paper pairs neighbours; which columns are a pair is a permutation of the weights before. Llama's weights, as Hugging
Face has them, are for halves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.layers.numerics import accumulation_dtype


@jax.named_scope("rotary.forward")
def forward(
    x: Float[Array, "B T H D"], places: Int[Array, "#B T"], *, base: float = 10_000.0
) -> Float[Array, "B T H D"]:
    """Computes in the accumulation dtype; the output has the dtype of x. Nothing is kept for backward. D is even."""
    cos, sin = _turns(x, places, base)
    first, second = _halves(x)
    y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return y.astype(x.dtype)


@jax.named_scope("rotary.backward")
def backward(
    dy: Float[Array, "B T H D"], places: Int[Array, "#B T"], *, base: float = 10_000.0
) -> Float[Array, "B T H D"]:
    """The gradient by x, in the dtype of dy. `places` and `base` are forward's."""
    cos, sin = _turns(dy, places, base)
    first, second = _halves(dy)
    dx = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return dx.astype(dy.dtype)


def _turns(
    x: Float[Array, "B T H D"], places: Int[Array, "b T"], base: float
) -> tuple[Float[Array, "b T 1 half"], Float[Array, "b T 1 half"]]:
    """The cosines and sines of each place's angles, the same for all heads."""
    dtype, half = accumulation_dtype(x.dtype), x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=dtype) / half)
    angles = places[:, :, None, None].astype(dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _halves(x: Float[Array, "B T H D"]) -> tuple[Float[Array, "B T H half"], Float[Array, "B T H half"]]:
    first, second = jnp.split(x.astype(accumulation_dtype(x.dtype)), 2, axis=-1)
    return first, second
