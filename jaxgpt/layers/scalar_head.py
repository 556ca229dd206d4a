"""Scalar head: one number for a token, a reward model's score or a value model's value.

    y_i = x_i · w + b

Backward, i running over the tokens that are read:

    ∂x_i = ∂y_i w           ∂w = Σ_i ∂y_i x_i           ∂b = Σ_i ∂y_i

A value is read at every token. A reward is read at one token of each sequence, its last, which alone has seen all of
it: `places` says which tokens these are, and all others have the gradient 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.layers.numerics import accumulation_dtype, product


class Params(NamedTuple):
    weight: Float[Array, "C"]
    bias: Float[Array, ""]


class Residuals(NamedTuple):
    x: Float[Array, "N C"]
    places: Int[Array, " S"] | None  # of the tokens that were read; None: all


@jax.named_scope("scalar_head.forward")
def forward(
    params: Params, x: Float[Array, "N C"], places: Int[Array, " S"] | None = None
) -> tuple[Float[Array, " S"], Residuals]:
    """The number of each token of `places`, or of all, in the accumulation dtype: it goes into a loss, not a layer."""
    wide = accumulation_dtype(x.dtype)
    read = (x if places is None else x[places]).astype(wide)
    return product("sc,c->s", read, params.weight.astype(wide)) + params.bias.astype(wide), Residuals(x, places)


@jax.named_scope("scalar_head.backward")
def backward(params: Params, residuals: Residuals, dy: Float[Array, " S"]) -> tuple[Params, Float[Array, "N C"]]:
    """Gradients of the parameters in the accumulation dtype, dx in the dtype of x."""
    x, places = residuals
    read = (x if places is None else x[places]).astype(dy.dtype)
    dread = (dy[:, None] * params.weight).astype(x.dtype)
    dx = dread if places is None else jnp.zeros_like(x).at[places].add(dread)
    return Params(product("s,sc->c", dy, read), jnp.sum(dy)), dx


def standardised(params: Params, mean: Float[Array, ""] | float, deviation: Float[Array, ""] | float) -> Params:
    """The head whose scores have mean 0 and deviation 1 where this one's have `mean` and `deviation`.

    (x·w + b - mean) / deviation is a head too. A difference of two scores, which is all that comparisons teach, leaves
    the mean open; reinforcement needs it fixed (Ziegler et al. 2019, arXiv:1909.08593, section 2.1).
    """
    return Params(params.weight / deviation, (params.bias - mean) / deviation)
