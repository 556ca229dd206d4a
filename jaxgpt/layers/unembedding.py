"""Unembedding and softmax fused with what is minimised, a chunk of tokens at a time.

    z = x Wᵀ           ℓ = log softmax(z)[target]           loss = Σ_chunks objective(ℓ)

Whatever is minimised depends on the model only through ℓ, the log-probability of each token's target. So the caller
hands over a function that makes of a chunk's ℓ its part of the loss, and ∂loss/∂ℓ. Backward, by `cross_entropy` (whose
loss is -ℓ):

    ∂z = -∂ℓ (softmax(z) - onehot(target))           ∂x = ∂z W           ∂W = Σ_N ∂zᵀ x

The logits of a whole batch are the largest array of a small model (N·Vp numbers), so only a chunk of them ever exists.
Because the loss is one number, its gradients are known up to a factor as soon as the logits are: forward computes them
while the chunk's logits are there, keeps them as its residuals, and backward multiplies by ∂loss. A caller that wants
the loss alone drops the residuals, and the compiler drops the products that would have made them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxgpt.layers import cross_entropy, soft_cap
from jaxgpt.layers.numerics import accumulation_dtype, product, product_over_tokens

# From the log-probabilities of a chunk's targets, and what the caller gave for each of its tokens, to the chunk's part
# of the loss and the loss's gradient by each log-probability.
Objective = Callable[..., tuple[Array, Array]]


class Params(NamedTuple):
    weight: Float[Array, "Vp C"]


class Residuals(NamedTuple):
    dx: Float[Array, "*batch C"]  # for ∂loss = 1
    dweight: Float[Array, "Vp C"]  # for ∂loss = 1


def logits(params: Params, x: Float[Array, "N C"], *, cap: float = 0.0) -> Float[Array, "N Vp"]:
    """All logits of these tokens, in the accumulation dtype; kept between -cap and cap, but for a cap of 0."""
    found = product("nc,vc->nv", x, params.weight)
    return soft_cap.forward(found, cap=cap) if cap else found


@jax.named_scope("unembedding.forward")
def forward(
    params: Params,
    x: Float[Array, "*batch C"],
    targets: Int[Array, "*batch"],
    objective: Objective,
    *per_token: Shaped[Array, "*batch"],
    vocabulary_size: int,
    chunk: int,
    cap: float = 0.0,
) -> tuple[Float[Array, ""], Residuals]:
    """The sum of what `objective(ℓ, *per_token's parts)` gives for the chunks, each of its (loss, ∂loss/∂ℓ).

    `chunk` is the number of tokens whose logits exist at once; the last chunk is filled up with ignored targets and
    zeros. Of an ignored target ℓ is 0, and its gradient too, whatever the objective gives. `cap` is that of `logits`.
    """
    dtype = accumulation_dtype(x.dtype)
    tokens, width = targets.size, x.shape[-1]
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    x_chunks = jnp.pad(x.reshape(tokens, width), ((0, padding), (0, 0))).reshape(-1, chunk, width)
    target_chunks = jnp.pad(targets.reshape(tokens), (0, padding), constant_values=cross_entropy.IGNORED).reshape(
        -1, chunk
    )
    more_chunks = [jnp.pad(array.reshape(tokens), (0, padding)).reshape(-1, chunk) for array in per_token]

    def one_chunk(carry, inputs):
        loss, dweight = carry
        x, targets, *more = inputs
        z = logits(params, x, cap=cap)
        losses, residuals = cross_entropy.forward(z, targets, vocabulary_size=vocabulary_size)
        value, dlogp = objective(-losses, *more)
        dlogits = cross_entropy.backward(residuals, -dlogp, vocabulary_size=vocabulary_size)
        dlogits = (soft_cap.backward(z, dlogits, cap=cap) if cap else dlogits).astype(x.dtype)
        dx = product("nv,vc->nc", dlogits, params.weight, dtype=x.dtype)
        dweight = dweight + product_over_tokens("nv,nc->vc", dlogits, x)
        return (loss + value, dweight), dx

    start = (jnp.zeros((), dtype), jnp.zeros(params.weight.shape, dtype))
    (loss, dweight), dx = lax.scan(one_chunk, start, (x_chunks, target_chunks, *more_chunks))
    return loss, Residuals(dx.reshape(-1, width)[:tokens].reshape(x.shape), dweight)


@jax.named_scope("unembedding.backward")
def backward(residuals: Residuals, dloss: Float[Array, ""] | float = 1.0) -> tuple[Params, Float[Array, "*batch C"]]:
    """The gradient of the weight in the accumulation dtype, dx in the dtype of x."""
    dx = (residuals.dx * dloss).astype(residuals.dx.dtype)
    return Params(residuals.dweight * dloss), dx
