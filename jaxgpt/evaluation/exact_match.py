"""Tasks whose answers are drawn and compared with the right ones: GSM8K, and any that a small file describes.

A text counts by the answer in it (`pattern`), however long it is. The standard error is of the mean over the questions:
answers to one question are no independent ones.
"""

import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.evaluation import expressions, generative
from jaxgpt.evaluation.descriptions import BUILT_IN, Description, Match, read_description, read_examples
from jaxgpt.evaluation.generative import Asked, Form
from jaxgpt.evaluation.interface import Engine, Options, Subject, standard_error
from jaxgpt.foreign_text import shown


class MatchResult(NamedTuple):
    """A task's numbers."""

    task: str
    examples: int
    accuracy: float
    standard_error: float
    accuracy_last: float | None  # by the last match of `last_pattern`
    standard_error_last: float | None
    shots: int
    samples: int
    shortened: int  # prompts of which something was left out
    ended: int  # searches that took too long, which found nothing

    def line(self) -> str:
        parts = [f"{self.task}: accuracy {self.accuracy:.4f} ± {self.standard_error:.4f}"]
        if self.accuracy_last is not None:
            parts.append(f"the last match {self.accuracy_last:.4f} ± {self.standard_error_last:.4f}")
        parts += [f"{self.examples:,} examples", f"{self.shots} shown"]
        parts += [f"{self.samples} answers each"] if self.samples > 1 else []
        parts += [f"prompts shortened: {self.shortened:,}"] if self.shortened else []
        parts += [f"{self.ended} searches took too long"] if self.ended else []
        return ", ".join(parts)


class ExactMatch(NamedTuple):
    """A task's questions in tokens, and how their answers are judged."""

    name: str
    description: Description
    right: list[tuple[str, ...]]
    asked: Asked
    shots: int
    draws = True

    def results(self, engine: Engine) -> Iterator[MatchResult]:
        yield self.judged(self.asked.answers(engine))

    def judged(self, answers: Sequence[Sequence[str]]) -> MatchResult:
        """Returns the numbers, from the answers that were drawn for each question."""
        judge = Judge(self.description, self.name)
        pairs = list(zip(answers, self.right, strict=True))
        shares = [float(np.mean([judge.is_right(text, right) for text in texts])) for texts, right in pairs]
        last = error = None
        if self.description.last_pattern:
            of_last = [float(np.mean([judge.last_is_right(text, right) for text in texts])) for texts, right in pairs]
            last, error = float(np.mean(of_last)), standard_error(of_last)
        return MatchResult(
            self.name,
            len(shares),
            float(np.mean(shares)),
            standard_error(shares),
            last,
            error,
            self.shots,
            self.asked.samples,
            self.asked.shortened,
            judge.searches.ended,
        )


def load(name: str, path: str, subject: Subject, options: Options) -> ExactMatch:
    """Returns a task by the name of a built-in one, or by the path of its description.

    UserError where a file of it can't be read, or isn't as it should be.
    """
    description = BUILT_IN[name] if name in BUILT_IN else read_description(Path(name))
    path = path or _beside(name, description.data)
    if not path:
        raise UserError(f"task {shown(name)}: no file is named. Name one of JSON lines: {shown(name)}=FILE")
    examples = read_examples(description, name, Path(path))
    pool_path = options.examples or _beside(name, description.examples)
    shots = options.shots or description.shots
    pool = read_examples(description, name, Path(pool_path)) if shots and pool_path else examples
    if len(pool) - (pool is examples) < shots:
        raise UserError(f"{shown(pool_path or path)}: {len(pool):,} examples, too few to show {shots} before each one")
    asked = examples[: options.limit or None]
    before = generative.shown_before(
        len(asked), [one.question for one in pool], shots, options.shots_seed, own=pool is examples
    )
    form = Form(description.separator, description.stop, description.tokens)
    prompts = generative.ask(shown(path), [one.question for one in asked], before, form, subject, options)
    name = name if name in BUILT_IN else Path(name).stem
    return ExactMatch(name, description, [one.right for one in asked], prompts, shots)


def _beside(description: str, file: str) -> str:
    return str(Path(description).parent / file) if file else ""


# Judging


class Judge:
    """Compares answers with the right ones. UserError for an expression of the description that is none."""

    def __init__(self, description: Description, where: str):
        self._match: Match = description.match
        self._pattern, self._last = (
            expressions.compiled(text, f"{shown(where)}: {key}") if text else None
            for key, text in (("pattern", description.pattern), ("last_pattern", description.last_pattern))
        )
        self.searches = expressions.Searches()

    def is_right(self, text: str, right: Sequence[str]) -> bool:
        """Returns whether the answer in a text is one of the right ones."""
        found = self.searches.first(self._pattern, text) if self._pattern else text
        return self._equal(found, right)

    def last_is_right(self, text: str, right: Sequence[str]) -> bool:
        """Returns whether the last match of `last_pattern` in a text is one of the right ones."""
        return self._equal(self.searches.last(self._last, text) if self._last else None, right)

    def _equal(self, found: str | None, right: Sequence[str]) -> bool:
        if found is None:
            return False
        if self._match == "regex":
            patterns = [expressions.compiled(one, "the answer") for one in right]
            return any(self.searches.first(pattern, found) is not None for pattern in patterns)
        return any(compared(found, self._match) == compared(one, self._match) for one in right)


def compared(text: str, match: Match) -> str:
    """Returns what of an answer is compared."""
    if match == "number":
        return text.replace(",", "").replace("$", "").strip().removesuffix(".")
    if match == "normalised":
        plain = "".join(character for character in text.lower() if character not in string.punctuation)
        return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))
    return text.strip()
