"""Comparisons as the batches of a reward model and of DPO: texts from the best to the worst, in tokens.

A ranking of K texts is one example of a reward model, in which all its pairs are compared at once, and K(K-1)/2
examples of DPO. A text is a conversation in its template; its answer is what the assistant writes in the completion,
and not in the turns of the prompt. A ranking with a text of more tokens than fit is left out whole, and counted: a cut
answer isn't the one that was compared.

The examples of a step are a pure function of seed and step: each is there once an epoch, in an order of its own.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from jaxgpt.data import chat_templates, conversations
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.conversations import Comparison, Messages
from jaxgpt.data.documents import Rows
from jaxgpt.data.loader import permutation_keys, permuted
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.layers.cross_entropy import IGNORED

Line = TypeVar("Line")


class Text(NamedTuple):
    tokens: np.ndarray  # int32, 1-D
    answer: np.ndarray  # bool, 1-D: the completion's tokens that the assistant writes


Ranking = tuple[Text, ...]  # from the best to the worst
Pair = tuple[Text, Text]  # the better text first


class Comparisons(NamedTuple):
    rankings: list[Ranking]
    left_out: tuple[str, ...]  # places of those with a text that is too long
    rows: Rows = Rows()  # bad lines

    def words(self, length: int) -> list[str]:
        """Returns the lines to print of what was left out."""
        found = []
        if self.left_out:
            found.append(
                f"{_lines(len(self.left_out))} left out, with a text of more than {length:,} tokens "
                f"(--training.sequence-length); the first: {self.left_out[0]}"
            )
        if self.rows.bad:
            found.append(f"{_lines(self.rows.bad)} left out as bad; the first: {self.rows.first_bad}")
        return found


class RankedTexts(NamedTuple):
    """Arrays of N rankings of at most K texts, as `objectives.reward.Batch` has them."""

    tokens: np.ndarray  # int32 (N, K, T)
    last: np.ndarray  # int32 (N, K): the place of each text's last token
    ranks: np.ndarray  # int32 (N, K): 0 for the best; -1 where there is no text


class PairedTexts(NamedTuple):
    """Arrays of N pairs, the chosen text first, as `objectives.preference.Batch` has them."""

    tokens: np.ndarray  # int32 (N, 2, T)
    targets: np.ndarray  # int32 (N, 2, T): the next token where it is the answer's, else IGNORED


def read(
    paths: Sequence[Path],
    template: Template,
    tokenizer: Tokenizer,
    length: int,
    skip_bad: int = 0,
    option: str = "--skip-bad",
) -> Comparisons:
    """Reads lines of comparisons and rankings whose texts have at most `length` tokens.

    UserError for more than `skip_bad` bad lines, which `option` is for, for files that can't be read, and where nothing
    is left.
    """
    rows, found, left_out = Rows(option=option), [], []
    for where, pairs in conversations.read_rankings(paths, rows, skip_bad):
        try:
            ranking = _encoded(pairs, template, tokenizer)
        except UserError as error:
            rows.add_bad(where, error, skip_bad)
            continue
        if max(len(text.tokens) for text in ranking) > length:
            left_out.append(where)
        else:
            found.append(ranking)
    if not found:
        names = ", ".join(shown(path) for path in paths)
        why = f"all {len(left_out):,} have a text of more than {length:,} tokens" if left_out else "there is none"
        raise UserError(f"{names}: no comparison to train on: {why}. Choose other files, or longer sequences")
    return Comparisons(found, tuple(left_out), rows)


def split(lines: Sequence[Line], fraction: float, called: str = "comparison") -> tuple[list[Line], list[Line]]:
    """Returns the lines to train on, and this share of them, evenly spread, that is held out: each at least one.

    UserError, with what they are `called`, for fewer than two.
    """
    count = len(lines)
    if count < 2:
        raise UserError(f"one {called} is there, and two are needed: one to train on and one that is held out")
    held_out = {number for number in range(count) if int((number + 1) * fraction) > int(number * fraction)}
    held_out = held_out if 0 < len(held_out) < count else {count - 1}
    parts = [line for number, line in enumerate(lines) if number not in held_out], sorted(held_out)
    return parts[0], [lines[number] for number in parts[1]]


def pairs_of(rankings: Iterable[Ranking]) -> list[Pair]:
    """Returns all pairs of the rankings, the better text first."""
    return [pair for ranking in rankings for pair in itertools.combinations(ranking, 2)]


def ranked_texts(rankings: Sequence[Ranking], completions: int, length: int) -> RankedTexts:
    """Returns the arrays of these rankings, of each the `completions` best texts."""
    shape = len(rankings), completions
    made = RankedTexts(np.zeros((*shape, length), np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32))
    for row, ranking in enumerate(rankings):
        for place, text in enumerate(ranking[:completions]):
            made.tokens[row, place, : len(text.tokens)] = text.tokens
            made.last[row, place] = len(text.tokens) - 1
            made.ranks[row, place] = place
    return made


def paired_texts(pairs: Sequence[Pair], length: int) -> PairedTexts:
    """Returns the arrays of these pairs."""
    shape = len(pairs), 2, length
    made = PairedTexts(np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32))
    for row, pair in enumerate(pairs):
        for side, text in enumerate(pair):
            inputs = len(text.tokens) - 1
            made.tokens[row, side, :inputs] = text.tokens[:-1]
            made.targets[row, side, :inputs] = np.where(text.answer[1:], text.tokens[1:], IGNORED)
    return made


def numbers_at(step: int, per_step: int, count: int, seed: int) -> np.ndarray:
    """Returns the numbers of the examples of a step, of `count` there are: each once an epoch."""
    epochs, places = np.divmod(np.arange(step * per_step, (step + 1) * per_step), count)
    numbers = np.empty(per_step, np.int64)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        numbers[mine] = permuted(places[mine], count, permutation_keys(seed, int(epoch)))
    return numbers


def _lines(count: int) -> str:
    return "1 line is" if count == 1 else f"{count:,} lines are"


def _encoded(pairs: Sequence[Comparison], template: Template, tokenizer: Tokenizer) -> Ranking:
    """Returns the ranking whose pairs these are. The K - 1 first ones are those of the best text with all others."""
    prompt, others = pairs[0].prompt, (math.isqrt(8 * len(pairs) + 1) - 1) // 2
    completions = [pairs[0].chosen, *(pair.rejected for pair in pairs[:others])]
    before = int(chat_templates.encode(prompt, template, tokenizer).mask.sum())  # of the prompt's own answers
    return tuple(_text(prompt, completion, before, template, tokenizer) for completion in completions)


def _text(prompt: Messages, completion: Messages, before: int, template: Template, tokenizer: Tokenizer) -> Text:
    ids, mask = chat_templates.encode([*prompt, *completion], template, tokenizer)
    answer = mask & (np.cumsum(mask) > before)
    if not answer[1:].any():
        raise UserError("a completion has no token of the assistant's")
    return Text(ids, answer)
