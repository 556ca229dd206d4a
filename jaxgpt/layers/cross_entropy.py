"""Softmax cross-entropy over the vocabulary.

    p = softmax(z)           loss = -log p[target] = logsumexp(z) - z[target]

Backward, the softmax's Jacobian having cancelled against the logarithm's derivative:

    ∂z = ∂loss (p - onehot(target))

The logits have Vp columns, the vocabulary's V padded to a multiple of 128: the padded columns are taken as -∞, so they
have probability 0 and gradient 0. A target of IGNORED gives loss 0 and gradient 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers.numerics import sum_over_last

IGNORED = -1


class Residuals(NamedTuple):
    logits: Float[Array, "N Vp"]
    logsumexp: Float[Array, "N 1"]
    targets: Int[Array, " N"]


@jax.named_scope("cross_entropy.forward")
def forward(
    logits: Float[Array, "N Vp"], targets: Int[Array, " N"], *, vocabulary_size: int
) -> tuple[Float[Array, " N"], Residuals]:
    """The loss of each token in nats, in the dtype of the logits (float32 at least, as their product gives them)."""
    z = jnp.where(_column(logits) < vocabulary_size, logits, -jnp.inf)
    logsumexp = lax.platform_dependent(z, cpu=_logsumexp_in_two_passes, default=_logsumexp_in_one_pass)
    at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    losses = jnp.where(targets == IGNORED, 0, (logsumexp - at_target)[:, 0])
    return losses, Residuals(logits, logsumexp, targets)


@jax.named_scope("cross_entropy.backward")
def backward(residuals: Residuals, dlosses: Float[Array, " N"], *, vocabulary_size: int) -> Float[Array, "N Vp"]:
    """The gradient by the logits."""
    logits, logsumexp, targets = residuals
    probabilities = jnp.where(_column(logits) < vocabulary_size, jnp.exp(logits - logsumexp), 0)
    onehot = _column(logits) == targets[:, None]
    dlosses = jnp.where(targets == IGNORED, 0, dlosses)
    return (probabilities - onehot) * dlosses[:, None]


def _logsumexp_in_two_passes(z: Float[Array, "N Vp"]) -> Float[Array, "N 1"]:
    largest = jnp.max(z, axis=-1, keepdims=True)
    return largest + jnp.log(sum_over_last(jnp.exp(z - largest)))


def _logsumexp_in_one_pass(z: Float[Array, "N Vp"]) -> Float[Array, "N 1"]:
    """Reads z once, merging maxima and sums (Milakov and Gimelshein 2018, arXiv:1805.02867, equation 4).

    Each sum is of exp(z - the maximum beside it). -∞ could not be subtracted from, so the lowest number stands for it.
    """

    def merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (largest, total), (other, more) = a, b
        both = jnp.maximum(largest, other)
        return both, total * jnp.exp(largest - both) + more * jnp.exp(other - both)

    lowest = jnp.array(jnp.finfo(z.dtype).min, z.dtype)
    z = jnp.maximum(z, lowest)
    ones = jnp.exp(z - z)  # not constants, which the oracle can't differentiate a reduction of
    largest, total = lax.reduce((z, ones), (lowest, jnp.zeros((), z.dtype)), merge, (1,))
    return (largest + jnp.log(total))[:, None]


def _column(logits: Float[Array, "N Vp"]) -> Int[Array, "N Vp"]:
    return lax.broadcasted_iota(jnp.int32, logits.shape, 1)
