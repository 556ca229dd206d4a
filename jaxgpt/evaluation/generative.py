"""Questions that a model answers in its own words, with answered ones shown before each.

A base model goes on with a text: the shown questions with their answers, then the question. A model with a chat
template is asked in it, and what is shown are turns before the question. A prompt may have at least half of the model's
context. Of one that is too long, the first of the shown questions are left out, and then the question's beginning.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.data import chat_templates, loader
from jaxgpt.errors import UserError
from jaxgpt.evaluation.interface import Engine, Options, Subject
from jaxgpt.generation import batching
from jaxgpt.options.config import Sampling


class Question(NamedTuple):
    """A question and its answer in the words of a base model's text, and in those of a conversation."""

    text: str
    text_answer: str  # what follows the text where it is shown
    message: str
    message_answer: str


class Form(NamedTuple):
    """Form that all questions of a task have.

    Attributes:
        separator: What stands between two of them in a text.
        stop: Texts that end an answer, and are not part of it.
        tokens: The most tokens of an answer.
    """

    separator: str
    stop: tuple[str, ...]
    tokens: int


class Prompt(NamedTuple):
    """A prompt in tokens, and whether something of it was left out."""

    tokens: np.ndarray
    shortened: bool


class Asked(NamedTuple):
    """Questions in tokens, and how they are answered."""

    prompts: list[Prompt]
    sampling: Sampling
    ends: frozenset[int]
    samples: int
    seed: int

    @property
    def shortened(self) -> int:
        return sum(prompt.shortened for prompt in self.prompts)

    def answers(self, engine: Engine) -> list[list[str]]:
        """Returns the answers that are drawn for each question."""
        requests = [
            batching.Request(prompt.tokens, self.sampling, (self.seed + sample) % 2**31, self.ends)
            for prompt in self.prompts
            for sample in range(self.samples)
        ]
        texts = engine.draw(requests)
        return [texts[start : start + self.samples] for start in range(0, len(texts), self.samples)]


def ask(
    where: str,
    questions: Sequence[Question],
    shown: Iterator[Sequence[Question]],
    form: Form,
    subject: Subject,
    options: Options,
) -> Asked:
    """Returns the questions as a model is asked them, with what is shown before each.

    UserError, which begins with `where` and the question's number, for one that the tokenizer can't express.
    """
    context = subject.model.context
    most = max(1, min(options.sampling.tokens or form.tokens, context // 2))
    prompts = []
    for number, (question, examples) in enumerate(zip(questions, shown, strict=False), 1):
        try:
            prompt = _prompt(question, examples, form, subject, context - most)
            loader.check_vocabulary(prompt.tokens, subject.model.vocabulary_size, "its prompt")
        except UserError as error:
            raise UserError(f"{where}: example {number}: {error}") from None
        prompts.append(prompt)
    stop = form.stop + options.sampling.stop + chat_templates.stops(subject.template)
    sampling = dataclasses.replace(options.sampling, tokens=most, stop=tuple(dict.fromkeys(stop)))
    return Asked(prompts, sampling, batching.end_of_text(subject.tokenizer), options.samples, options.seed)


def _prompt(question: Question, examples: Sequence[Question], form: Form, subject: Subject, room: int) -> Prompt:
    """Returns the prompt of a question, of at most `room` tokens."""
    for left_out in range(len(examples) + 1):
        tokens = _encoded(question, examples[left_out:], form, subject)
        if len(tokens) <= room:
            return Prompt(tokens, left_out > 0)
    begin = tokens[:1] if tokens[0] == subject.tokenizer.begin_of_text and room > 1 else tokens[:0]
    return Prompt(np.concatenate([begin, tokens[len(tokens) - room + len(begin) :]]), True)


def _encoded(question: Question, examples: Sequence[Question], form: Form, subject: Subject) -> np.ndarray:
    if not subject.template:
        text = form.separator.join([*(one.text + one.text_answer for one in examples), question.text])
        return batching.prompt_tokens(text, subject.tokenizer, False, "the prompt")
    messages = []
    for one in examples:
        messages.append({"role": "user", "content": one.message})
        messages.append({"role": "assistant", "content": one.message_answer})
    messages.append({"role": "user", "content": question.message})
    template = chat_templates.from_state(subject.template)
    return chat_templates.encode(messages, template, subject.tokenizer, add_generation_prompt=True).ids


def shown_before(
    questions: int, pool: Sequence[Question], shots: int, seed: int, own: bool
) -> Iterator[Sequence[Question]]:
    """Yields what is shown before each question: the first of `pool`, or by a seed other than 0 some of it, drawn anew.

    Where the pool is the questions themselves (`own`), a question is not shown before itself. The pool has enough.
    """
    for number in range(questions):
        others = range(len(pool))
        if own:
            others = [index for index in range(min(len(pool), shots + 1) if not seed else len(pool)) if index != number]
        chosen = random.Random(seed + number).sample(others, shots) if seed else others[:shots]
        yield [pool[index] for index in chosen]
