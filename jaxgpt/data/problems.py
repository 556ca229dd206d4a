"""Problems as the prompts that a policy answers: in tokens, in an order that is a pure function of seed and number.

A prompt ends where the assistant's answer begins in the chat template. A prompt that leaves no room for an answer is
left out, and counted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data import chat_templates, conversations
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
    paths: Sequence[Path], template: Template, tokenizer: Tokenizer, longest: int, validation_fraction: float
) -> Problems:
    """Reads lines of problems whose prompts have at most `longest` tokens; the last of them are for validation.

    UserError for a bad line, for files that can't be read, and where too few problems are left.
    """
    rows, found, left_out = Rows(), [], []
    for where, problem in conversations.read_problems(paths, rows, sys.maxsize):
        try:
            tokens = chat_templates.encode(problem.prompt, template, tokenizer, add_generation_prompt=True).ids
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if 0 < len(tokens) <= longest:
            found.append(Problem(problem.prompt, problem.answer, tokens))
        else:
            left_out.append(where)
    if rows.bad:
        raise UserError(f"{rows.first_bad}. Mend the line, or leave it away")
    validates = max(1, round(len(found) * validation_fraction))
    if len(found) <= validates:
        names = ", ".join(shown(path) for path in paths)
        why = f"; {len(left_out):,} more have prompts of more than {max(longest, 0):,} tokens" if left_out else ""
        raise UserError(
            f"{names}: {len(found):,} problems, and at least two are needed, one of them to validate on{why}. Give "
            "more problems, or fewer --rollouts.tokens"
        )
    return Problems(found[:-validates], found[-validates:], tuple(left_out))
