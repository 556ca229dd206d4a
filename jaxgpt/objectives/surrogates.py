"""Terms of a policy's loss at one token: surrogates of the reward, divergence from a reference, loss of the value.

Each is a function of arrays over tokens, and returns its value at each of them and the derivative there. ℓ is
log π(token), and A the advantage: how much better the token was than what the policy does on average. Only ℓ, or the
value V, is differentiated; all else is data, from when the tokens were drawn (ℓ', V') or of the reference (ℓ°).

REINFORCE (Williams 1992): language modelling of one's own text, weighted by the advantage.

    f = -A ℓ                                     ∂ℓ = -A

PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7). The ratio ρ = exp(ℓ - ℓ') makes of old samples new ones, but
only near ρ = 1. Beyond 1 - ε and 1 + ε' there is nothing more to gain:

    f = -min(ρ A, clip(ρ, 1 - ε, 1 + ε') A)      ∂ℓ = -ρ A, or 0 where A > 0 and ρ > 1 + ε', or A < 0 and ρ < 1 - ε

since ∂ρ = ρ ∂ℓ, and since the minimum is the clipped one only there, where the clip is constant. What is lost by moving
the wrong way counts at any distance. At ρ = 1, before the first update, the gradient is REINFORCE's. ε' > ε leaves more
room to tokens that were unlikely (DAPO, Yu et al. 2025, arXiv:2503.14476).

Divergence of π from the reference, estimated at the drawn token with d = ℓ - ℓ° (Schulman 2020, "Approximating KL
divergence"). The mean of k1 and k3 under π is KL(π || reference), and k3 is never negative:

    k1 = d                  ∂ℓ = 1                  k2 = d²/2           ∂ℓ = d
    k3 = exp(-d) + d - 1    ∂ℓ = 1 - exp(-d)

In a loss k1's gradient has the mean 0 (Σ π ∂log π = 0), so k1 belongs into the reward (`advantages.py`). That of k2 has
as its mean the gradient of KL(π || reference) itself, and that of k3, which GRPO takes (Shao et al. 2024,
arXiv:2402.03300, equation 4), the gradient of KL(reference || π).

Value. R is the return, the sum of what was earned from here on:

    f = 1/2 max((V - R)², (clip(V, V' - c, V' + c) - R)²)
    ∂V = V - R, or 0 where V is outside of the clip and the clipped one has the larger error

A value that has moved by more than c in its update isn't moved on, unless it has to come back.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Terms = tuple[Float[Array, " N"], Float[Array, " N"]]  # at each token a value, and its derivative


def reinforce(logp: Float[Array, " N"], advantages: Float[Array, " N"]) -> Terms:
    """Returns the weighted log-likelihoods, and their derivatives by `logp`."""
    return -advantages * logp, -advantages


def clipped(
    logp: Float[Array, " N"],
    old: Float[Array, " N"],
    advantages: Float[Array, " N"],
    *,
    below: float,
    above: float,
) -> Terms:
    """Returns PPO's clipped objectives, as losses, and their derivatives by `logp`."""
    ratio = jnp.exp(logp - old)
    free, bounded = ratio * advantages, jnp.clip(ratio, 1 - below, 1 + above) * advantages
    spent = is_clipped(ratio, advantages, below=below, above=above)
    return -jnp.minimum(free, bounded), jnp.where(spent, 0, -ratio * advantages)


def is_clipped(ratio: Float[Array, " N"], advantages: Float[Array, " N"], *, below: float, above: float) -> Array:
    """Marks the tokens that have nothing more to gain."""
    return ((advantages > 0) & (ratio > 1 + above)) | ((advantages < 0) & (ratio < 1 - below))


def divergence(logp: Float[Array, " N"], reference: Float[Array, " N"], *, estimator: str) -> Terms:
    """Returns k1, k2 or k3 at each token, and its derivative by `logp`."""
    d = logp - reference
    match estimator:
        case "k1":
            return d, jnp.ones_like(d)
        case "k2":
            return d**2 / 2, d
        case "k3":
            return jnp.expm1(-d) + d, -jnp.expm1(-d)
    raise ValueError(estimator)


def value_loss(
    values: Float[Array, " N"], old: Float[Array, " N"], returns: Float[Array, " N"], *, clip: float
) -> Terms:
    """Returns the values' losses, and their derivatives by `values`; a `clip` of 0 clips nothing."""
    error = values - returns
    if not clip:
        return error**2 / 2, error
    bounded = jnp.clip(values, old - clip, old + clip)
    held = bounded - returns
    moved = (values != bounded) & (held**2 > error**2)
    return jnp.maximum(error**2, held**2) / 2, jnp.where(moved, 0, error)
