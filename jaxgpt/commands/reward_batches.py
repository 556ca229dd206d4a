"""Batches of a reward model: rankings of texts, and scores of those that are held out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.commands import comparison_batches
from jaxgpt.commands.batches import Evaluation, Setting
from jaxgpt.commands.comparison_batches import ComparisonData, percent
from jaxgpt.data import comparisons
from jaxgpt.data.comparisons import RankedTexts, Ranking
from jaxgpt.data.loader import Feeder
from jaxgpt.evaluation.comparisons import make_scores
from jaxgpt.models.blocks import NO_AUX
from jaxgpt.objectives import reward
from jaxgpt.objectives.comparisons import ranking_loss
from jaxgpt.training.state import TrainState


class RewardBatches:
    """Rankings, each once an epoch; a `batches.Batches`.

    A checkpoint keeps the mean and the deviation of the scores of what is held out, by which they are standardised when
    the model is loaded.
    """

    every = 1

    def __init__(self, data: ComparisonData, setting: Setting):
        self.config = config = setting.config
        self.tokens = comparison_batches.tokens_per_step(config)
        self._data = data
        self._count = comparison_batches.limited(len(data.held_out), config)
        self._scores = make_scores(config, setting.frozen)
        self._found: tuple[int, np.ndarray] | None = None  # the last step that was evaluated, and its scores

    def feed(self, first: int, rows: Sequence[int]) -> Feeder:
        def make(numbers: np.ndarray) -> reward.Batch:
            arrays: Any = self._arrays(self._data.train, numbers)
            return reward.Batch(*arrays)

        return comparison_batches.feed(make, len(self._data.train), self.config, first, rows)

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        scores, ranks = map(jnp.asarray, self._of_held_out(step, state))
        losses, _ = ranking_loss(scores, ranks, centre=self.config.objective.centre)
        batch = reward.Batch(ranks[..., None], ranks, ranks)  # of which the ranks alone are read
        loss, values = reward.results(losses, scores, batch, NO_AUX, jnp.float32(1 / len(ranks)))
        values = {f"val_{name}": float(value) for name, value in values.items()}
        words = f"{percent(values['val_accuracy'])} of pairs in order, by {values['val_score_margin']:.3f} on average"
        return Evaluation(float(loss), values, words)

    def words(self, values: Mapping[str, float]) -> str:
        return f"{percent(values['accuracy'])} in order"

    def to_keep(self, step: int, state: TrainState) -> dict[str, Any]:
        scores, ranks = self._of_held_out(step, state)
        there = scores[ranks >= 0].astype(np.float64)
        mean, deviation = float(there.mean()), float(there.std())
        if not (math.isfinite(mean) and math.isfinite(deviation)):
            return {}
        return {"score_mean": mean, "score_deviation": deviation}

    def _of_held_out(self, step: int, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores of the held-out texts under this state, and the texts' ranks, both (rankings, K)."""
        if self._found is None or self._found[0] != step:
            found = self._scores(
                state.params, lambda numbers: self._arrays(self._data.held_out, numbers)[:2], self._count
            )
            self._found = step, found
        return self._found[1], self._arrays(self._data.held_out, np.arange(self._count)).ranks

    def _arrays(self, rankings: Sequence[Ranking], numbers: np.ndarray) -> RankedTexts:
        chosen = [rankings[number] for number in numbers]
        return comparisons.ranked_texts(chosen, self.config.objective.completions, self.config.training.sequence_length)
