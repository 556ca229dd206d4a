"""Comparisons that a run trains on: a reward model, or a model by preferences (DPO and its relatives).

The comparisons are tokenized when the run starts, with the tokenizer and the chat template of the weights that it
begins with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.commands import configuration
from jaxgpt.commands.batches import Batches, Setting
from jaxgpt.commands.comparison_batches import ComparisonData
from jaxgpt.commands.preference_batches import PreferenceBatches
from jaxgpt.commands.reward_batches import RewardBatches
from jaxgpt.data import chat_templates, comparisons, corpora, fingerprint, loader, sources, tokenizers
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
    tokenizer, template, notes = _language(config)
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
        fingerprint=_fingerprint(paths),
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


def _language(config: Config) -> tuple[Tokenizer, Template, list[str]]:
    """Returns the tokenizer and the template of the weights to begin with, and lines about them to print."""
    name = config.training.init_from
    tokenizer = configuration.tokenizer_of_weights(config)
    if tokenizer is None:
        if config.data.tokenizer == "characters":
            raise UserError(f"--init-from {shown(name)} names no tokenizer: name it with --data.tokenizer")
        tokenizer = tokenizers.make(config.data.tokenizer, "")
    if state := configuration.template_of_weights(config):
        return tokenizer, chat_templates.from_state(state), []
    note = f"{name} has no chat template: its texts are written in ChatML"
    return tokenizer, chat_templates.built_in("chatml"), [note]


def _prompt(config: Config, template: Template, tokenizer: Tokenizer, held_out: list[Ranking]) -> np.ndarray:
    """Returns the tokens of `run.prompt` as a question, or of the first prompt that is held out."""
    if config.run.prompt:
        ids = chat_templates.question(config.run.prompt, template.state(), tokenizer)
        loader.check_vocabulary(ids, config.model.vocabulary_size, "--run.prompt")
        return ids
    text = held_out[0][0]
    return text.tokens[: int(np.argmax(text.answer))]


def _fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--data.text: two of the files have the name {shown(twice)}; give them different ones")
    return fingerprint.of_files(paths, {})
