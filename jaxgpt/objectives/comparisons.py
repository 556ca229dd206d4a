"""Losses of comparisons of scores: Bradley and Terry's of all pairs of a ranking, and those of a pair's margin.

Bradley and Terry (1952) have i preferred to j with probability σ(s_i - s_j), σ(h) = 1 / (1 + exp(-h)). Of a ranking of
K texts with m pairs, i being ranked before j in each,

    loss = 1/m Σ_pairs -log σ(s_i - s_j) + c (s_i + s_j)²

(Ouyang et al. 2022, arXiv:2203.02155, equation 1). With σ' = σ (1 - σ), -log σ(h) has the derivative -(1 - σ(h)) =
-σ(-h). So a pair pulls its scores apart as much as it finds its order unlikely:

    g_ij = σ(s_j - s_i) / m           ∂s_i = Σ_j g_ji - Σ_j g_ij + 2c/m Σ_pairs with i (s_i + s_j)

The second term fixes the mean, of which differences know nothing (Eisenstein et al. 2023, arXiv:2312.09244). Of all
pairs of K texts it is c/m ((K - 2) Σ s² + (Σ s)²): for more than two texts it also keeps each score from growing.

Of the margin h of a chosen text over a rejected one there are two losses; ε is the share of labels that are wrong:

    sigmoid    (1 - ε) (-log σ(h)) + ε (-log σ(-h))        ∂h = -(1 - ε) σ(-h) + ε σ(h) = σ(h) - (1 - ε)
    square     (h - 1/2)²                                  ∂h = 2 (h - 1/2)

The first is DPO's (Rafailov et al. 2023, arXiv:2305.18290), which pushes h on for ever, the slower the further; the
second IPO's (Azar et al. 2023, arXiv:2310.12036, equation 17), which has a place to stay at. IPO's own form is
(Δ - 1/2β)², that is (h - 1/2)² / β² for h = βΔ; `preference.py` divides by β².
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pairs(ranks: Int[Array, "*batch K"]) -> Bool[Array, "*batch K K"]:
    """Marks the pairs (i, j) of each ranking in which i has the better rank; texts of rank -1 aren't there."""
    better, worse = ranks[..., :, None], ranks[..., None, :]
    return (better >= 0) & (worse >= 0) & (better < worse)


def ranking_loss(
    scores: Float[Array, "B K"], ranks: Int[Array, "B K"], *, centre: float = 0.0
) -> tuple[Float[Array, " B"], Float[Array, "B K"]]:
    """Returns each ranking's loss, 0 where it has no pair, and its gradient by the scores."""
    marks = pairs(ranks)
    weights = marks / jnp.maximum(jnp.sum(marks, axis=(1, 2), keepdims=True), 1).astype(scores.dtype)
    difference = scores[:, :, None] - scores[:, None, :]
    total = scores[:, :, None] + scores[:, None, :]
    losses = jnp.sum(weights * (-jax.nn.log_sigmoid(difference) + centre * total**2), axis=(1, 2))
    apart = weights * jax.nn.sigmoid(-difference)
    towards = 2 * centre * weights * total
    by_better, by_worse = towards - apart, towards + apart
    return losses, jnp.sum(by_better, axis=2) + jnp.sum(by_worse, axis=1)


def sigmoid_loss(
    margins: Float[Array, " B"], *, smoothing: float = 0.0
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns the losses of these margins, and their derivatives."""
    losses = -(1 - smoothing) * jax.nn.log_sigmoid(margins) - smoothing * jax.nn.log_sigmoid(-margins)
    return losses, jax.nn.sigmoid(margins) - (1 - smoothing)


def square_loss(margins: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns the losses of these margins, and their derivatives."""
    return (margins - 0.5) ** 2, 2 * (margins - 0.5)
