"""Entropy of the softmax over the vocabulary.

    p = softmax(z)           H = -Σ_i p_i log p_i

Backward. The softmax has ∂p_i/∂z_j = p_i (δ_ij - p_j), and -p log p has the derivative -(log p + 1), so

    ∂H/∂z_j = -Σ_i p_i (δ_ij - p_j) (log p_i + 1)
            = -p_j (log p_j + 1) + p_j Σ_i p_i (log p_i + 1)
            = -p_j (log p_j + 1) + p_j (1 - H)
            = -p_j (log p_j + H)

Tokens that are likelier than exp(-H) have a negative gradient: with more entropy they become less likely. log p is
z - logsumexp(z), which `cross_entropy` has: its residuals are all that this layer reads. The padded columns have
probability 0, and what is ignored there has the entropy 0 and the gradient 0 here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers import cross_entropy
from jaxgpt.layers.numerics import sum_over_last


class Residuals(NamedTuple):
    cross_entropy: cross_entropy.Residuals
    entropy: Float[Array, "N 1"]  # of ignored tokens too


@jax.named_scope("entropy.forward")
def forward(kept: cross_entropy.Residuals, *, vocabulary_size: int) -> tuple[Float[Array, " N"], Residuals]:
    """The entropy of each token's distribution in nats, from the residuals of its cross-entropy."""
    p, logp = _distribution(kept, vocabulary_size)
    entropy = -sum_over_last(p * logp)
    return jnp.where(kept.targets == cross_entropy.IGNORED, 0, entropy[:, 0]), Residuals(kept, entropy)


@jax.named_scope("entropy.backward")
def backward(residuals: Residuals, dentropy: Float[Array, " N"], *, vocabulary_size: int) -> Float[Array, "N Vp"]:
    """The gradient by the logits."""
    p, logp = _distribution(residuals.cross_entropy, vocabulary_size)
    dentropy = jnp.where(residuals.cross_entropy.targets == cross_entropy.IGNORED, 0, dentropy)
    return -p * (logp + residuals.entropy) * dentropy[:, None]


def _distribution(
    kept: cross_entropy.Residuals, vocabulary_size: int
) -> tuple[Float[Array, "N Vp"], Float[Array, "N Vp"]]:
    """Probabilities and their logarithms; 0 and 0 in padded columns."""
    inside = lax.broadcasted_iota(jnp.int32, kept.logits.shape, 1) < vocabulary_size
    logp = jnp.where(inside, kept.logits - kept.logsumexp, 0)
    return jnp.where(inside, jnp.exp(logp), 0), logp
