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
    largest = jnp.max(z, axis=-1, keepdims=True)
    logsumexp = largest + jnp.log(sum_over_last(jnp.exp(z - largest)))
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


def _column(logits: Float[Array, "N Vp"]) -> Int[Array, "N Vp"]:
    return lax.broadcasted_iota(jnp.int32, logits.shape, 1)
