"""A run's batches, by its objective: the data that it reads, the batches that it trains on, and its evaluation.

`train.py` and `trainer.py` are the same for all objectives and know none of them by name. `open_source` is the one
place that lists them.

1. `open_source(config)` reads the data that the options name, and completes the configuration's sizes from them.
2. The train step is compiled, and the first state made or read.
3. `source.batches(setting)` returns what the trainer draws from. Only now are there weights, which the
   log-probabilities of a reference, or a policy's rollouts, are made with.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from jaxgpt.data.corpus import Described
from jaxgpt.options.config import Config
from jaxgpt.runs.folder import RunFolder
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import Base, TrainState


class Setting(NamedTuple):
    """A run that is about to take its first step, or the first one after it was resumed."""

    config: Config  # complete
    folder: RunFolder
    resharding: Resharding
    state: TrainState
    base: Base | None  # what is not trained, where adapters are
    kept: Mapping[str, Any]  # what `Batches.to_keep` returned for the checkpoint that is resumed from, else {}
    note: Callable[[str], None]  # shows a line

    @property
    def frozen(self) -> Any:
        """Returns the train step's second argument."""
        return None if self.base is None else self.base.params


class Evaluation(NamedTuple):
    loss: float | None  # on what is held out; None where there is none
    values: dict[str, float]  # further ones for metrics.jsonl, by name
    words: str  # which say the further ones


class Feed(AbstractContextManager, Protocol):
    """The batches of a run's steps in order. A context manager, which ends its threads."""

    @property
    def waited(self) -> float:
        """Returns the seconds that the last `next` took."""
        ...

    @property
    def values(self) -> Mapping[str, float]:
        """Returns values of the last batch, for its step's line of metrics.jsonl."""
        ...

    def next(self, state: TrainState) -> Any:
        """Returns this process's rows of the next step's batch.

        Args:
            state: The state that the step begins with. It may still be being computed, and the step takes its memory.
        """
        ...


class Batches(Protocol):
    """Batches that a trainer draws. All processes call its methods in the same order."""

    tokens: int  # that a step trains on
    every: int  # steps that belong together: the run is saved, evaluated and stopped only between so many

    def feed(self, first: int, rows: Sequence[int]) -> Feed:
        """Returns the batches from step number `first` on, from 0; `rows` are this process's of each micro-batch."""
        ...

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        """Evaluates the state after `step` steps on what is held out."""
        ...

    def words(self, values: Mapping[str, float]) -> str:
        """Returns what the live line says of a step beside its loss, from the further values of its metrics."""
        ...

    def to_keep(self, step: int, state: TrainState) -> dict[str, Any]:
        """Returns what the checkpoint of this state has to keep beside it: JSON, with finite numbers alone."""
        ...


class Source(Protocol):
    """The data of a run, opened."""

    @property
    def data(self) -> Described: ...

    @property
    def config(self) -> Config:
        """Returns the configuration with the sizes that follow from the data."""
        ...

    def about(self) -> str:
        """Returns a line's words about the data."""
        ...

    def afterwards(self, run: str) -> tuple[str, list[str]]:
        """Returns what may be done with the trained model at this path: in words, and the words of the command."""
        ...

    def batches(self, setting: Setting) -> Batches: ...


def open_source(config: Config) -> Source:
    """Opens the data that a run's options name. UserError where there are none, or they can't be read."""
    # here, since they import this module's classes
    from jaxgpt.commands import comparison_source, policy_source, text_batches

    match config.objective.name:
        case "next_token":
            return text_batches.open_source(config)
        case "reward" | "preference":
            return comparison_source.open_source(config)
        case "policy":
            return policy_source.open_source(config)
