"""Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4).

    x̂ = (x - μ) / σ        y = γ x̂ + β            μ, σ² = mean, variance + ε of x over its last axis

Backward, writing g = γ ∂y, with means over the last axis:

    ∂x = (g - mean(g) - x̂ mean(g x̂)) / σ           ∂γ = Σ ∂y x̂           ∂β = Σ ∂y

The two means are what the normalisation takes away: x̂ neither follows a shift of x nor a change of its scale, so the
gradient has no component along the constant vector nor along x̂.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype


class Params(NamedTuple):
    scale: Float[Array, "C"]
    bias: Float[Array, "C"]


class Residuals(NamedTuple):
    x: Float[Array, "*batch C"]
    mean: Float[Array, "*batch 1"]
    rstd: Float[Array, "*batch 1"]  # 1/σ


@jax.named_scope("layernorm.forward")
def forward(
    params: Params, x: Float[Array, "*batch C"], *, epsilon: float = 1e-5
) -> tuple[Float[Array, "*batch C"], Residuals]:
    """Statistics in the accumulation dtype; the output has the dtype of x."""
    wide = x.astype(accumulation_dtype(x.dtype))
    mean, variance = lax.platform_dependent(wide, cpu=_in_two_passes, default=_in_one_pass)
    rstd = lax.rsqrt(variance + epsilon)
    residuals = Residuals(x, mean, rstd)
    return output(params, residuals), residuals


def output(params: Params, residuals: Residuals) -> Float[Array, "*batch C"]:
    """Forward's output from its residuals, for a model that would rather compute it again than keep it."""
    normalised = (residuals.x.astype(residuals.mean.dtype) - residuals.mean) * residuals.rstd
    return (normalised * params.scale + params.bias).astype(residuals.x.dtype)


@jax.named_scope("layernorm.backward")
def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch C"]
) -> tuple[Params, Float[Array, "*batch C"]]:
    """Gradients of the parameters in the accumulation dtype, dx in the dtype of dy."""
    dtype = accumulation_dtype(dy.dtype)
    dy_wide = dy.astype(dtype)
    normalised = (residuals.x.astype(dtype) - residuals.mean) * residuals.rstd
    g = dy_wide * params.scale
    mean_g = jnp.mean(g, axis=-1, keepdims=True)
    mean_gx = jnp.mean(g * normalised, axis=-1, keepdims=True)
    dx = (g - mean_g - normalised * mean_gx) * residuals.rstd
    tokens = tuple(range(dy.ndim - 1))
    dscale = jnp.sum(dy_wide * normalised, axis=tokens)
    dbias = jnp.sum(dy_wide, axis=tokens)
    return Params(dscale, dbias), dx.astype(dy.dtype)


def _in_two_passes(x: Float[Array, "*batch C"]) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Returns mean and variance."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)


def _in_one_pass(x: Float[Array, "*batch C"]) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Returns mean and variance by sums that one reading of x gives: var = mean(x²) - mean(x)².

    It has as many digits fewer as mean² is larger than the variance; in a residual stream it is the smaller one.
    """
    mean, squares = (jnp.mean(part, axis=-1, keepdims=True) for part in (x, jnp.square(x)))
    return mean, jnp.maximum(squares - jnp.square(mean), 0)
