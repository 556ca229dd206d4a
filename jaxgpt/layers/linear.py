"""Linear layer.

    y = x w + b

Backward (N runs over all tokens of the batch):

    ∂x = ∂y wᵀ           ∂w = Σ_N xᵀ ∂y           ∂b = Σ_N ∂y

The bias may be left away (None), and then so is its gradient.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype, product, product_over_tokens

FEW = 256  # rows, below which reading the weight is most of a product's time, and cutting it in parts would double that


class Params(NamedTuple):
    weight: Float[Array, "in out"]
    bias: Float[Array, "out"] | None = None


class Residuals(NamedTuple):
    x: Float[Array, "*batch in"]


@jax.named_scope("linear.forward")
def forward(params: Params, x: Float[Array, "*batch in"]) -> tuple[Float[Array, "*batch out"], Residuals]:
    """Multiplies and adds the bias in the accumulation dtype; the output has the dtype of x."""
    return product("...c,cf->...f", x, params.weight, dtype=x.dtype, bias=params.bias), Residuals(x)


@jax.named_scope("linear.forward")
def forward_in_parts(
    params: Params, x: Float[Array, "*batch in"], parts: int | Sequence[int]
) -> tuple[list[Float[Array, "*batch part"]], Residuals]:
    """Like `forward`, with the output's columns in parts, as arrays of their own.

    `parts` is the number of equal parts, or the columns with which all parts but the first begin. A GPU has a product
    for each part, which so is not copied out of a larger one.
    """

    def by_one_product(params: Params, x: Array) -> list[Array]:
        return jnp.split(forward(params, x)[0], parts, axis=-1)

    def by_products(params: Params, x: Array) -> list[Array]:
        columns = zip(*(jnp.split(leaf, parts, axis=-1) for leaf in jax.tree.leaves(params)), strict=True)
        return [forward(Params(*part), x)[0] for part in columns]

    if math.prod(x.shape[:-1]) < FEW:
        return by_one_product(params, x), Residuals(x)
    return lax.platform_dependent(params, x, cpu=by_one_product, default=by_products), Residuals(x)


@jax.named_scope("linear.backward")
def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"]
) -> tuple[Params, Float[Array, "*batch in"]]:
    """Gradients of the parameters in the accumulation dtype, dx in the dtype of dy."""
    dx = product("...f,cf->...c", dy, params.weight, dtype=dy.dtype)
    x, dy = residuals.x.reshape(-1, residuals.x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dweight = product_over_tokens("nc,nf->cf", x, dy)
    dbias = None if params.bias is None else jnp.sum(dy, axis=0, dtype=accumulation_dtype(dy.dtype))
    return Params(dweight, dbias), dx
