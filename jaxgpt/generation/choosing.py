"""Choosing among several texts of one prompt: the best of n, and the answer that most of them agree on.

best of n      the text with the highest score: by default the mean log-probability of its tokens, which does not
               favour short texts as their sum would; or any other, such as a reward model's
voting         the answer that most texts end with, whatever their way to it (self-consistency, Wang et al. 2023,
               arXiv:2203.11171)
"""

import collections
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxgpt.generation.batching import ScoredToken


@dataclass
class Whole:
    """A text that has been put together from its pieces."""

    text: str = ""
    tokens: int = 0
    ended: str = ""
    scored: list[ScoredToken] = field(default_factory=list)

    def add(self, piece: str, tokens: int, ended: str, scored: Sequence[ScoredToken]) -> None:
        self.text += piece
        self.tokens, self.ended = tokens, ended
        self.scored += scored


Score = Callable[[Whole], float]


def mean_log_probability(text: Whole) -> float:
    """Returns the mean log-probability of a text's tokens, which was asked for; -∞ for none."""
    if not text.scored:
        return float("-inf")
    return sum(token.log_probability for token in text.scored) / len(text.scored)


def best(texts: Sequence[Whole], n: int, score: Score = mean_log_probability) -> list[Whole]:
    """Returns the n texts with the highest scores, the highest first; all as they are where there are no more."""
    return list(texts) if n >= len(texts) else sorted(texts, key=score, reverse=True)[:n]


class Vote(NamedTuple):
    answer: str
    votes: int


def vote(texts: Sequence[str], answer: "re.Pattern[str]") -> Vote | None:
    """Returns the answer that most texts give; of equally many the one that came first. None where no text has one.

    A text's answer is the last match of the pattern in it: its first group, or all of it where it has none.
    """
    counted: collections.Counter[str] = collections.Counter()
    for text in texts:
        found = [match[1] if answer.groups else match[0] for match in answer.finditer(text)]
        if found and found[-1] is not None:
            counted[found[-1].strip()] += 1
    if not counted:
        return None
    return Vote(*counted.most_common(1)[0])
