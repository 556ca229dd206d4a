"""Comparisons that a run trains on: a reward model, or a model by preferences (DPO and its relatives).

The comparisons are tokenized when the run starts, with the tokenizer and the chat template of the weights that it
begins with.
"""

from typing import NamedTuple

import numpy as np

from jaxgpt.commands import configuration
from jaxgpt.commands.batches import Batches, Setting
from jaxgpt.commands.comparison_batches import ComparisonData, PreferenceBatches, RewardBatches
from jaxgpt.data import chat_templates, comparisons, corpora, fingerprint, loader, sources
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.comparisons import Ranking
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options.config import Config


def open_source(config: Config) -> "ComparisonSource":
    """Reads the comparisons that the options name.

    UserError where there are none, and for options that aren't theirs.
    """
    _check(config)
    tokenizer, template, notes = configuration.language(config)
    config = configuration.resolve(config, tokenizer, conversations=False)
    length = config.training.sequence_length
    paths = list(sources.here(sources.find((config.data.text,))))
    found = comparisons.read(paths, template, tokenizer, length, config.data.skip_bad, "--data.skip-bad")
    try:
        train, held_out = comparisons.split(found.rankings, config.data.validation_fraction)
    except UserError as error:
        raise UserError(f"--data.text {shown(config.data.text)}: {error}") from None
    for text in (text for ranking in found.rankings for text in ranking):
        loader.check_vocabulary(text.tokens, config.model.vocabulary_size, f"--data.text {shown(config.data.text)}")
    more = sum(len(ranking) > config.objective.completions for ranking in train)
    draws = not config.objective.scalar_head
    if more and not draws:
        notes.append(
            f"of {more:,} of the comparisons only the best {config.objective.completions} texts are taken "
            "(--objective.completions)"
        )
    data = ComparisonData(
        description=config.data.text,
        tokenizer=tokenizer,
        prompt=_prompt(config, template, tokenizer, held_out) if draws else None,
        fingerprint=fingerprint.of_lines(paths),
        template=template.state(),
        notes=(*notes, *found.words(length)),
        train=train,
        held_out=held_out,
    )
    return ComparisonSource(data, config)


class ComparisonSource(NamedTuple):
    """Comparisons with their configuration; a `batches.Source`."""

    data: ComparisonData
    config: Config

    def about(self) -> str:
        data = self.data
        return (
            f"{data.description}, as {data.tokenizer.name} tokens: {len(data.train):,} comparisons to train on, "
            f"{len(data.held_out):,} to validate on"
        )

    def afterwards(self, run: str) -> tuple[str, list[str]]:
        if self.data.prompt is None:
            drawn = ["generate", self.config.training.init_from, "--prompt", self.config.run.prompt or "Hello"]
            return "best of 8", [*drawn, "--best-of", "8", "--reward-model", run]
        return "more text", ["generate", run, "--chat"]

    def batches(self, setting: Setting) -> Batches:
        return (RewardBatches if self.data.prompt is None else PreferenceBatches)(self.data, setting)


def _check(config: Config) -> None:
    """Raises a UserError for options without which there are no comparisons, or which are not theirs."""
    name = config.objective.name
    if not config.training.init_from:
        raise UserError(
            f"--objective.name {name} goes on from a model that was fine-tuned on conversations: name its run or its "
            "weights with --init-from"
        )
    for option, given in (("mixture", config.data.mixture), ("document_mask", config.data.document_mask)):
        if given:
            raise UserError(f"--data.{option.replace('_', '-')} is of plain text: leave it away with comparisons")
    if config.data.text in (*corpora.NAMES, *sources.DATA_SETS):
        raise UserError(
            f"--data.text is {config.data.text}, and --objective.name {name} is trained on comparisons: name a file of "
            'JSON lines such as {"prompt": "...", "chosen": "...", "rejected": "..."}'
        )


def _prompt(config: Config, template: Template, tokenizer: Tokenizer, held_out: list[Ranking]) -> np.ndarray:
    """Returns the tokens of `run.prompt` as a question, or of the first prompt that is held out."""
    if config.run.prompt:
        ids = chat_templates.question(config.run.prompt, template.state(), tokenizer)
        loader.check_vocabulary(ids, config.model.vocabulary_size, "--run.prompt")
        return ids
    text = held_out[0][0]
    return text.tokens[: int(np.argmax(text.answer))]
