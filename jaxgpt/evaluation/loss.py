"""The loss over a validation split, per token and per byte.

Losses of models with different tokenizers compare per byte: the bits that the model would need to write the text down,
by the bytes that the text has. With ℓ the mean loss of the targets, in nats,

    bits per byte = ℓ / ln 2 · targets / (bytes of the targets' tokens)

A token's bytes are its own, also where it is a part of a character; the end of a text has none.
"""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgpt.data import loader
from jaxgpt.data.loader import Tokens
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.models import family
from jaxgpt.models.blocks import Context, Params
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Config
from jaxgpt.parallel.in_flight import in_turn
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.training.state import layout_of

AT_ONCE = 1 << 24  # tokens that are counted at once


def make_validation_loss(config: Config, tokens: loader.Tokens, sequence_length: int) -> Callable[[Params], float]:
    """Returns a function of parameters: the mean loss in nats over every token of `tokens` that has one before it.

    It takes windows of `sequence_length` that do not overlap, the last one padded with ignored targets, so that the
    mean is the same whatever the batch size. With `evaluation_batches` it takes so many batches from the beginning. The
    parameters are a train state's.
    """
    layout, batch_size = layout_of(config), config.training.batch_size

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return loader.validation_batches(
            tokens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            limit=config.training.evaluation_batches or None,
            rows=layout.own_rows(batch_size),
        )

    count = _targets(config, tokens, sequence_length)

    def loss_sum(params: Params, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
        working, scale = layout.working(params, config.compute.dtype), jax.numpy.float32(1)
        context = Context(config.model, config.compute, gather=layout.gather(config.compute.dtype))
        batch = loader.Batch(tokens, targets)
        return layout.total(next_token.loss(family(config.model), working, batch, context, scale=scale))

    sequences = PartitionSpec(AXIS)
    batch_loss = layout.jit(loss_sum, in_specs=(layout.specs(), sequences, sequences), out_specs=PartitionSpec())

    def validation_loss(params: Params) -> float:
        sums = in_turn(batch_loss(params, *layout.from_processes(batch, sequences)) for batch in batches())
        return float(np.sum(list(sums), dtype=np.float64) / count)

    return validation_loss


def bits_per_byte_of_one_nat(config: Config, tokens: Tokens, sequence_length: int, tokenizer: Tokenizer) -> float:
    """Returns the factor from the mean loss of `make_validation_loss` to bits per byte; NaN for targets of no bytes."""
    lengths = np.array([len(token) for token in tokenizer.tokens], np.int64)
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    count = _targets(config, tokens, sequence_length)
    parts = (tokens[start : min(start + AT_ONCE, count + 1)] for start in range(1, count + 1, AT_ONCE))
    total = sum(int(np.bincount(part, minlength=len(lengths)) @ lengths) for part in parts)
    return count / total / math.log(2) if total else math.nan


def _targets(config: Config, tokens: Tokens, sequence_length: int) -> int:
    """Returns the number of tokens that the validation loss is the mean over."""
    training = config.training
    there = len(tokens) - 1
    return min(there, training.evaluation_batches * training.batch_size * sequence_length or there)
