"""Tasks by their names: the one way in to every kind.

    hellaswag, mmlu, ... (`tasks.py`), or llm.c's .bin under any name    multiple choice
    gsm8k, or the path of a description (.toml, .json)                   answers that are drawn and compared
    ifeval                                                               instructions that are followed
    core                                                                 CORE's tasks, in a folder

They are named as in "hellaswag=val.jsonl,gsm8k=test.jsonl,core=eval_bundle": what follows the = is the task's file or
folder.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import core, descriptions, exact_match, ifeval, multiple_choice
from jaxgpt.evaluation.interface import Engine, Options, Result, Subject, Task, drawer
from jaxgpt.evaluation.scoring import Scorer, make_scorer
from jaxgpt.evaluation.tasks import TASKS
from jaxgpt.foreign_text import shown
from jaxgpt.models.blocks import Params
from jaxgpt.options.command_line import nearest
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes

NAMES = (*TASKS, *descriptions.BUILT_IN, ifeval.NAME, core.NAME)


class MultipleChoice(NamedTuple):
    """A task of `multiple_choice.py`."""

    examples: multiple_choice.Examples
    draws = False

    def results(self, engine: Engine) -> Iterator[multiple_choice.Result]:
        yield multiple_choice.evaluate(self.examples, engine.scorer, engine.params)


def load(name: str, path: str, subject: Subject, options: Options) -> Task:
    """Returns a task, read from its file or folder. UserError where it can't be."""
    check_name(name, path)
    if name == core.NAME:
        refuse_shots(name, options)
        return core.load(path, subject, options)
    if name == ifeval.NAME:
        return ifeval.load(path, subject, options)
    if _is_described(name):
        return exact_match.load(name, path, subject, options)
    tokenizer, model = subject.tokenizer, subject.model
    return MultipleChoice(multiple_choice.load(name, path, tokenizer, model, limit=options.limit, shots=options.shots))


def refuse_shots(name: str, options: Options) -> None:
    if options.shots:
        raise UserError(f"--shots {options.shots}: how many examples {name} shows is said in its {core.TASKS_FILE}")


def check_name(name: str, path: str) -> None:
    """Raises a UserError for a task that there isn't; a file of llm.c's may be of any."""
    if name in NAMES or _is_described(name) or (name and path.endswith(".bin")):
        return
    raise UserError(
        f"there is no task {shown(name)}{nearest(name, NAMES)} There are: {', '.join(NAMES)}; or name a file, .toml or "
        ".json, that describes one"
    )


def _is_described(name: str) -> bool:
    return name in descriptions.BUILT_IN or Path(name).suffix in descriptions.SUFFIXES


def parsed(tasks: str) -> list[tuple[str, str]]:
    """Parses "hellaswag=a.jsonl,piqa" as [("hellaswag", "a.jsonl"), ("piqa", "")]."""
    pairs = [(name.strip(), path.strip()) for name, _, path in (part.partition("=") for part in tasks.split(","))]
    return [] if pairs == [("", "")] else pairs


class Tasks:
    """The tasks that a run is scored on while it trains.

    Reads the tasks of `evaluation.tasks`. UserError, before anything is trained, for one that can't be read, and for
    one whose answers are drawn in a run of several processes, which would wait for the one that draws.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, template: dict[str, Any]):
        option, asked = "--evaluation.tasks", config.evaluation.tasks
        self._subject = Subject(tokenizer, config.model, template)
        self._scorer: Scorer | None = None
        self._tasks: list[Task] = []
        pairs = parsed(asked)
        for name, path in pairs:
            try:
                check_name(name, path)
            except UserError as error:
                raise UserError(f"{option} {shown(asked)}: {error}") from None
        for name, path in pairs:
            self._tasks.append(load(name, path, self._subject, Options(limit=config.evaluation.limit)))
            if self._tasks[-1].draws and processes.count() > 1:
                raise UserError(
                    f"{option} {shown(asked)}: the answers of {shown(name)} are drawn, which a run of several "
                    "processes can't do while it trains: score the run afterwards with run.py evaluate"
                )

    def results(
        self, config: Config, params: Params, frozen: Any, whole: Callable[[], Sequence[Params]]
    ) -> Iterator[tuple[Result, float]]:
        """Yields each result with the parameters of the train state of `config`, and the seconds it took.

        `whole` returns the parameters to draw with, on each device.
        """
        if not self._tasks:
            return
        size = config.evaluation.batch_size
        scorer = self._scorer = self._scorer or make_scorer(config, size, frozen)
        engine = Engine(scorer, params, drawer(whole, self._subject, config.compute, size))
        yield from timed(self._tasks, engine)


def timed(tasks: list[Task], engine: Engine) -> Iterator[tuple[Result, float]]:
    """Yields each task's results, with the seconds that each took."""
    for task in tasks:
        started = time.perf_counter()
        for result in task.results(engine):
            yield result, time.perf_counter() - started
            started = time.perf_counter()
