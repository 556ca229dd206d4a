"""Linear layer.

    y = x w + b

Backward (N runs over all tokens of the batch):

    ∂x = ∂y wᵀ           ∂w = Σ_N xᵀ ∂y           ∂b = Σ_N ∂y

The bias may be left away (None), and then so is its gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype, product


class Params(NamedTuple):
    weight: Float[Array, "in out"]
    bias: Float[Array, "out"] | None = None


class Residuals(NamedTuple):
    x: Float[Array, "*batch in"]


@jax.named_scope("linear.forward")
def forward(params: Params, x: Float[Array, "*batch in"]) -> tuple[Float[Array, "*batch out"], Residuals]:
    """Multiplies and adds the bias in the accumulation dtype; the output has the dtype of x."""
    y = product("...c,cf->...f", x, params.weight)
    if params.bias is not None:
        y = y + params.bias
    return y.astype(x.dtype), Residuals(x)


@jax.named_scope("linear.backward")
def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"]
) -> tuple[Params, Float[Array, "*batch in"]]:
    """Gradients of the parameters in the accumulation dtype, dx in the dtype of dy."""
    dx = product("...f,cf->...c", dy, params.weight).astype(dy.dtype)
    x, dy = residuals.x.reshape(-1, residuals.x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dweight = product("nc,nf->cf", x, dy)
    dbias = None if params.bias is None else jnp.sum(dy, axis=0, dtype=accumulation_dtype(dy.dtype))
    return Params(dweight, dbias), dx
