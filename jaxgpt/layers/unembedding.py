"""Unembedding and softmax fused with what is minimised, a chunk of tokens at a time.

    z = x Wᵀ           ℓ = log softmax(z)[target]           loss = Σ_chunks objective(ℓ)

Whatever is minimised depends on the model only through ℓ, the log-probability of each token's target. So the caller
hands over a function that makes of a chunk's ℓ its part of the loss, and ∂loss/∂ℓ. Backward, by `cross_entropy` (whose
loss is -ℓ):

    ∂z = -∂ℓ (softmax(z) - onehot(target))           ∂x = ∂z W           ∂W = Σ_N ∂zᵀ x

An objective that also wants the entropy H of each token's distribution gets it, returns ∂loss/∂H too, and `entropy` has
its part of ∂z.

The logits of a whole batch are the largest array of a small model (N·Vp numbers), so only a chunk of them ever exists.
Because the loss is one number, its gradients are known up to a factor as soon as the logits are: forward computes them
while the chunk's logits are there, keeps them as its residuals, and backward multiplies by ∂loss. A caller that wants
the loss alone drops the residuals, and the compiler drops the products that would have made them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxgpt.layers import cross_entropy, entropy, fp8, soft_cap
from jaxgpt.layers.numerics import accumulation_dtype, product, product_over_tokens

# From the log-probabilities of a chunk's targets, with `with_entropy` the entropies there, and what the caller gave for
# each of its tokens, to the chunk's part of the loss and the loss's gradients by each log-probability and each entropy.
# In place of the loss it may return a tree of numbers, the loss and metrics, which are all summed over the chunks.
Objective = Callable[..., tuple[Any, ...]]
# From logits, targets, `vocabulary_size` and `dtype` to the tokens' losses, and their gradients by logits in it.
Softmax = Callable[..., tuple[Float[Array, " N"], Float[Array, "N Vp"]]]


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
    with_entropy: bool = False,
    eight_bits: bool = False,
    softmax: Softmax | None = None,
) -> tuple[Any, Residuals]:
    """The sum of what `objective(ℓ, *per_token's parts)` gives for the chunks, each of its (loss, ∂loss/∂ℓ).

    With `with_entropy` it is `objective(ℓ, H, *per_token's parts)`, and gives (loss, ∂loss/∂ℓ, ∂loss/∂H).

    `chunk` is the number of tokens whose logits exist at once; the last chunk is filled up with ignored targets and
    zeros. Of an ignored target ℓ and H are 0, and their gradients too, whatever the objective gives. `cap` is that of
    `logits`. With `eight_bits` the products' factors are rounded as those of `fp8`: the weight once, all else chunk by
    chunk, each by its own magnitude.

    `softmax` is a fused kernel for what `cross_entropy` does forward and backward. It knows nothing of ∂ℓ, with which
    the products' small factors are multiplied instead: dx and x. Of objectives with the entropy, and of 8 bits, it is
    not used.
    """
    dtype = accumulation_dtype(x.dtype)
    tokens, width = targets.size, x.shape[-1]
    chunk = min(chunk, tokens)
    chunks = _in_chunks(chunk, x.reshape(tokens, width), targets, *per_token)
    fused = None if with_entropy or eight_bits else softmax
    quantised = fp8.quantise(params.weight, fp8.E4M3) if eight_bits else None

    def one_chunk(carry, inputs):
        loss, dweight = carry
        x, targets, *more = inputs
        weight = params.weight
        if quantised is not None:
            weight, x = quantised.numbers(x.dtype), fp8.quantise(x, fp8.E4M3).numbers(x.dtype)
        z = logits(Params(weight), x, cap=cap)
        factor = None  # of each token's row, which a fused kernel's ∂z is still to be multiplied by
        if fused is not None:
            losses, dlogits = fused(z, targets, vocabulary_size=vocabulary_size, dtype=x.dtype)
            value, dlogp = objective(-losses, *more)
            factor = jnp.where(targets == cross_entropy.IGNORED, 0, -dlogp)[:, None]
        elif with_entropy:
            losses, residuals = cross_entropy.forward(z, targets, vocabulary_size=vocabulary_size)
            entropies, of_entropy = entropy.forward(residuals, vocabulary_size=vocabulary_size)
            value, dlogp, dentropy = objective(-losses, entropies, *more)
            dlogits = entropy.backward(of_entropy, dentropy, vocabulary_size=vocabulary_size)
            dlogits = dlogits + cross_entropy.backward(residuals, -dlogp, vocabulary_size=vocabulary_size)
        else:
            losses, residuals = cross_entropy.forward(z, targets, vocabulary_size=vocabulary_size)
            value, dlogp = objective(-losses, *more)
            dlogits = cross_entropy.backward(residuals, -dlogp, vocabulary_size=vocabulary_size)
        dlogits = (soft_cap.backward(z, dlogits, cap=cap) if cap else dlogits).astype(x.dtype)
        if eight_bits:
            dlogits = fp8.quantise(dlogits, fp8.E5M2).numbers(x.dtype)
        if factor is None:
            dx = product("nv,vc->nc", dlogits, weight, dtype=x.dtype)
        else:
            dx = (product("nv,vc->nc", dlogits, weight) * factor).astype(x.dtype)
            x = (x * factor).astype(x.dtype)
        dweight = dweight + product_over_tokens("nv,nc->vc", dlogits, x)
        return (jax.tree.map(jnp.add, loss, value), dweight), dx

    of_a_chunk = jax.ShapeDtypeStruct((chunk,), dtype)
    ours = [of_a_chunk, of_a_chunk] if with_entropy else [of_a_chunk]
    value = jax.eval_shape(objective, *ours, *(array[0] for array in chunks[2:]))[0]
    start = (jax.tree.map(jnp.zeros_like, value), jnp.zeros(params.weight.shape, dtype))
    (loss, dweight), dx = lax.scan(one_chunk, start, chunks)
    return loss, Residuals(dx.reshape(-1, width)[:tokens].reshape(x.shape), dweight)


@jax.named_scope("unembedding.backward")
def backward(residuals: Residuals, dloss: Float[Array, ""] | float = 1.0) -> tuple[Params, Float[Array, "*batch C"]]:
    """The gradient of the weight in the accumulation dtype, dx in the dtype of x."""
    dx = (residuals.dx * dloss).astype(residuals.dx.dtype)
    return Params(residuals.dweight * dloss), dx


@jax.named_scope("unembedding.log_probabilities")
def log_probabilities(
    params: Params,
    x: Float[Array, "*batch C"],
    targets: Int[Array, "*batch"],
    *,
    vocabulary_size: int,
    chunk: int,
    cap: float = 0.0,
) -> Float[Array, "*batch"]:
    """The log-probability of each target, 0 of an ignored one, without any gradient; the options are `forward`'s."""
    tokens = targets.size

    def one_chunk(inputs):
        x, targets = inputs
        return -cross_entropy.forward(logits(params, x, cap=cap), targets, vocabulary_size=vocabulary_size)[0]

    logp = lax.map(one_chunk, _in_chunks(min(chunk, tokens), x.reshape(tokens, -1), targets))
    return logp.reshape(-1)[:tokens].reshape(targets.shape)


def _in_chunks(chunk: int, x: Float[Array, "N C"], targets: Array, *per_token: Array) -> tuple[Array, ...]:
    """Arrays of chunks of so many tokens, the last one filled up with zeros and ignored targets."""
    tokens, width = x.shape
    padding = -tokens % chunk
    rest = [(targets, cross_entropy.IGNORED), *((array, 0) for array in per_token)]
    return (
        jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, chunk, width),
        *(
            jnp.pad(array.reshape(tokens), (0, padding), constant_values=fill).reshape(-1, chunk)
            for array, fill in rest
        ),
    )
