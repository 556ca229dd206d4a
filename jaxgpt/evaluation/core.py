"""CORE: DCLM's 22 tasks (Li et al. 2024, arXiv:2406.11794), as nanochat evaluates them, and their mean.

A folder has them, nanochat's eval_bundle:

    core.yaml               the tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
    eval_meta_data.csv      of each, in per cent, the accuracy of guessing ("Random baseline")
    eval_data/...jsonl      their examples

A text is the answered examples, an empty line behind each, and then the question. d is the delimiter, " " unless one is
given:

    multiple_choice     query d choice, for each choice. Scored are the tokens behind those that all texts begin with
    schema              context d continuation, for each context. Scored are the tokens that all texts end with
    language_modeling   context d continuation. Right where each token of the continuation is the likeliest at its place

Of several texts the one counts whose scored tokens have the least mean loss; the first, of equal ones. With b the
accuracy of guessing,

    centred accuracy = (accuracy - b) / (1 - b),    CORE = the mean of the tasks'

Examples are shuffled by the seed 1337, `limit` takes the first, and those that are shown before question i are drawn
from the others by the seed 1234 + i. Each text has the token before it with which a document begins. Too long a text
loses its beginning.
"""

import csv
import io
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt import files, foreign_text
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import multiple_choice
from jaxgpt.evaluation.interface import Engine, Options, Subject, standard_error
from jaxgpt.evaluation.scoring import Score, ScoringRequest
from jaxgpt.evaluation.task_files import RESTORE, read_lines
from jaxgpt.evaluation.tasks import Malformed, Row, number_in
from jaxgpt.foreign_text import quoted, shown

NAME = "core"
TASKS_FILE, BASELINES_FILE, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
LARGEST_YAML, LARGEST_CSV = 1 << 16, 1 << 18  # bytes
SHUFFLING, SHOWING = 1337, 1234  # seeds
AT_ONCE = 256  # questions that are tokenized and scored at once


class Item(NamedTuple):
    """A question: its texts up to the delimiter, those behind it, and which is right; all of equal number, or one."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    label: int

    def pairs(self) -> list[tuple[str, str]]:
        count = max(len(self.before), len(self.after))
        return list(
            zip(self.before * (count // len(self.before)), self.after * (count // len(self.after)), strict=True)
        )


class SubTask(NamedTuple):
    """One of CORE's tasks."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float  # accuracy of guessing, from 0 to 1
    items: list[Item]


class SubResult(NamedTuple):
    """Numbers of one of the tasks."""

    task: str
    examples: int
    accuracy: float
    standard_error: float
    centred: float
    shots: int

    def line(self) -> str:
        return (
            f"{self.task}: accuracy {self.accuracy:.4f} ± {self.standard_error:.4f}, centred {self.centred:.4f}, "
            f"{self.examples:,} examples, {self.shots} shown"
        )


class CoreResult(NamedTuple):
    """The mean of the tasks' centred accuracies."""

    task: str
    tasks: int
    examples: int
    centred: float
    standard_error: float

    def line(self) -> str:
        return f"{self.task}: centred {self.centred:.4f} ± {self.standard_error:.4f}, the mean of {self.tasks} tasks"


class Core(NamedTuple):
    """The tasks, for a model."""

    tasks: list[SubTask]
    subject: Subject
    draws = False

    def results(self, engine: Engine) -> Iterator[SubResult | CoreResult]:
        found, variance = [], 0.0
        for task in self.tasks:
            rights = list(_rights(task, self.subject, engine))
            accuracy, error, rest = sum(rights) / len(rights), standard_error(rights), 1 - task.baseline
            centred = (accuracy - task.baseline) / rest
            found.append(SubResult(f"{NAME}/{task.label}", len(rights), accuracy, error, centred, task.shots))
            variance += (error / rest) ** 2
            yield found[-1]
        mean = sum(result.centred for result in found) / len(found)
        examples = sum(result.examples for result in found)
        yield CoreResult(NAME, len(found), examples, mean, math.sqrt(variance) / len(found))


