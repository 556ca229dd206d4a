"""From the options to what is trained on: the text, its tokenizer, and the two splits."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data import loader, texts, tokenizers
from jaxgpt.errors import UserError
from jaxgpt.training import fingerprint

NOT_YET = {"fineweb": "the FineWeb data set"}


class Corpus(NamedTuple):
    description: str
    tokenizer: tokenizers.Tokenizer
    train: np.ndarray
    validation: np.ndarray
    prompt: np.ndarray  # what the run's samples begin with
    fingerprint: dict[str, Any]  # of the text


def load(config: Config) -> tuple[Corpus, Config]:
    """The corpus, and the configuration with the sizes that follow from it filled in. UserError as the data raise."""
    if config.data.text in NOT_YET:
        raise UserError(
            f"--data.text {config.data.text}: this version can't read {NOT_YET[config.data.text]} yet. "
            "--config gpt2_124m trains the same model on text that needs no download, and --data.text takes the "
            "path of any UTF-8 text file"
        )
    text = texts.load(config.data.text)
    tokenizer = tokenizers.make(config.data.tokenizer, text)
    config = resolve(config, tokenizer)
    tokens = tokenizer.encode(text)
    loader.check_vocabulary(tokens, config.model.vocabulary_size, f"--data.text {config.data.text}")
    train, validation = loader.split(tokens, config.data.validation_fraction)
    loader.windows_per_epoch(len(train), config.training.sequence_length)  # raises for a split that is too short
    loader.validation_batches(validation, batch_size=1, sequence_length=1)  # and this
    prompt = _prompt(config, tokenizer, validation)
    loader.check_vocabulary(prompt, config.model.vocabulary_size, "--run.prompt")
    description, content = texts.describe(config.data.text), text.encode()
    return Corpus(description, tokenizer, train, validation, prompt, fingerprint.of(content)), config


def resolve_without_text(config: Config) -> Config:
    """`resolve`, reading the text only where the tokenizer depends on it."""
    text = texts.load(config.data.text) if config.data.tokenizer == "characters" else ""
    return resolve(config, tokenizers.make(config.data.tokenizer, text))


def resolve(config: Config, tokenizer: tokenizers.Tokenizer) -> Config:
    """The vocabulary size from the tokenizer and the sequence length from the context, where they are 0."""
    vocabulary_size = config.model.vocabulary_size or tokenizer.vocabulary_size
    sequence_length = config.training.sequence_length or config.model.context
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocabulary_size=vocabulary_size),
        training=dataclasses.replace(config.training, sequence_length=sequence_length),
    )


def _prompt(config: Config, tokenizer: tokenizers.Tokenizer, validation: np.ndarray) -> np.ndarray:
    """`run.prompt`, or the beginning of the validation split's first line."""
    if config.run.prompt:
        return tokenizer.encode(config.run.prompt)
    beginning = tokenizer.decode(validation[:200])
    lines = [line for line in beginning.splitlines()[1:] if line.strip()]
    return tokenizer.encode(lines[0] if lines else beginning)[: config.model.context // 4 + 1]
