"""The multiple-choice tasks that a run is scored on while it trains."""

import time
from collections.abc import Iterator

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import multiple_choice, task_files
from jaxgpt.evaluation.multiple_choice import Result
from jaxgpt.evaluation.scoring import Scorer, make_scorer
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Config


class Tasks:
    """Reads the tasks of `evaluation.tasks`. UserError, before anything is trained, for one that can't be read."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        options = config.evaluation
        self._scorer: Scorer | None = None
        self._examples = [
            multiple_choice.load(task, path, tokenizer, config.model, limit=options.limit)
            for task, path in _named(options.tasks)
        ]

    def results(self, config: Config, params: Params) -> Iterator[tuple[Result, float]]:
        """Yields each task's result with the parameters of the train state of `config`, and the seconds it took."""
        scorer = self._scorer = self._scorer or make_scorer(config, config.evaluation.batch_size)
        for examples in self._examples:
            started = time.perf_counter()
            result = multiple_choice.evaluate(examples, scorer, params)
            yield result, time.perf_counter() - started


def _named(tasks: str) -> list[tuple[str, str]]:
    """Parses "hellaswag=a.jsonl,piqa" as [("hellaswag", "a.jsonl"), ("piqa", "")]."""
    pairs = [(name.strip(), path.strip()) for name, _, path in (part.partition("=") for part in tasks.split(","))]
    pairs = [] if pairs == [("", "")] else pairs
    for name, path in pairs:
        try:
            task_files.check_name(name, path)
        except UserError as error:
            raise UserError(f"--evaluation.tasks {tasks}: {error}") from None
    return pairs