def load(path: str, subject: Subject, options: Options) -> Core:
    """Returns the tasks of a folder. UserError where a file of it is missing, or isn't as it should be."""
    folder = Path(path)
    if not path or not folder.is_dir():
        where = f"{shown(path)} is no folder" if path else "no folder is named"
        raise UserError(f"task {NAME}: {where}. Name one with {TASKS_FILE} in it: {NAME}=FOLDER")
    baselines = _baselines(folder)
    return Core([_task(folder, entry, baselines, options.limit) for entry in _entries(folder)], subject)


# Scoring


def _rights(task: SubTask, subject: Subject, engine: Engine) -> Iterator[bool]:
    """Yields whether each question is answered rightly."""
    for start in range(0, len(task.items), AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, len(task.items)))
        asked = [requests(task, number, subject) for number in numbers]
        scores = iter(engine.scorer(engine.params, [one for several in asked for one in several if one.completion]))
        for number, several in zip(numbers, asked, strict=True):
            found = [(one, next(scores) if one.completion else None) for one in several]
            if task.kind == "language_modeling":
                yield bool(found[0][1] and found[0][1].greedy)
            else:
                yield _best([_mean_loss(*one) for one in found]) == task.items[number].label


def _mean_loss(request: ScoringRequest, score: Score | None) -> float:
    """Returns the mean loss of the scored tokens; NaN where there are none, since other texts begin with all of it."""
    return math.nan if score is None else -score.log_likelihood / len(request.completion)


def _best(losses: Sequence[float]) -> int:
    """Returns the index of the least. NaN is neither more nor less than another, as in nanochat's comparison."""
    return min(range(len(losses)), key=losses.__getitem__)


def requests(task: SubTask, number: int, subject: Subject) -> list[ScoringRequest]:
    """Returns what is scored of a question; a text of which nothing is scored has an empty completion."""
    others = [index for index in range(len(task.items)) if index != number]
    examples = [task.items[index] for index in random.Random(SHOWING + number).sample(others, task.shots)]
    beginning = "".join(f"{_text(task, *example.pairs()[example.label])}\n\n" for example in examples)
    tokenizer = subject.tokenizer
    pairs = task.items[number].pairs()
    texts = [_tokens(beginning + _text(task, *pair), tokenizer) for pair in pairs]
    match task.kind:
        case "multiple_choice":
            starts = [_common(texts)] * len(texts)
        case "schema":
            ending = _common([text[::-1] for text in texts])
            starts = [len(text) - min(ending, len(text) - 1) for text in texts]
        case _:
            without = _tokens((beginning + _text(task, pairs[0][0], "")).strip(), tokenizer)
            starts = [_common([*texts, without])]
    return [_request(text, start, task, subject) for text, start in zip(texts, starts, strict=True)]


def _text(task: SubTask, before: str, after: str) -> str:
    before = before.strip() if task.kind == "language_modeling" else before
    return f"{before}{task.delimiter}{after}"


def _tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    return [multiple_choice.prefix(tokenizer), *tokenizer.encode(text).tolist()]


def _common(texts: Sequence[list[int]]) -> int:
    """Returns the number of tokens that all texts begin with."""
    shortest = min(map(len, texts))
    return next((i for i in range(shortest) if any(text[i] != texts[0][i] for text in texts)), shortest)


def _request(text: list[int], start: int, task: SubTask, subject: Subject) -> ScoringRequest:
    context, cut = subject.model.context, max(0, len(text) - subject.model.context)
    if start - cut < 1:
        raise UserError(
            f"task {NAME}/{shown(task.label)}: {len(text) - start:,} tokens of one text are to be scored, and the "
            f"model's context is {context:,}: evaluate a model with a longer context on it"
        )
    return ScoringRequest(text[cut:start], text[start:])


