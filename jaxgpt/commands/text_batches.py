"""Batches of plain text and of conversations: the next-token objective's."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.commands import configuration
from jaxgpt.commands.batches import Evaluation, Setting
from jaxgpt.data import corpus
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.loader import Feeder
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.evaluation.scoring import bits_per_byte_of_one_nat, make_validation_loss
from jaxgpt.options.config import Config
from jaxgpt.training.state import TrainState


def open_source(config: Config) -> "TextSource":
    """Opens the text that the options name. UserError as `corpus.open_sources` raises it."""
    found = configuration.tokenizer_of_weights(config)
    # Such a tokenizer cuts the run's text into tokens; the options can name any other.
    own = found if isinstance(found, HuggingFace) else None
    return TextSource(*configuration.complete(config, own))


class TextSource(NamedTuple):
    """Text with its configuration; a `batches.Source`."""

    data: Corpus
    config: Config

    def about(self) -> str:
        data = self.data
        return (
            f"{data.description}, as {data.tokenizer.name} tokens: {len(data.train):,} to train on, "
            f"{len(data.validation):,} to validate on"
        )

    def afterwards(self, run: str) -> tuple[str, list[str]]:
        words = self.data.tokenizer.prompt_text(self.data.prompt).split()  # that this tokenizer is sure to know
        how = ["--chat"] if self.data.template else ["--prompt", " ".join(words[:3])] if words else []
        return "more text", ["generate", run, *how]

    def batches(self, setting: Setting) -> "TextBatches":
        return TextBatches(self.data, setting)


class TextBatches:
    """Batches of a text, which are known before any weights are; a `batches.Batches`."""

    every = 1

    def __init__(self, data: Corpus, setting: Setting):
        self.config, self.data = config, data = setting.config, data
        training = config.training
        self.tokens = training.micro_batches * training.batch_size * training.sequence_length
        self._loss = make_validation_loss(config, data.validation, training.sequence_length, setting.frozen)
        self._nat = bits_per_byte_of_one_nat(config, data.validation, training.sequence_length, data.tokenizer)

    def feed(self, first: int, rows: Sequence[int]) -> Feeder:
        return corpus.feed(self.data, self.config, first, rows)

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        loss = self._loss(state.params)
        bits = loss * self._nat
        return Evaluation(loss, {"val_bits_per_byte": bits}, f"{bits:.4f} bits per byte")

    def words(self, values: Mapping[str, float]) -> str:
        return ""

    def to_keep(self, step: int, state: TrainState) -> dict[str, Any]:
        return {}
