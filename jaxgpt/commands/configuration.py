"""Completes the options that a user gives to a configuration in which nothing is left open.

1. The model's shape and the tokenizer come from the weights that a run begins with (`init_from.with_shape`).
2. The vocabulary's size and the token between documents come from the tokenizer, the sequences' length from the model:
   `complete` with the text, `without_text` where only the sizes are wanted.
3. What each machine decides for itself comes last: the attention kernel (`with_attention`), and the recompute level
   (`training/memory_plan.py`, which compiles the train step to know it). A run's config.toml keeps what was asked for.
"""

import dataclasses

from jaxgpt.data import corpus, tokenizers
from jaxgpt.data.corpus import Corpus
from jaxgpt.errors import UserError
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.models import family
from jaxgpt.options.config import Config


def complete(config: Config, own: tokenizers.Tokenizer | None = None) -> tuple[Corpus, Config]:
    """Returns the text, and the configuration with the sizes that follow from it. UserError as the text raises it.

    With `own`, a tokenizer that came with weights, the tokenizer that the options name is not used.
    """
    sources = corpus.open_sources(config, own)
    config = resolve(config, next(iter(sources.values())).tokenizer)
    return corpus.put_together(sources, config), config


def without_text(config: Config) -> Config:
    """Returns the configuration with its sizes, reading the text only where the tokenizer depends on it."""
    if config.data.tokenizer == "characters":
        return resolve(config, next(iter(corpus.open_sources(config).values())).tokenizer)
    return resolve(config, tokenizers.make(config.data.tokenizer, ""))


def resolve(config: Config, tokenizer: tokenizers.Tokenizer) -> Config:
    """Returns the vocabulary size from the tokenizer and the sequence length from the context, where they are 0."""
    vocabulary_size = config.model.vocabulary_size or tokenizer.vocabulary_size
    sequence_length = config.training.sequence_length or config.model.context
    document_start = config.model.document_start
    if config.data.document_mask:
        if tokenizer.end_of_text is None:
            raise UserError(
                f"--data.document-mask: the tokenizer {tokenizer.name} has no token that stands before a document; "
                "gpt2 has one, and so have most"
            )
        document_start = tokenizer.end_of_text
    model = dataclasses.replace(config.model, vocabulary_size=vocabulary_size, document_start=document_start)
    family(model).check(model)
    return dataclasses.replace(
        config,
        model=model,
        training=dataclasses.replace(config.training, sequence_length=sequence_length),
    )


def with_attention(config: Config) -> tuple[Config, str]:
    """Returns the configuration with the attention that runs on this machine, and a line that describes it."""
    compute, words = choose_attention(config.model, config.compute, config.training.sequence_length)
    return dataclasses.replace(config, compute=compute), words
