"""The corpus that the options name: tokens of one source or several, their tokenizer, and the two splits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.data import corpora, fingerprint, loader, manifest, shards, tokenizers
from jaxgpt.data.feeder import Feeder
from jaxgpt.data.loader import Tokens
from jaxgpt.data.shards import Shards, TokenSet
from jaxgpt.errors import UserError
from jaxgpt.options.config import Config


class Corpus(NamedTuple):
    description: str
    tokenizer: tokenizers.Tokenizer
    train: Tokens | loader.Mixture
    validation: Tokens
    prompt: np.ndarray  # tokens that the run's samples begin with
    fingerprint: dict[str, Any]  # of the data, as `fingerprint.difference` compares it


class TextSource(NamedTuple):
    """A text or a set of token files, with its tokenizer and its two splits."""

    description: str
    tokenizer: tokenizers.Tokenizer
    train: Tokens
    validation: Tokens
    fingerprint: dict[str, Any]


def open_sources(config: Config, own: tokenizers.Tokenizer | None = None) -> dict[str, TextSource]:
    """Opens the sources that the options name, by name.

    Args:
        config: The options.
        own: The tokenizer that came with weights; it replaces the one that the options name.

    Raises:
        UserError: There is no such text or no such token files.
    """
    return {name: _source(name, config, own) for name in weights_of(config)}


def put_together(sources: dict[str, TextSource], config: Config) -> Corpus:
    """Returns the corpus of these sources.

    Args:
        sources: As `open_sources` returns them.
        config: The options, with the sizes that follow from the sources already filled in.

    Raises:
        UserError: A source is too short, has another tokenizer than the others, or a token that the model doesn't have.
    """
    tokenizer = next(iter(sources.values())).tokenizer
    for name, source in sources.items():
        _check(name, source, tokenizer, config)
    if len(sources) == 1:
        ((description, _, train, validation, made_of),) = sources.values()
    else:
        train = loader.mixture([source.train for source in sources.values()], list(weights_of(config).values()))
        validation = np.concatenate([source.validation[:] for source in sources.values()])
        shares = zip(train.quotas, sources.values(), strict=True)
        description = " and ".join(f"{quota / loader.ROUND:.1%} {source.description}" for quota, source in shares)
        made_of = {"quotas": list(train.quotas), "sources": [source.fingerprint for source in sources.values()]}
    prompt = _prompt(config, tokenizer, validation)
    loader.check_vocabulary(prompt, config.model.vocabulary_size, "--run.prompt")
    return Corpus(description, tokenizer, train, validation, prompt, made_of)


def weights_of(config: Config) -> dict[str, float]:
    """Returns the weight of each source by its name. UserError for an option `data.mixture` that can't be parsed."""
    if not config.data.mixture:
        return {config.data.text: 1.0}
    weights: dict[str, float] = {}
    for part in config.data.mixture.split(","):
        name, _, weight = part.strip().rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
        if not name or not 0 < weights[name] < float("inf"):
            raise UserError(
                f"--data.mixture: {part.strip()!r} is not a source and its weight above 0; write it as "
                "data/web=0.8, data/books=0.2"
            )
    return weights


def feed(data: Corpus, config: Config, first: int, rows: Sequence[int]) -> Feeder:
    """Returns a feeder of a run's batches, which are made in the background.

    A token outside the model's vocabulary raises a UserError with the batch that contains it: tokens on the disk are
    not read earlier.

    Args:
        data: The corpus.
        config: The run's options.
        first: The first step whose batch is made.
        rows: The sequences of each micro-batch that are wanted, as in `loader.batch_at`.
    """
    training = config.training

    def make(step: int) -> loader.Batch:
        batch = loader.batch_at(
            data.train,
            step=step,
            micro_batches=training.micro_batches,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            seed=training.seed,
            rows=rows,
        )
        for tokens in batch:
            loader.check_vocabulary(tokens.reshape(-1), config.model.vocabulary_size, f"the batch of step {step + 1}")
        return batch

    return Feeder(make, first)


def _source(name: str, config: Config, own: tokenizers.Tokenizer | None = None) -> TextSource:
    """Opens one source. UserError where there is no such text or no such token files."""
    if found := shards.find(name):
        tokenizer = own if own and not found.manifest else _tokenizer_of(found, config)
        train, validation = found.train, found.validation
        known = found.manifest.shards if found.manifest else ()
        sums = {shard.file: shard.sha256 for shard in known}
        made_of = fingerprint.of_files([*train.paths, *validation.paths], sums)
        return TextSource(f"{len(train.paths)} token files of {name}", tokenizer, train, validation, made_of)
    text = corpora.load(name)
    tokenizer = own or tokenizers.make(config.data.tokenizer, text)
    train, validation = loader.split(tokenizer.encode(text), config.data.validation_fraction)
    return TextSource(corpora.describe(name), tokenizer, train, validation, fingerprint.of(text.encode()))


def _tokenizer_of(found: TokenSet, config: Config) -> tokenizers.Tokenizer:
    """Returns the manifest's tokenizer; for files without a manifest, the tokenizer that the options name."""
    if found.manifest:
        tokenizer, stated = tokenizers.from_state(found.manifest.tokenizer), found.manifest.vocabulary_size
        if tokenizer.vocabulary_size != stated:
            raise UserError(
                f"{found.train.paths[0].parent / manifest.NAME} is damaged: it says {stated:,} tokens, and its "
                f"tokenizer {tokenizer.name} has {tokenizer.vocabulary_size:,}; restore it from a copy, or prepare the "
                "data anew"
            )
        return tokenizer
    if config.data.tokenizer == "characters":
        raise UserError("--data.tokenizer characters: token files without a manifest don't say which characters")
    return tokenizers.make(config.data.tokenizer, "")


def _check(name: str, source: TextSource, tokenizer: tokenizers.Tokenizer, config: Config) -> None:
    """Raises a UserError where a source is too short, or is not made of this tokenizer's tokens."""
    where, size = f"--data.text {name}", config.model.vocabulary_size
    if source.tokenizer.state() != tokenizer.state():
        raise UserError(
            f"--data.mixture: {name} has {source.tokenizer.name} tokens, and others have {tokenizer.name} ones, or of "
            "another vocabulary; prepare them with the same tokenizer"
        )
    loader.windows_per_epoch(len(source.train), config.training.sequence_length)  # raises for a short split
    loader.validation_batches(source.validation, batch_size=1, sequence_length=1)  # likewise
    loader.check_vocabulary(source.validation, size, where)
    if not isinstance(source.train, Shards):
        loader.check_vocabulary(source.train, size, where)


def _prompt(config: Config, tokenizer: tokenizers.Tokenizer, validation: Tokens) -> np.ndarray:
    """Returns the tokens of `run.prompt`, or else of the beginning of a line of the validation split."""
    if config.run.prompt:
        return tokenizer.encode(config.run.prompt)
    beginning = tokenizer.decode(validation[:200])
    lines = [line for line in files.text_lines(beginning)[1:] if line.strip()]
    return tokenizer.encode(lines[0] if lines else beginning)[: config.model.context // 4 + 1]
