"""Unembedding fused with the softmax cross-entropy, a chunk of tokens at a time.

    z = x Wᵀ           loss = scale Σ_N cross_entropy(z, target)

Backward, with ∂z from `cross_entropy` at ∂loss = scale:

    ∂x = ∂z W           ∂W = Σ_N ∂zᵀ x

The logits of a whole batch are the largest array of a small model (N·Vp numbers), so only a chunk of them ever exists.
Because the loss is one number, its gradients are known up to a factor as soon as the logits are: forward computes them
while the chunk's logits are there, keeps them as its residuals, and backward multiplies by ∂loss. A caller that wants
the loss alone drops the residuals, and the compiler drops the products that would have made them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers import cross_entropy
from jaxgpt.layers.numerics import accumulation_dtype, product


class Params(NamedTuple):
    weight: Float[Array, "Vp C"]


class Residuals(NamedTuple):
    dx: Float[Array, "*batch C"]  # for ∂loss = 1
    dweight: Float[Array, "Vp C"]  # for ∂loss = 1


def logits(params: Params, x: Float[Array, "N C"]) -> Float[Array, "N Vp"]:
    """All logits of these tokens, in the accumulation dtype."""
    return product("nc,vc->nv", x, params.weight)


@jax.named_scope("unembedding.forward")
def forward(
    params: Params,
    x: Float[Array, "*batch C"],
    targets: Int[Array, "*batch"],
    scale: Float[Array, ""] | float = 1.0,
    *,
    vocabulary_size: int,
    chunk: int,
) -> tuple[Float[Array, ""], Residuals]:
    """`scale` times the sum of the tokens' losses; scale = 1/N makes it their mean.

    `chunk` is the number of tokens whose logits exist at once; the last chunk is filled up with ignored targets.
    """
    dtype = accumulation_dtype(x.dtype)
    scale = jnp.asarray(scale, dtype)
    tokens, width = targets.size, x.shape[-1]
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    x_chunks = jnp.pad(x.reshape(tokens, width), ((0, padding), (0, 0))).reshape(-1, chunk, width)
    target_chunks = jnp.pad(targets.reshape(tokens), (0, padding), constant_values=cross_entropy.IGNORED).reshape(
        -1, chunk
    )

    def one_chunk(carry, inputs):
        loss, dweight = carry
        x, targets = inputs
        losses, residuals = cross_entropy.forward(logits(params, x), targets, vocabulary_size=vocabulary_size)
        dlosses = jnp.full(chunk, scale)
        dlogits = cross_entropy.backward(residuals, dlosses, vocabulary_size=vocabulary_size).astype(x.dtype)
        dx = product("nv,vc->nc", dlogits, params.weight).astype(x.dtype)
        dweight = dweight + product("nv,nc->vc", dlogits, x)
        return (loss + scale * jnp.sum(losses), dweight), dx

    start = (jnp.zeros((), dtype), jnp.zeros(params.weight.shape, dtype))
    (loss, dweight), dx = lax.scan(one_chunk, start, (x_chunks, target_chunks))
    return loss, Residuals(dx.reshape(-1, width)[:tokens].reshape(x.shape), dweight)


@jax.named_scope("unembedding.backward")
def backward(residuals: Residuals, dloss: Float[Array, ""] | float = 1.0) -> tuple[Params, Float[Array, "*batch C"]]:
    """The gradient of the weight in the accumulation dtype, dx in the dtype of x."""
    dx = (residuals.dx * dloss).astype(residuals.dx.dtype)
    return Params(residuals.dweight * dloss), dx
