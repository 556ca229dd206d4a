"""From the options to what is trained on: the tokens of one source or several, their tokenizer, and the two splits."""

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
    prompt: np.ndarray  # what the run's samples begin with
    fingerprint: dict[str, Any]  # of the data


class Source(NamedTuple):
    """A text, or token files."""

    description: str
    tokenizer: tokenizers.Tokenizer
    train: Tokens
    validation: Tokens
    fingerprint: dict[str, Any]


def open_sources(config: Config, own: tokenizers.Tokenizer | None = None) -> dict[str, Source]:
    """Returns what is trained on, by name. UserError where there is no such text or no such files.

    `own` is a tokenizer that came with weights, and is taken in the place of the one that the options name.
    """
    return {name: _source(name, config, own) for name in weights_of(config)}


def put_together(sources: dict[str, Source], config: Config) -> Corpus:
    """Returns the corpus of these sources. The configuration has the sizes that follow from them filled in.

    UserError for a source that is too short, or has other tokens than the model or the other sources.
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
    """What is trained on, by name, and the weight of each. UserError where the mixture is not written as one."""
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
    """The batches of a run from step `first` on, of each micro-batch these sequences, made in the background.

    A token that is none of the model's raises UserError when it is its turn: what is on the disk is not read before.
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


def _source(name: str, config: Config, own: tokenizers.Tokenizer | None = None) -> Source:
    """UserError where there is no such text or they are no such files."""
    if found := shards.find(name):
        tokenizer = own if own and not found.manifest else _tokenizer_of(found, config)
        train, validation = found.train, found.validation
        known = found.manifest.shards if found.manifest else ()
        sums = {shard.file: shard.sha256 for shard in known}
        made_of = fingerprint.of_files([*train.paths, *validation.paths], sums)
        return Source(f"{len(train.paths)} token files of {name}", tokenizer, train, validation, made_of)
    text = corpora.load(name)
    tokenizer = own or tokenizers.make(config.data.tokenizer, text)
    train, validation = loader.split(tokenizer.encode(text), config.data.validation_fraction)
    return Source(corpora.describe(name), tokenizer, train, validation, fingerprint.of(text.encode()))


def _tokenizer_of(found: TokenSet, config: Config) -> tokenizers.Tokenizer:
    """Returns the tokenizer that the manifest names; of files without one, the one that the options name."""
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


def _check(name: str, source: Source, tokenizer: tokenizers.Tokenizer, config: Config) -> None:
    """UserError where a source is too short, or is not made of this tokenizer's tokens."""
    where, size = f"--data.text {name}", config.model.vocabulary_size
    if source.tokenizer.state() != tokenizer.state():
        raise UserError(
            f"--data.mixture: {name} has {source.tokenizer.name} tokens, and others have {tokenizer.name} ones, or of "
            "another vocabulary; prepare them with the same tokenizer"
        )
    loader.windows_per_epoch(len(source.train), config.training.sequence_length)  # raises for a split that is too short
    loader.validation_batches(source.validation, batch_size=1, sequence_length=1)  # and this
    loader.check_vocabulary(source.validation, size, where)
    if not isinstance(source.train, Shards):
        loader.check_vocabulary(source.train, size, where)


def _prompt(config: Config, tokenizer: tokenizers.Tokenizer, validation: Tokens) -> np.ndarray:
    """`run.prompt`, or the beginning of the validation split's first line."""
    if config.run.prompt:
        return tokenizer.encode(config.run.prompt)
    beginning = tokenizer.decode(validation[:200])
    lines = [line for line in files.text_lines(beginning)[1:] if line.strip()]
    return tokenizer.encode(lines[0] if lines else beginning)[: config.model.context // 4 + 1]
