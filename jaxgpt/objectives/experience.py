"""Experience: drawn answers and their rewards as the batches of a policy's steps.

All is data here, in NumPy's memory, and nothing is differentiated: the advantages of a rollout's answers, their
weights, and what they were drawn with.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.objectives import advantages, policy
from jaxgpt.options.config import Objective


class Drawn(NamedTuple):
    """A rollout's answers: N texts, those to one prompt side by side."""

    tokens: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]  # the next token where it was drawn, else IGNORED
    scores: Float[np.ndarray, " N"]  # the answers' rewards
    logp: Float[np.ndarray, "N T"]  # of the targets, under the weights that they were drawn with
    reference: Float[np.ndarray, "N T"] | None  # under the reference, where there is one
    values: Float[np.ndarray, "N T"] | None  # of the value head, where there is one

    @property
    def answer(self) -> Bool[np.ndarray, "N T"]:
        """Marks the places whose targets were drawn."""
        return self.targets != IGNORED

    @property
    def divergence(self) -> float:
        """Returns the mean over answers of the divergence from the reference, in nats: k1, summed over the tokens."""
        if self.reference is None:
            return 0.0
        return float(np.sum(np.where(self.answer, self.logp - self.reference, 0), dtype=np.float64) / len(self.logp))


def batch(drawn: Drawn, options: Objective, *, group: int, penalty: float) -> policy.Batch:
    """Returns the arrays of a rollout, (N, T), that steps take their rows from.

    Args:
        drawn: The answers, in groups of `group` to the same prompt.
        options: The objective, which says what the advantages are.
        group: Number of answers to each prompt.
        penalty: The coefficient of the divergence in the rewards now.
    """
    answer, reference = drawn.answer, drawn.logp if drawn.reference is None else drawn.reference
    values = np.zeros_like(drawn.logp) if drawn.values is None else np.where(answer, drawn.values, 0)
    rewards = advantages.token_rewards(drawn.scores, drawn.logp, reference, answer, kl_coefficient=penalty)
    returns = np.zeros_like(rewards)
    if options.advantages == "group":
        totals = rewards.sum(axis=1).reshape(-1, group)
        found = answer * advantages.of_groups(totals, divide=options.divide_by_deviation).reshape(-1, 1)
    elif options.advantages == "values":
        factors = {"discount": options.discount, "decay": options.advantage_decay}
        found, returns = advantages.generalised(rewards, values, answer, **factors)
    else:  # what is earned from here on
        found, _ = advantages.generalised(rewards, np.zeros_like(values), answer, discount=options.discount, decay=1.0)
    if options.whiten:
        found = advantages.whitened(found, answer)
    weights = advantages.token_weights(answer, by_sequence=options.answers_alike)
    numbers = (weights, found, drawn.logp, np.where(answer, reference, 0), values, returns)
    return policy.Batch(drawn.tokens, drawn.targets, *(array.astype(np.float32) for array in numbers))  # type: ignore[arg-type]
