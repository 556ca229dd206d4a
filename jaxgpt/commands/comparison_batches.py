"""Comparisons in tokens, fed in their order: what batches of a reward model and of preferences share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import comparisons
from jaxgpt.data.comparisons import Ranking
from jaxgpt.data.loader import Feeder
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.options.config import Config


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


def tokens_per_step(config: Config) -> int:
    """Returns the number of tokens that a step trains on, the places behind the texts' ends among them."""
    training = config.training
    return training.micro_batches * training.batch_size * config.objective.texts * training.sequence_length


def limited(count: int, config: Config) -> int:
    """Returns how many of so many examples an evaluation takes, from the first."""
    training = config.training
    return min(count, training.evaluation_batches * training.batch_size or count)


def feed(make: Callable[[np.ndarray], Any], count: int, config: Config, first: int, rows: Sequence[int]) -> Feeder:
    """Returns the batches of steps, which are made in the background from the examples' numbers, below `count`.

    `make` returns a NamedTuple of arrays with an axis of R examples; a batch has them with two, (A, R).
    """
    training = config.training
    shape = training.micro_batches, training.batch_size

    def batch(step: int) -> Any:
        numbers = comparisons.numbers_at(step, shape[0] * shape[1], count, training.seed).reshape(shape)[:, rows]
        made = make(numbers.reshape(-1))
        return type(made)(*(array.reshape(*numbers.shape, *array.shape[1:]) for array in made))

    return Feeder(batch, first)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
