"""Advantages: how much better a drawn token was than expected. They are data, computed before a step; nothing is
differentiated.

A text's reward comes at its last token; at each token the divergence from the reference costs β (ℓ - ℓ°) (Ziegler et
al. 2019, arXiv:1909.08593, equation 2). From the rewards r_t and the values V_t of the tokens t = 0..n-1 of an answer,
with V_n = 0, come advantages and returns (Schulman et al. 2015, arXiv:1506.02438, equations 11 and 16):

    δ_t = r_t + γ V_{t+1} - V_t           A_t = Σ_k (γλ)^k δ_{t+k} = δ_t + γλ A_{t+1}           R_t = A_t + V_t

λ = 1 is the reward that came less the value, exact and noisy; λ = 0 trusts the next value.

A group of G answers to one prompt needs no values (GRPO, Shao et al. 2024, arXiv:2402.03300): their mean is what was to
be expected, A = (r - mean) / (deviation + 1e-4) at every token of an answer. Without the division easy and hard prompts
weigh as their rewards differ (Liu et al. 2025, arXiv:2503.20783).
"""

import numpy as np
from jaxtyping import Bool, Float

SMALLEST_DEVIATION = 1e-4


def token_rewards(
    scores: Float[np.ndarray, " B"],
    logp: Float[np.ndarray, "B T"],
    reference: Float[np.ndarray, "B T"],
    answer: Bool[np.ndarray, "B T"],
    *,
    kl_coefficient: float,
) -> Float[np.ndarray, "B T"]:
    """Returns each token's reward: the text's score at the answer's last, and everywhere the divergence's cost.

    `answer` marks the drawn tokens; a text without any earns nothing.
    """
    rewards = np.where(answer, -kl_coefficient * (logp - reference), 0.0)
    last = answer.shape[1] - 1 - np.argmax(answer[:, ::-1], axis=1)
    rows = np.flatnonzero(answer.any(axis=1))
    rewards[rows, last[rows]] += scores[rows]
    return rewards


def generalised(
    rewards: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"],
    answer: Bool[np.ndarray, "B T"],
    *,
    discount: float,
    decay: float,
) -> tuple[Float[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
    """Returns advantages and returns, 0 outside of the answers. `discount` is γ and `decay` λ.

    An answer's tokens lie side by side; what follows it is worth nothing.
    """
    advantages = np.zeros_like(rewards)
    following = np.zeros(len(rewards), rewards.dtype)
    advantage = np.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * following - values[:, t]
        advantage = np.where(answer[:, t], delta + discount * decay * advantage, 0)
        following = np.where(answer[:, t], values[:, t], 0)
        advantages[:, t] = advantage
    return advantages, np.where(answer, advantages + values, 0)


def of_groups(scores: Float[np.ndarray, "P G"], *, divide: bool) -> Float[np.ndarray, "P G"]:
    """Returns the advantage of each of the G answers to each of P prompts; 0 in a group that is all alike.

    The deviation is that of a sample, with G - 1.
    """
    centred = scores - scores.mean(axis=1, keepdims=True)
    if not divide:
        return centred
    deviation = scores.std(axis=1, ddof=min(1, scores.shape[1] - 1), keepdims=True)
    return centred / (deviation + SMALLEST_DEVIATION)


def whitened(advantages: Float[np.ndarray, "B T"], answer: Bool[np.ndarray, "B T"]) -> Float[np.ndarray, "B T"]:
    """Returns the advantages with mean 0 and deviation 1 over all tokens of answers, 0 elsewhere."""
    there = advantages[answer]
    if not there.size:
        return advantages
    return np.where(answer, (advantages - there.mean()) / (there.std() + 1e-8), 0)


def token_weights(answer: Bool[np.ndarray, "B T"], *, by_sequence: bool) -> Float[np.ndarray, "B T"]:
    """Returns each token's weight in the loss: 1, or `by_sequence` 1 / tokens, so that every answer weighs the same."""
    weights = answer.astype(np.float64)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1) if by_sequence else weights


def adapted(coefficient: float, divergence: float, target: float) -> float:
    """Returns the coefficient of the divergence for the next step, which keeps the divergence near a target.

    Its change is a tenth of the relative error, which counts at most 0.2 (Ziegler et al. 2019, section 2.2).
    """
    error = float(np.clip(divergence / target - 1, -0.2, 0.2))
    return coefficient * (1 + 0.1 * error)
