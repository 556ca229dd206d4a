"""The tasks: from the rows of their public files to questions.

The prompts are those of EleutherAI's lm-evaluation-harness (0.4.13, without examples before the question), so that
scores compare with the published ones. A row is an object of a JSON line as the task's authors published it, or of the
same data on the Hugging Face hub, which differ in places.

    hellaswag       Zellers et al. 2019, arXiv:1905.07830. "ACTIVITY: CTX_A CTX_B" and an ending
    hellaswag_llmc  the same as llm.c asks it: the context as it is, without the activity
    mmlu            Hendrycks et al. 2021, arXiv:2009.03300. The four answers are in the question, and a letter follows
    arc_easy, arc_challenge    Clark et al. 2018, arXiv:1803.05457. "Question: ...\\nAnswer:" and an answer
    piqa            Bisk et al. 2020, arXiv:1911.11641. The same form
    winogrande      Sakaguchi et al. 2020, arXiv:1907.10641. Each option is put in the blank, and what comes after it is
                    scored ("partial evaluation", Trinh and Le 2018, arXiv:1806.02847)
    openbookqa      Mihaylov et al. 2018, arXiv:1809.02789. The question and an answer
    lambada         Paperno et al. 2016, arXiv:1606.06031. A passage, and its last word, all of whose tokens must be the
                    likeliest at their places
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgpt.foreign_text import quoted, shown

LETTERS = "ABCD"


class Question(NamedTuple):
    """A context for each choice and what is scored after it, which begins with the space between them."""

    contexts: tuple[str, ...]
    completions: tuple[str, ...]
    label: int  # the right one


Row = Mapping[str, Any]


class Malformed(Exception):
    """An error in a row; its text says what is wrong."""


@dataclass(frozen=True)
class Task:
    """A task: its form, and where its evaluation split is.

    greedy: it is right if the only completion's tokens are the likeliest, rather than if the best choice is the right
    repository, part: on the Hugging Face hub, where the data lie as PART/0000.parquet
    examples: how many the split has
    """

    question: Callable[[Row], Question]
    repository: str
    part: str
    examples: int
    greedy: bool = False


def _asked(contexts: str | list[str], choices: list[str], label: int) -> Question:
    """Returns the question with a space between each context and its choice."""
    if isinstance(contexts, str):
        contexts = [contexts] * len(choices)
    if not 0 <= label < len(choices):
        raise Malformed(f"the right choice is number {label}, counted from 0, of {len(choices)}")
    if any(not context.strip() for context in contexts):
        raise Malformed("the question is empty")
    return Question(tuple(contexts), tuple(f" {choice}" for choice in choices), label)


def text_in(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise Malformed(f"{key} is missing" if value is None else f"{key} is {quoted(value)}, and must be a text")
    return value


def texts_in(row: Row, key: str) -> list[str]:
    value = row.get(key)
    if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        raise Malformed(f"{key} is missing" if value is None else f"{key} is not a list of texts")
    return value


def number_in(row: Row, key: str) -> int:
    """Returns an integer, which the row may have as a text."""
    value = row.get(key)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    if type(value) is not int:
        raise Malformed(
            f"{key} " + ("is missing" if value in (None, "") else f"is {quoted(value)}, and must be a number")
        )
    return value


def _without_brackets(text: str) -> str:
    """Returns the text without what WikiHow's layout left in it: "[header]", "[title]", "[step]"."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Question:
    """Returns a row's question.

    A context in one piece (ctx alone) is taken as it is: its second part isn't capitalised.
    """
    parts = "ctx_a" in row
    context = f"{text_in(row, 'ctx_a')} {text_in(row, 'ctx_b').capitalize()}" if parts else text_in(row, "ctx")
    endings = [_without_brackets(ending) for ending in texts_in(row, "endings")]
    return _asked(_without_brackets(f"{text_in(row, 'activity_label')}: {context}"), endings, number_in(row, "label"))


def _hellaswag_llmc(row: Row) -> Question:
    return _asked(text_in(row, "ctx"), texts_in(row, "endings"), number_in(row, "label"))


