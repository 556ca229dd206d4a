"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    x̂ = x / σ        y = γ x̂        σ² = mean of x² over its last axis, + ε

Backward, writing g = γ ∂y, with means over the last axis:

    ∂x = (g - x̂ mean(g x̂)) / σ           ∂γ = Σ ∂y x̂

The mean is what the normalisation takes away: x̂ does not follow a change of x's scale, so the gradient has no component
along x̂.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype


class Params(NamedTuple):
    scale: Float[Array, "C"]


class Residuals(NamedTuple):
    x: Float[Array, "*batch C"]
    rstd: Float[Array, "*batch 1"]  # 1/σ


@jax.named_scope("rmsnorm.forward")
def forward(
    params: Params, x: Float[Array, "*batch C"], *, epsilon: float = 1e-5
) -> tuple[Float[Array, "*batch C"], Residuals]:
    """The mean is taken in the accumulation dtype; the output has the dtype of x."""
    wide = x.astype(accumulation_dtype(x.dtype))
    residuals = Residuals(x, lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon))
    return output(params, residuals), residuals


def output(params: Params, residuals: Residuals) -> Float[Array, "*batch C"]:
    """Forward's output from its residuals, for a model that would rather compute it again than keep it."""
    normalised = residuals.x.astype(residuals.rstd.dtype) * residuals.rstd
    return (normalised * params.scale).astype(residuals.x.dtype)


@jax.named_scope("rmsnorm.backward")
def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch C"]
) -> tuple[Params, Float[Array, "*batch C"]]:
    """The gradient of the scale in the accumulation dtype, dx in the dtype of dy."""
    dtype = accumulation_dtype(dy.dtype)
    dy_wide = dy.astype(dtype)
    normalised = residuals.x.astype(dtype) * residuals.rstd
    g = dy_wide * params.scale
    dx = (g - normalised * jnp.mean(g * normalised, axis=-1, keepdims=True)) * residuals.rstd
    dscale = jnp.sum(dy_wide * normalised, axis=tuple(range(dy.ndim - 1)))
    return Params(dscale), dx.astype(dy.dtype)
