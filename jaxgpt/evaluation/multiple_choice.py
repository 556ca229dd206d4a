"""Multiple-choice accuracy: how often a model holds the right choice for the likeliest.

With s_i the summed log-likelihood of choice i's tokens after the context:

    accuracy             the right choice has the largest s_i
    accuracy_norm        it has the largest s_i / characters_i, without the space before it: lm-evaluation-harness's
                         acc_norm. In llm.c's files, which have no text, its own acc_norm, the next one
    accuracy_per_token   it has the largest s_i / tokens_i: llm.c's acc_norm, the least mean loss

Of equal choices the first counts. A task of greedy completions (LAMBADA) has one choice, which is right where each of
its tokens is the likeliest at its place; it has no other accuracy, and a perplexity, exp(-mean s).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data import loader
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import task_files
from jaxgpt.evaluation.interface import standard_error
from jaxgpt.evaluation.scoring import Score, Scorer, ScoringRequest
from jaxgpt.evaluation.tasks import TASKS, Question
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model


class Example(NamedTuple):
    """A question in tokens."""

    requests: tuple[ScoringRequest, ...]
    characters: tuple[int, ...]  # of each completion; none where they have no text
    label: int


class Examples(NamedTuple):
    task: str
    greedy: bool
    examples: list[Example]


class Result(NamedTuple):
    """A task's numbers; None where it has no such number."""

    task: str
    examples: int
    accuracy: float
    standard_error: float  # of accuracy
    accuracy_norm: float | None
    accuracy_per_token: float | None
    perplexity: float | None
    standard_error_norm: float | None
    standard_error_per_token: float | None

    def line(self) -> str:
        """Returns the numbers as a line for people."""
        norm = "norm", self.accuracy_norm, self.standard_error_norm
        per_token = "per token", self.accuracy_per_token, self.standard_error_per_token
        more = [f"{name} {value:.4f} ± {error:.4f}" for name, value, error in (norm, per_token) if value is not None]
        more += [f"perplexity {self.perplexity:.2f}"] if self.perplexity is not None else []
        first = f"{self.task}: accuracy {self.accuracy:.4f} ± {self.standard_error:.4f}"
        return ", ".join([first, *more, f"{self.examples:,} examples"])


def load(task: str, path: str, tokenizer: Tokenizer, model: Model, *, limit: int = 0, shots: int = 0) -> Examples:
    """Returns a task's examples in the tokens of the model that is to be scored, from a file or with no path the hub's.

    It takes so many (`limit`) from the beginning, 0 for all, with `shots` answered questions of MMLU before each.
    UserError where the file can't be read, the tokenizer hasn't got the tokens, or the model has no room for a choice.
    """
    greedy, taken = False, slice(limit or None)
    if path.endswith(".bin"):
        if tokenizer.name != "gpt2":
            raise UserError(f"{path}: its tokens are GPT-2's, and the model's tokenizer is {tokenizer.name}")
        examples = [
            Example(tuple(ScoringRequest(one.context.tolist(), end.tolist()) for end in one.completions), (), one.label)
            for one in task_files.read_llmc(Path(path))[taken]
        ]
        if not examples:
            raise UserError(f"{path}: there are no examples in it")
    else:
        questions = task_files.questions(task, path, shots)[taken]
        examples, greedy = [tokenized(question, tokenizer) for question in questions], TASKS[task].greedy
    _check(path or task, examples, model)
    return Examples(task, greedy, examples)


def _check(where: str, examples: list[Example], model: Model) -> None:
    for number, example in enumerate(examples, 1):
        for context, completion in example.requests:
            tokens = np.array([*context, *completion])
            loader.check_vocabulary(tokens, model.vocabulary_size, f"{where}: example {number}")
            if len(completion) > model.context:
                raise UserError(
                    f"{where}: example {number} has a choice of {len(completion):,} tokens, and the model's context is "
                    f"{model.context:,}: evaluate a model with a longer context on this task"
                )


def write(path: Path, examples: Examples) -> None:
    """Writes a task whose choices share their contexts as llm.c's file. UserError and RunError as `write_llmc`."""
    found = []
    for number, example in enumerate(examples.examples, 1):
        contexts, completions = zip(*example.requests, strict=True)
        if any(context != contexts[0] for context in contexts):
            raise UserError(f"{path}: example {number} can't be written: each choice has another context")
        found.append(task_files.TokenExample(np.array(contexts[0]), tuple(map(np.array, completions)), example.label))
    task_files.write_llmc(path, found)


def tokenized(question: Question, tokenizer: Tokenizer) -> Example:
    pairs = zip(question.contexts, question.completions, strict=True)
    characters = tuple(max(1, len(completion.removeprefix(" "))) for completion in question.completions)
    return Example(tuple(split(*pair, tokenizer) for pair in pairs), characters, question.label)


def split(context: str, completion: str, tokenizer: Tokenizer) -> ScoringRequest:
    """Returns context and completion in tokens: those of the whole text, cut where the context's own end.

    A space at the context's end goes over to the completion, since it is a part of the next word's token. Without a
    context the completion comes after `prefix`. UserError where nothing is left to score.
    """
    kept = context.rstrip()
    before = tokenizer.begin(tokenizer.encode(kept))
    whole = tokenizer.begin(tokenizer.encode(context + completion))
    after = whole[len(before) :]
    if not len(after):
        raise UserError(f"after {context[-40:]!r} there is nothing to score")
    return ScoringRequest(before.tolist() or [prefix(tokenizer)], after.tolist())


def prefix(tokenizer: Tokenizer) -> int:
    """Returns the token before a text without a context: its beginning, the end of another text, or a line's end.

    Some tokenizers drop a line's end; with them it is the first token that there is.
    """
    if tokenizer.document_start is not None:
        return tokenizer.document_start
    return int(next(iter(tokenizer.encode("\n")), 0))


def evaluate(examples: Examples, scorer: Scorer, params: Params) -> Result:
    """Returns the task's result with these parameters."""
    scores = iter(scorer(params, [request for example in examples.examples for request in example.requests]))
    per_example = [[next(scores) for _ in example.requests] for example in examples.examples]
    return result(examples, per_example)


def result(examples: Examples, scores: Sequence[Sequence[Score]]) -> Result:
    """Returns the task's numbers, from each example's scores."""
    perplexity, normed, per_token = None, [], []
    if examples.greedy:
        right = [bool(score.greedy) for (score,) in scores]
        perplexity = math.exp(min(700.0, -float(np.mean([score.log_likelihood for (score,) in scores]))))
    else:
        pairs = list(zip(examples.examples, scores, strict=True))
        right = [_right(example, found, [1] * len(found)) for example, found in pairs]
        per_token = [_right(example, found, [len(r.completion) for r in example.requests]) for example, found in pairs]
        letters = [_right(example, found, example.characters) for example, found in pairs if example.characters]
        normed = letters or per_token
    return Result(
        examples.task,
        len(examples.examples),
        float(np.mean(right)),
        standard_error(right),
        float(np.mean(normed)) if normed else None,
        float(np.mean(per_token)) if per_token else None,
        perplexity,
        standard_error(normed) if normed else None,
        standard_error(per_token) if per_token else None,
    )


def _right(example: Example, scores: Sequence[Score], lengths: Sequence[int]) -> bool:
    """Returns whether the right choice has the largest score for its length."""
    return int(np.argmax([score.log_likelihood / n for score, n in zip(scores, lengths, strict=True)])) == example.label
