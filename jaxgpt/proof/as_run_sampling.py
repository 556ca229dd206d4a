"""Chooses what of a large run is checked: all that the oracle's memory and time allow. What is left out is said.

The oracle keeps every parameter, and what a layer computes, in float64. Where that is too much, a run gives up in this
order: micro-batches beyond two, sequences beyond one a device, layers beyond two, tokens of a sequence, and tokens of
the vocabulary. Widths, heads, dtypes, kernels, shards and devices are the run's own.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.models import family
from jaxgpt.models.blocks import are_stacked
from jaxgpt.objectives import objective
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.parallel import mesh
from jaxgpt.training.state import layout_of

COPIES = 8  # of all parameters in float64: the oracle's, its gradients and their sum, and the step's state beside them
OF_A_BLOCK = 40  # numbers as wide as the stream that autodiff keeps of a token in a layer, beside the MLP's and scores
OF_AN_MLP = 8  # as wide as the MLP
OF_SCORES = 4  # for each token that is attended to, of each head
OF_LOGITS = 6  # as many as the vocabulary has tokens
WORK = 3e11  # operations for each input and processor: about 20 seconds
FEW_LAYERS, FEW_TOKENS, SMALL_VOCABULARY = 2, 256, 4096


class Sample(NamedTuple):
    config: Config
    left_out: list[str]  # in words; empty where all of the run is checked


def sample(config: Config, memory: int, processors: int) -> Sample:
    """Returns what can be checked with so many bytes and processors. UserError where not even the least can be."""
    words: list[str] = []
    found = config
    for smaller, what in _smaller(config):
        if _bytes(found) <= memory and _work(found) <= WORK * processors:
            return Sample(found, words)
        changed = smaller(found)
        if changed != found:
            found = changed
            words.append(what)
    if _bytes(found) > memory:
        raise UserError(
            f"jax.grad in float64 would need about {_bytes(found) / 2**30:.0f} GiB for {FEW_LAYERS} layers of this "
            f"model, and this machine has {memory / 2**30:.0f} GiB. Check a smaller config: the layers are the same"
        )
    return Sample(found, words)


def _smaller(config: Config) -> Iterator[tuple]:
    """Yields functions that make a configuration smaller, the least harm first, and what each leaves out."""
    model, training = config.model, config.training
    rows = mesh.SHARDS if config.parallel.reproducible else mesh.make(config.parallel).size
    tokens = min(training.sequence_length, max(FEW_TOKENS, 2 * config.compute.attention_block))
    yield (
        lambda config: changed(config, training={"micro_batches": min(2, training.micro_batches)}),
        f"2 of {training.micro_batches} micro-batches",
    )
    yield (
        lambda config: changed(config, training={"batch_size": rows}),
        f"{rows} of {training.batch_size} sequences of a micro-batch",
    )
    yield (
        lambda config: _with_layers(config, min(FEW_LAYERS, model.layers)),
        f"{FEW_LAYERS} of {model.layers} layers",
    )
    yield (
        lambda config: changed(config, training={"sequence_length": tokens}),
        f"{tokens} of {training.sequence_length:,} tokens of a sequence",
    )
    size = min(SMALL_VOCABULARY, model.vocabulary_size)
    start = min(model.document_start, size - 1)
    yield (
        lambda config: changed(config, model={"vocabulary_size": size, "document_start": start}),
        f"{size:,} of {model.vocabulary_size:,} tokens of the vocabulary",
    )


def _with_layers(config: Config, layers: int) -> Config:
    """Returns the configuration of fewer layers, which are scanned or unrolled as the whole model's would be."""
    form = "scanned" if are_stacked(layout_of(config).shapes.blocks) else "unrolled"
    return changed(config, model={"layers": layers}, compute={"layers": form})


def _bytes(config: Config) -> float:
    """Estimates the memory of the oracle and of the step beside it."""
    model, training = config.model, config.training
    parameters = family(model).parameter_count(model, padded=True)
    tokens = training.batch_size // mesh.make(config.parallel).size * training.sequence_length * _texts(config)
    mlp = (model.feed_forward or 4 * model.width) * (model.experts_per_token if model.experts else 1)
    layer = OF_A_BLOCK * model.width + OF_AN_MLP * mlp + OF_SCORES * model.heads * training.sequence_length
    logits = OF_LOGITS * model.padded_vocabulary_size
    return 8 * (COPIES * parameters + tokens * (model.layers * layer + logits))


def _work(config: Config) -> float:
    """Estimates the operations of the oracle for one input."""
    model, training = config.model, config.training
    tokens = training.micro_batches * training.batch_size * training.sequence_length * _texts(config)
    return tokens * family(model).flops_per_token(model, training.sequence_length)


def _texts(config: Config) -> int:
    return objective(config).shapes(config).tokens.shape[2] if config.objective.texts > 1 else 1
