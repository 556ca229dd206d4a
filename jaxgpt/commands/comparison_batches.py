"""Batches of comparisons: rankings of a reward model, and pairs of a model that is trained by preferences.

The reference of preferences is the model that the run begins with. Its log-probabilities never change; they are
computed before the first step, and kept in the run's folder (`runs/reference.py`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.commands import first_weights
from jaxgpt.commands.batches import Evaluation, Setting
from jaxgpt.data import comparisons
from jaxgpt.data.comparisons import Pair, PairedTexts, RankedTexts, Ranking
from jaxgpt.data.loader import Feeder
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation.comparisons import make_answers, make_scores
from jaxgpt.foreign_text import shown
from jaxgpt.models.blocks import NO_AUX, Params
from jaxgpt.objectives import preference, reward
from jaxgpt.objectives.comparisons import ranking_loss
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes
from jaxgpt.runs import reference
from jaxgpt.runs.reference import Reference
from jaxgpt.training.state import TrainState

DIGEST = "reference"  # what a checkpoint keeps


class ComparisonData(NamedTuple):
    """Comparisons in tokens; a `corpus.Described`."""

    description: str
    tokenizer: Tokenizer
    prompt: np.ndarray | None
    fingerprint: dict[str, Any]
    template: dict[str, Any]
    notes: tuple[str, ...]
    train: list[Ranking]
    held_out: list[Ranking]


class ComparisonBatches:
    """Comparisons, each once an epoch: what batches of rankings and of pairs share."""

    every = 1

    def __init__(self, config: Config):
        training = config.training
        self.config = config
        # The places behind the texts' ends are among them.
        self.tokens = training.micro_batches * training.batch_size * config.objective.texts * training.sequence_length

    def words(self, values: Mapping[str, float]) -> str:
        return f"{_percent(values['accuracy'])} in order"

    def _evaluated(self, count: int) -> int:
        """Returns how many of so many examples an evaluation takes, from the first."""
        training = self.config.training
        return min(count, training.evaluation_batches * training.batch_size or count)

    def _feed(self, make: Callable[[np.ndarray], Any], count: int, first: int, rows: Sequence[int]) -> Feeder:
        """Returns the batches of steps, which are made in the background from the examples' numbers, below `count`.

        `make` returns a NamedTuple of arrays with an axis of R examples; a batch has them with two, (A, R).
        """
        training = self.config.training
        shape = training.micro_batches, training.batch_size

        def batch(step: int) -> Any:
            numbers = comparisons.numbers_at(step, shape[0] * shape[1], count, training.seed).reshape(shape)[:, rows]
            made = make(numbers.reshape(-1))
            return type(made)(*(array.reshape(*numbers.shape, *array.shape[1:]) for array in made))

        return Feeder(batch, first)


class RewardBatches(ComparisonBatches):
    """Rankings; a `batches.Batches`.

    A checkpoint keeps the mean and the deviation of the scores of what is held out, by which they are standardised when
    the model is loaded.
    """

    def __init__(self, data: ComparisonData, setting: Setting):
        super().__init__(setting.config)
        self._data = data
        self._count = self._evaluated(len(data.held_out))
        self._scores = make_scores(self.config, setting.frozen)
        self._found: tuple[int, np.ndarray] | None = None  # the last step that was evaluated, and its scores

    def feed(self, first: int, rows: Sequence[int]) -> Feeder:
        def make(numbers: np.ndarray) -> reward.Batch:
            arrays: Any = self._arrays(self._data.train, numbers)
            return reward.Batch(*arrays)

        return self._feed(make, len(self._data.train), first, rows)

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        scores, ranks = map(jnp.asarray, self._of_held_out(step, state))
        losses, _ = ranking_loss(scores, ranks, centre=self.config.objective.centre)
        batch = reward.Batch(ranks[..., None], ranks, ranks)  # of which the ranks alone are read
        loss, values = reward.results(losses, scores, batch, NO_AUX, jnp.float32(1 / len(ranks)))
        return _evaluation(loss, values, values["score_margin"])

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


class PreferenceBatches(ComparisonBatches):
    """Pairs; a `batches.Batches`."""

    def __init__(self, data: ComparisonData, setting: Setting):
        super().__init__(setting.config)
        self._pairs = [comparisons.pairs_of(rankings) for rankings in (data.train, data.held_out)]
        self._count = self._evaluated(len(self._pairs[1]))
        self._answers = make_answers(self.config, setting.frozen)
        self._reference = None if self.config.objective.reference_free else self._referred(setting)
        self._kept = {DIGEST: self._reference.digest()} if self._reference else {}

    def feed(self, first: int, rows: Sequence[int]) -> Feeder:
        pairs, _ = self._pairs

        def make(numbers: np.ndarray) -> preference.Batch:
            return self._batch(numbers, pairs, self._reference and self._reference.train)

        return self._feed(make, len(pairs), first, rows)

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        pairs = self._pairs[1][: self._count]
        made = self._batch(np.arange(len(pairs)), pairs, self._reference and self._reference.held_out)
        batch = preference.Batch(*map(jnp.asarray, made))
        found = preference.margins(jnp.asarray(self._logp(state.params, pairs)), batch, self.config.objective)
        loss, values = preference.results(found, batch, NO_AUX, jnp.float32(1 / len(pairs)))
        return _evaluation(loss, values, values["margin"])

    def to_keep(self, step: int, state: TrainState) -> dict[str, Any]:
        return self._kept

    def _arrays(self, pairs: Sequence[Pair], numbers: np.ndarray) -> PairedTexts:
        return comparisons.paired_texts([pairs[number] for number in numbers], self.config.training.sequence_length)

    def _batch(self, numbers: np.ndarray, pairs: Sequence[Pair], logp: np.ndarray | None) -> preference.Batch:
        under_reference = np.zeros((len(numbers), 2), np.float32) if logp is None else logp[numbers]
        return preference.Batch(*self._arrays(pairs, numbers), under_reference)  # type: ignore[arg-type]

    def _logp(self, params: Params, pairs: Sequence[Pair]) -> np.ndarray:
        return self._answers(params, lambda numbers: self._arrays(pairs, numbers), len(pairs))

    def _referred(self, setting: Setting) -> Reference:
        """Returns the log-probabilities under the reference: those of the run's folder, or else computed.

        UserError where they are lost, and can't be computed again from the weights that the run began with.
        """
        digest, folder = setting.kept.get(DIGEST), setting.folder
        found = reference.read(folder.path, digest) if isinstance(digest, str) else None
        if all(processes.talk.all_gather(found is not None)) and found is not None:
            return found
        started = time.perf_counter()
        params = setting.state.params if int(setting.state.step) == 0 else _first_params(setting)
        made = Reference(*(self._logp(params, pairs) for pairs in self._pairs))
        if digest is not None and made.digest() != digest:
            raise UserError(_lost(setting, f"those of {shown(first_weights.name(setting))} are other ones"))
        if processes.first():
            reference.write(folder, made)
        setting.note(
            f"reference log-probabilities of {sum(map(len, self._pairs)):,} pairs under the weights that the run began "
            f"with, computed in {time.perf_counter() - started:.1f} s"
        )
        return made


def _first_params(setting: Setting) -> Params:
    """Returns the parameters that a resumed run began with, from the weights that they were. UserError without them."""
    try:
        return first_weights.load(setting).params
    except UserError as error:
        raise UserError(_lost(setting, f"the weights that the run began with can't be read: {error}")) from None


def _lost(setting: Setting, why: str) -> str:
    return (
        f"{setting.folder.path / reference.NAME}: the log-probabilities of the reference, which this run was trained "
        f"against, are not there any more, and {why}. Restore the file from a copy, put the weights back that the run "
        f"began with ({first_weights.option(setting)}), or begin a new run"
    )


def _evaluation(loss: Any, values: Mapping[str, Any], margin: Any) -> Evaluation:
    """Returns an evaluation of these values; `margin` is the mean of the differences of scores, or of the margins."""
    words = f"{_percent(values['accuracy'])} of pairs in order, by {float(margin):.3f} on average"
    return Evaluation(float(loss), {f"val_{name}": float(value) for name, value in values.items()}, words)


def _percent(share: Any) -> str:
    return f"{100 * float(share):.1f}%"
