"""Problems as the prompts that a policy answers: in tokens, in an order that is a pure function of seed and number.

A prompt ends where the assistant's answer begins in the chat template. A prompt that leaves no room for an answer is
left out, and counted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data import chat_templates, comparisons, conversations
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.conversations import Messages
from jaxgpt.data.documents import Rows
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown


class Problem(NamedTuple):
    prompt: Messages
    answer: str
    tokens: np.ndarray  # int32, 1-D: the prompt, up to where the answer begins


class Problems(NamedTuple):
    train: list[Problem]
    validation: list[Problem]
    left_out: tuple[str, ...]  # places of those whose prompts are too long

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest prompt."""
        return max(len(problem.tokens) for problem in [*self.train, *self.validation])


def read(
    paths: Sequence[Path],
    template: Template,
    tokenizer: Tokenizer,
    longest: int,
    validation_fraction: float,
    skip_bad: int = 0,
    option: str = "--skip-bad",
) -> Problems:
    """Reads lines of problems whose prompts have at most `longest` tokens; a share of them is for validation.

    UserError for more than `skip_bad` bad lines, which `option` is for, for files that can't be read, and where fewer
    than two problems are left.
    """
    rows, found, left_out = Rows(option=option), [], []
    for where, problem in conversations.read_problems(paths, rows, skip_bad):
        try:
            tokens = chat_templates.encode(problem.prompt, template, tokenizer, add_generation_prompt=True).ids
        except UserError as error:
            rows.add_bad(where, error, skip_bad)
            continue
        if 0 < len(tokens) <= longest:
            found.append(Problem(problem.prompt, problem.answer, tokens))
        else:
            left_out.append(where)
    if not found:
        names = ", ".join(shown(path) for path in paths)
        why = "there is none"
        if left_out:
            why = f"all {len(left_out):,} have prompts of more than the {max(longest, 0):,} tokens that leave room"
        raise UserError(f"{names}: no problem to learn from: {why}. Choose other files, or fewer --rollouts.tokens")
    return Problems(*comparisons.split(found, validation_fraction, "problem"), tuple(left_out))