def _mmlu(row: Row) -> Question:
    choices = texts_in(row, "choices")
    if len(choices) != len(LETTERS):
        raise Malformed(f"there are {len(choices)} choices, and must be {len(LETTERS)}")
    answer = row.get("answer")
    label = LETTERS.index(answer) if isinstance(answer, str) and answer in [*LETTERS] else number_in(row, "answer")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    asked = "\n".join([text_in(row, "question").strip(), *lines, "Answer:"])
    shown = [_mmlu(example) for example in row.get("shown", ())]  # with their answers, before the question
    answered = [f"{example.contexts[0]}{example.completions[example.label]}\n\n" for example in shown]
    subject, heading = row.get("subject"), ""
    if isinstance(subject, str):  # the examples that are shown have none, and so no heading
        name = subject.replace("_", " ")
        heading = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    return _asked(f"{heading}{''.join(answered)}{asked}", [*LETTERS], label)


def _piqa(row: Row) -> Question:
    choices = [text_in(row, "sol1"), text_in(row, "sol2")]
    return _asked(f"Question: {text_in(row, 'goal')}\nAnswer:", choices, number_in(row, "label"))


def _winogrande(row: Row) -> Question:
    before, blank, after = text_in(row, "sentence").partition("_")
    if not blank:
        raise Malformed("the sentence has no blank (_)")
    options = [text_in(row, "option1"), text_in(row, "option2")]
    return _asked([before + option for option in options], [after.strip()] * 2, number_in(row, "answer") - 1)


def _stem_and_choices(row: Row, stem: str) -> tuple[str, list[str], int]:
    """Returns the question, the choices and the right one's index of a row in the AI2's form.

    That is {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, or on the hub, where `stem` names the
    question's text, {stem, "choices": {"text": [], "label": []}, "answerKey"}.
    """
    question = row.get("question")
    if isinstance(question, dict):
        choices = question.get("choices")
        if not (isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)):
            raise Malformed("question.choices is not a list of objects")
        text = text_in(question, "stem")
        named = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    else:
        text, named = text_in(row, stem), row.get("choices")
        if not isinstance(named, dict):
            raise Malformed("choices is missing, or not an object")
    answers, labels, key = texts_in(named, "text"), texts_in(named, "label"), text_in(row, "answerKey").strip()
    if key not in labels or len(labels) != len(answers):
        raise Malformed(f"answerKey {quoted(key)} is not among the choices' labels, {shown(', '.join(labels))}")
    return text, answers, labels.index(key)


def _arc(row: Row) -> Question:
    stem, choices, label = _stem_and_choices(row, "question")
    return _asked(f"Question: {stem}\nAnswer:", choices, label)


def _openbookqa(row: Row) -> Question:
    return _asked(*_stem_and_choices(row, "question_stem"))


def _lambada(row: Row) -> Question:
    context, _, word = text_in(row, "text").rpartition(" ")
    return _asked(context, [word], 0)


TASKS = {
    "hellaswag": Task(_hellaswag, "Rowan/hellaswag", "default/validation", 10_042),
    "hellaswag_llmc": Task(_hellaswag_llmc, "Rowan/hellaswag", "default/validation", 10_042),
    "mmlu": Task(_mmlu, "cais/mmlu", "all/test", 14_042),
    "arc_easy": Task(_arc, "allenai/ai2_arc", "ARC-Easy/test", 2_376),
    "arc_challenge": Task(_arc, "allenai/ai2_arc", "ARC-Challenge/test", 1_172),
    "piqa": Task(_piqa, "ybisk/piqa", "plain_text/validation", 1_838),
    "winogrande": Task(_winogrande, "allenai/winogrande", "winogrande_xl/validation", 1_267),
    "openbookqa": Task(_openbookqa, "allenai/openbookqa", "main/test", 500),
    "lambada": Task(_lambada, "EleutherAI/lambada_openai", "default/test", 5_153, greedy=True),
}
