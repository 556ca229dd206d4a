"""Token and position embedding (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    y[b, t] = token[tokens[b, t]] + position[t]

Backward: a row's gradient is the sum over the places that read it,

    ∂token[v] = Σ_{b,t: tokens[b,t] = v} ∂y[b, t]           ∂position[t] = Σ_b ∂y[b, t]

With `starts`, the place where each token's document begins, a token's position is counted from there. Without a table
of positions (None) y is the tokens' rows alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.layers.numerics import accumulation_dtype


class Params(NamedTuple):
    token: Float[Array, "Vp C"]
    position: Float[Array, "context C"] | None = None


class Residuals(NamedTuple):
    tokens: Int[Array, "B T"]
    places: Int[Array, "B T"] | None = None  # in each token's document; None where they are 0 ... T-1


@jax.named_scope("embedding.forward")
def forward(
    params: Params, tokens: Int[Array, "B T"], *, starts: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T C"], Residuals]:
    """T is at most the number of position rows; tokens are in [0, Vp)."""
    if params.position is None:
        return params.token[tokens], Residuals(tokens)
    places = None if starts is None else jnp.arange(tokens.shape[1]) - starts
    position = params.position[: tokens.shape[1]] if places is None else params.position[places]
    return params.token[tokens] + position, Residuals(tokens, places)


@jax.named_scope("embedding.backward")
def backward(
    params: Params,
    residuals: Residuals,
    dy: Float[Array, "B T C"],
    *,
    token_gradient: Float[Array, "Vp C"] | None = None,
) -> Params:
    """Gradients in the accumulation dtype. There is no dx: tokens are integers.

    `token_gradient` is what the token table has already received elsewhere, from an unembedding tied to it: this
    layer's part is added to it in place of a second table of the same size.
    """
    dtype = accumulation_dtype(dy.dtype)
    dy = dy.astype(dtype)
    if token_gradient is None:
        token_gradient = jnp.zeros(params.token.shape, dtype)
    dtoken = token_gradient.at[residuals.tokens].add(dy)
    dposition = None if params.position is None else jnp.zeros(params.position.shape, dtype)
    if dposition is not None and residuals.places is None:
        dposition = dposition.at[: dy.shape[1]].set(jnp.sum(dy, axis=0))
    elif dposition is not None:
        dposition = dposition.at[residuals.places].add(dy)
    return Params(dtoken, dposition)
