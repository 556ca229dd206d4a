"""Batches of preferences: pairs of answers with their log-probabilities under the reference.

The reference is the model that the run begins with. Its log-probabilities never change; they are computed before the
first step, and kept in the run's folder (`runs/reference.py`).
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.commands import comparison_batches, first_weights
from jaxgpt.commands.batches import Evaluation, Setting
from jaxgpt.commands.comparison_batches import ComparisonData, percent
from jaxgpt.data import comparisons
from jaxgpt.data.comparisons import Pair, PairedTexts
from jaxgpt.data.loader import Feeder
from jaxgpt.errors import UserError
from jaxgpt.evaluation.comparisons import make_answers
from jaxgpt.foreign_text import shown
from jaxgpt.models.blocks import NO_AUX, Params
from jaxgpt.objectives import preference
from jaxgpt.parallel import processes
from jaxgpt.runs import reference
from jaxgpt.runs.reference import Reference
from jaxgpt.training.state import TrainState

DIGEST = "reference"  # what a checkpoint keeps


class PreferenceBatches:
    """Pairs, each once an epoch; a `batches.Batches`."""

    every = 1

    def __init__(self, data: ComparisonData, setting: Setting):
        self.config = config = setting.config
        self.tokens = comparison_batches.tokens_per_step(config)
        self._pairs = [comparisons.pairs_of(rankings) for rankings in (data.train, data.held_out)]
        self._count = comparison_batches.limited(len(self._pairs[1]), config)
        self._answers = make_answers(config, setting.frozen)
        self._reference = None if config.objective.reference_free else self._referred(setting)
        self._kept = {DIGEST: self._reference.digest()} if self._reference else {}

    def feed(self, first: int, rows: Sequence[int]) -> Feeder:
        pairs, _ = self._pairs

        def make(numbers: np.ndarray) -> preference.Batch:
            return self._batch(numbers, pairs, self._reference and self._reference.train)

        return comparison_batches.feed(make, len(pairs), self.config, first, rows)

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        pairs = self._pairs[1][: self._count]
        made = self._batch(np.arange(len(pairs)), pairs, self._reference and self._reference.held_out)
        batch = preference.Batch(*map(jnp.asarray, made))
        found = preference.margins(jnp.asarray(self._logp(state.params, pairs)), batch, self.config.objective)
        loss, values = preference.results(found, batch, NO_AUX, jnp.float32(1 / len(pairs)))
        values = {f"val_{name}": float(value) for name, value in values.items()}
        words = f"{percent(values['val_accuracy'])} of pairs in order, by {values['val_margin']:.3f} on average"
        return Evaluation(float(loss), values, words)

    def words(self, values: Mapping[str, float]) -> str:
        return f"{percent(values['accuracy'])} in order"

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