# The folder's files


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Returns the tasks of core.yaml."""
    path = folder / TASKS_FILE
    text = files.read_text(path, LARGEST_YAML, folder)
    try:
        tables = foreign_text.parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{shown(path)}: not YAML ({error}). {RESTORE}") from None
    found = tables.get("icl_tasks") if isinstance(tables, dict) else None
    if not (isinstance(found, list) and found and all(isinstance(entry, dict) for entry in found)):
        raise UserError(f"{shown(path)}: it has no list of tasks, icl_tasks. {RESTORE}")
    return found


def _baselines(folder: Path) -> dict[str, float]:
    """Returns the accuracy of guessing, from 0 to 1, by the tasks' labels."""
    path, found = folder / BASELINES_FILE, {}
    rows = csv.DictReader(io.StringIO(files.read_text(path, LARGEST_CSV, folder), newline=""))
    try:
        for row in rows:
            label, percent = row.get("Eval Task"), row.get("Random baseline")
            try:
                value = float(percent or "") / 100
            except ValueError:
                value = math.nan
            if not label or not 0 <= value < 1:
                where = f"line {rows.line_num}: Eval Task {quoted(label)}, Random baseline {quoted(percent)}"
                raise UserError(f"{shown(path)}: {where}; a name and per cent below 100 are expected. {RESTORE}")
            found[label] = value
    except csv.Error as error:
        raise UserError(f"{shown(path)}: not CSV ({error}). {RESTORE}") from None
    return found


def _task(folder: Path, entry: dict[str, Any], baselines: dict[str, float], limit: int) -> SubTask:
    """Returns a task with its examples, in the order in which they are asked."""
    where = shown(folder / TASKS_FILE)
    label, uri, kind = (entry.get(key) for key in ("label", "dataset_uri", "icl_task_type"))
    if not (isinstance(label, str) and label and isinstance(uri, str) and uri):
        raise UserError(f"{where}: a task without label or dataset_uri. {RESTORE}")
    if kind not in ITEMS:
        there = ", ".join(ITEMS)
        raise UserError(f"{where}: {shown(label)}: icl_task_type is {quoted(kind)}, and there are: {there}")
    shots = entry.get("num_fewshot")
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if not (isinstance(shots, str) and re.fullmatch("[0-9]{1,3}", shots)):
        raise UserError(f"{where}: {shown(label)}: num_fewshot is {quoted(shots)}, and must be a list of a number")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise UserError(f"{where}: {shown(label)}: continuation_delimiter is {quoted(delimiter)}, and must be a text")
    if label not in baselines:
        raise UserError(f"{shown(folder / BASELINES_FILE)}: it has no Random baseline of {shown(label)}. {RESTORE}")
    path = folder / DATA / uri
    items = read_lines(path, f"{NAME}/{label}", ITEMS[kind], folder)
    random.Random(SHUFFLING).shuffle(items)
    total, items = len(items), items[: limit or None]
    if len(items) <= int(shots):
        limited = f", of which a limit leaves {len(items)}" if len(items) < total else ""
        raise UserError(
            f"{shown(path)}: {total:,} examples{limited}, and {shots} others are to be shown before each one. "
            f"{'Take more' if limited else RESTORE}"
        )
    return SubTask(label, kind, int(shots), delimiter, baselines[label], items)


def _multiple_choice(row: Row) -> Item:
    return _item((_text_in(row, "query"),), _texts_in(row, "choices"), number_in(row, "gold"))


def _schema(row: Row) -> Item:
    return _item(_texts_in(row, "context_options"), (_text_in(row, "continuation"),), number_in(row, "gold"))


def _language_modeling(row: Row) -> Item:
    item = _item((_text_in(row, "context"),), (_text_in(row, "continuation"),), 0)
    if not item.after[0].strip():
        raise Malformed("the continuation is empty")
    return item


def _item(before: tuple[str, ...], after: tuple[str, ...], label: int) -> Item:
    count = max(len(before), len(after))
    if not 0 <= label < count:
        raise Malformed(f"the right one, gold, is number {label}, counted from 0, of {count}")
    return Item(before, after, label)


def _text_in(row: Row, key: str) -> str:
    """Returns a text, which the row may have as a number."""
    return _as_text(row.get(key), key)


def _texts_in(row: Row, key: str) -> tuple[str, ...]:
    values = row.get(key)
    if not (isinstance(values, list) and values):
        raise Malformed(f"{key} is {'missing' if values is None else 'not a list of texts'}")
    return tuple(_as_text(value, key) for value in values)


def _as_text(value: object, key: str) -> str:
    if isinstance(value, str) or type(value) in (int, float):
        return str(value)
    raise Malformed(f"{key} is missing" if value is None else f"{key} is {quoted(value)}, and must be a text")


ITEMS: dict[str, Callable[[Row], Item]] = {
    "multiple_choice": _multiple_choice,
    "schema": _schema,
    "language_modeling": _language_modeling,
}
