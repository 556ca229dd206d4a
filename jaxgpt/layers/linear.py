"""Linear layer.

    y = x w + b

Backward (N runs over all tokens of the batch):

    ∂x = ∂y wᵀ           ∂w = Σ_N xᵀ ∂y           ∂b = Σ_N ∂y
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype, product


class Params(NamedTuple):
    weight: Float[Array, "in out"]
    bias: Float[Array, "out"]


class Residuals(NamedTuple):
    x: Float[Array, "B T in"]


def forward(params: Params, x: Float[Array, "B T in"]) -> tuple[Float[Array, "B T out"], Residuals]:
    """Multiplies and adds the bias in the accumulation dtype; the output has the dtype of x."""
    y = product("btc,cf->btf", x, params.weight) + params.bias
    return y.astype(x.dtype), Residuals(x)


def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "B T out"]
) -> tuple[Params, Float[Array, "B T in"]]:
    """Gradients of the parameters in the accumulation dtype, dx in the dtype of dy."""
    dx = product("btf,cf->btc", dy, params.weight).astype(dy.dtype)
    dweight = product("btc,btf->cf", residuals.x, dy)
    dbias = jnp.sum(dy, axis=(0, 1), dtype=accumulation_dtype(dy.dtype))
    return Params(dweight, dbias), dx
