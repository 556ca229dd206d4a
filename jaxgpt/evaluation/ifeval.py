"""IFEval: how often a model follows instructions whose following a program can check (`instructions.py`).

A line of its file is {"prompt", "instruction_id_list", "kwargs"}, with an object of parameters for each instruction. An
answer is judged as it is (the paper's strict accuracy):

    accuracy                  prompts all of whose instructions are followed
    accuracy_instructions     instructions that are followed

A prompt with an instruction that isn't known here is left out; the result names such instructions. The instructions of
a prompt are no independent ones. So the standard error of their share r = Σ s_i / Σ m_i, of s_i followed of m_i, is
that of a ratio: √(n/(n-1) Σ (s_i - r m_i)²) / Σ m_i.
"""

import collections
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.evaluation import generative, instructions
from jaxgpt.evaluation.generative import Asked, Form, Question
from jaxgpt.evaluation.interface import Engine, Options, Subject, standard_error
from jaxgpt.evaluation.task_files import read_lines
from jaxgpt.evaluation.tasks import Malformed, Row, text_in, texts_in
from jaxgpt.foreign_text import quoted, shown

NAME = "ifeval"
FORM = Form(separator="\n\n", stop=(), tokens=1280)
MOST_NAMED = 5  # instructions in the line for people

Checks = tuple[tuple[str, dict[str, Any]], ...]  # names and parameters of a prompt's instructions


class Instructed(NamedTuple):
    """A prompt with its instructions; `unknown` are those that can't be checked."""

    prompt: str
    checks: Checks
    unknown: tuple[str, ...]


class IfevalResult(NamedTuple):
    """Its numbers."""

    task: str
    examples: int
    accuracy: float
    standard_error: float
    instructions: int
    accuracy_instructions: float
    standard_error_instructions: float
    samples: int
    shortened: int
    left_out: int  # prompts
    unknown: str  # the instructions for which they are left out, with commas between them

    def line(self) -> str:
        parts = [
            f"{self.task}: accuracy {self.accuracy:.4f} ± {self.standard_error:.4f}",
            f"of {self.instructions:,} instructions {self.accuracy_instructions:.4f} ± "
            f"{self.standard_error_instructions:.4f}",
            f"{self.examples:,} examples",
        ]
        parts += [f"{self.samples} answers each"] if self.samples > 1 else []
        parts += [f"prompts shortened: {self.shortened:,}"] if self.shortened else []
        if self.left_out:
            names = self.unknown.split(",")
            more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
            named = ", ".join([*(shown(name) for name in names[:MOST_NAMED]), *more])
            parts.append(f"{self.left_out:,} left out, whose instructions are not checked here: {named}")
        return ", ".join(parts)


class Ifeval(NamedTuple):
    """The prompts in tokens, and their instructions."""

    checks: list[Checks]
    asked: Asked
    left_out: int
    unknown: tuple[str, ...]
    draws = True

    def results(self, engine: Engine) -> Iterator[IfevalResult]:
        yield self.judged(self.asked.answers(engine))

    def judged(self, answers: Sequence[Sequence[str]]) -> IfevalResult:
        """Returns the numbers, from the answers that were drawn for each prompt."""
        whole, followed, counts = [], [], []
        for texts, checks in zip(answers, self.checks, strict=True):
            each = [[instructions.check(*one, text) for one in checks] for text in texts]
            whole.append(float(np.mean([all(one) for one in each])))
            followed.append(float(np.mean([sum(one) for one in each])))
            counts.append(len(checks))
        total = sum(counts)
        return IfevalResult(
            NAME,
            len(whole),
            float(np.mean(whole)),
            standard_error(whole),
            total,
            sum(followed) / total,
            ratio_error(followed, counts),
            self.asked.samples,
            self.asked.shortened,
            self.left_out,
            ",".join(self.unknown),
        )


def ratio_error(parts: Sequence[float], wholes: Sequence[int]) -> float:
    """Returns the standard error of Σ parts / Σ wholes, of independent pairs."""
    ratio, count = sum(parts) / sum(wholes), len(parts)
    squares = sum((part - ratio * whole) ** 2 for part, whole in zip(parts, wholes, strict=True))
    return math.sqrt(squares * count / max(1, count - 1)) / sum(wholes)


def load(path: str, subject: Subject, options: Options) -> Ifeval:
    """Returns the task of a file. UserError where it can't be read, or none of its prompts can be checked."""
    if not path:
        raise UserError(f"task {NAME}: no file is named. Name one of JSON lines: {NAME}=FILE")
    if options.shots:
        raise UserError(f"--shots {options.shots}: before the prompts of {NAME} nothing is shown")
    rows = read_lines(Path(path), NAME, read_row)[: options.limit or None]
    unknown = collections.Counter(name for row in rows for name in row.unknown)
    kept = [row for row in rows if not row.unknown]
    if not kept:
        names = ", ".join(shown(name) for name in list(unknown)[:MOST_NAMED])
        raise UserError(f"{shown(path)}: every prompt has an instruction that is not checked here: {names}")
    questions = [Question(row.prompt, "", row.prompt, "") for row in kept]
    asked = generative.ask(shown(path), questions, iter([()] * len(kept)), FORM, subject, options)
    return Ifeval([row.checks for row in kept], asked, len(rows) - len(kept), tuple(unknown))


def read_row(row: Row) -> Instructed:
    """Returns a prompt. Malformed where the line is none of IFEval's."""
    prompt, names, given = text_in(row, "prompt"), texts_in(row, "instruction_id_list"), row.get("kwargs")
    if not isinstance(given, list) or len(given) != len(names):
        raise Malformed(f"kwargs is not a list of {len(names)} objects, one for each instruction")
    if wrong := [one for one in given if not isinstance(one, dict | None)]:
        raise Malformed(f"kwargs has {quoted(wrong[0])}, where an object is expected")
    known = [(name, one or {}) for name, one in zip(names, given, strict=True) if name in instructions.INSTRUCTIONS]
    checks = tuple((name, instructions.arguments(name, one)) for name, one in known)
    return Instructed(prompt, checks, tuple(name for name in names if name not in instructions.INSTRUCTIONS))
