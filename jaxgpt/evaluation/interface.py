"""Kinds of tasks: what all of them take, and what each has.

A task is read from its files by `registry.load`, for a `Subject`, before anything is computed. `results` then asks an
`Engine` for log-likelihoods of texts, or for texts, and yields one result or several.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.evaluation.scoring import Scorer
from jaxgpt.generation import batching
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Compute, Model, Sampling

GREEDY = Sampling(tokens=0, temperature=0.0)


class Subject(NamedTuple):
    """Tokenizer, shape and chat template of the model that is evaluated; no template where it is no assistant."""

    tokenizer: Tokenizer
    model: Model
    template: dict[str, Any] = {}  # noqa: RUF012  # its state


class Engine(NamedTuple):
    """The model as tasks use it."""

    scorer: Scorer
    params: Params  # what the scorer takes
    draw: Callable[[Sequence[batching.Request]], list[str]]


@dataclass(frozen=True)
class Options:
    """Options of tasks.

    Attributes:
        limit: Examples that are taken, from the first; 0 for all.
        shots: Answered examples that are shown before each; 0 for as many as the task says.
        examples: The file that they are from; empty for the task's own.
        shots_seed: The seed by which they are drawn for each question; 0 for the first ones of the file.
        sampling: How answers are drawn. Of 0 tokens the task says how many.
        samples: Answers that are drawn for each question.
        seed: The seed of the first of them.
    """

    limit: int = 0
    shots: int = 0
    examples: str = ""
    shots_seed: int = 0
    sampling: Sampling = GREEDY
    samples: int = 1
    seed: int = 0


class Result(Protocol):
    """Numbers of a task, a NamedTuple; None where it has no such number."""

    def line(self) -> str:
        """Returns the numbers as a line for people."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


class Task(Protocol):
    """A task that was read."""

    draws: bool  # whether it asks for texts

    def results(self, engine: Engine) -> Iterator[Result]:
        """Yields what the model reaches."""
        ...


def standard_error(values: Sequence[float] | Sequence[bool]) -> float:
    """Returns the standard error of the mean of independent values: √(p(1-p)/(n-1)) for a share p of right ones."""
    return float(np.std(np.asarray(values, np.float64)) / math.sqrt(max(1, len(values) - 1)))


def drawer(
    params: Callable[[], Sequence[Params]],
    subject: Subject,
    compute: Compute,
    at_once: int,
    told: Callable[[int, int], object] = lambda ended, count: None,
) -> Callable[[Sequence[batching.Request]], list[str]]:
    """Returns an engine's `draw`, for `at_once` texts side by side on each device.

    `params` returns whole parameters on each of the devices; `told` is called with how many texts have ended, of how
    many.
    """

    def draw(requests: Sequence[batching.Request]) -> list[str]:
        texts, ended, one_by_one, devices = [""] * len(requests), 0, threading.Lock(), params()

        def share(place: int) -> None:
            nonlocal ended
            numbers = range(place, len(requests), len(devices))
            own = [requests[number] for number in numbers]
            pieces = batching.generate(devices[place], own, subject.model, compute, subject.tokenizer, slots=at_once)
            for piece in pieces if own else ():
                texts[numbers[piece.number]] += piece.text
                if piece.last:
                    with one_by_one:
                        ended += 1
                        told(ended, len(requests))

        with ThreadPoolExecutor(len(devices)) as threads:
            list(threads.map(share, range(len(devices))))
        return texts

    return draw
