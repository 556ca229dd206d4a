"""Log-likelihoods of texts: of a text's continuation, of which multiple-choice tasks are made, and a split's loss.

    score = Σ_t log p(completion_t | context, completion_<t)

Sequences are sorted by length and padded to one of a few lengths, so that one program for each of these lengths scores
any task. Padding comes after the sequence, and causal attention sees none of it. Each device scores batches of
the same shape whatever the number of devices is, and the last batch of a length is filled up with ignored targets, so
that scores don't depend on the batch size or on the devices but for rounding.

Losses of models with different tokenizers compare per byte: the bits that the model would need to write the text down,
by the bytes that the text has. With ℓ the mean loss of the targets, in nats,

    bits per byte = ℓ / ln 2 · targets / (bytes of the targets' tokens)

A token's bytes are its own, also where it is a part of a character; the end of a text has none.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.data import loader
from jaxgpt.data.loader import Tokens
from jaxgpt.data.packing import Conversations
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.kernels.choose import anywhere
from jaxgpt.layers import cross_entropy, unembedding
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import family, with_scalar
from jaxgpt.models.blocks import Params, inputs_of
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Config, Model
from jaxgpt.options.settings import changed
from jaxgpt.parallel.mesh import AXIS, in_turn
from jaxgpt.training.state import layout_of, working

SHORTEST = 32  # tokens that a sequence is padded to, at least
CHUNK = 128  # tokens whose logits exist at once
AT_ONCE = 1 << 24  # tokens whose bytes are counted at once


class ScoringRequest(NamedTuple):
    """Token ids; neither is empty."""

    context: Sequence[int]
    completion: Sequence[int]


class Score(NamedTuple):
    log_likelihood: float  # of the whole completion, in nats
    greedy: bool  # whether each of its tokens is the likeliest at its place


Scorer = Callable[[Params, Sequence[ScoringRequest]], list[Score]]


def padded_length(length: int, context: int) -> int:
    """Returns the least of 32, 48, 64, 96, 128, 192, ... that is no less than `length`, at most the model's context.

    These are powers of two and the middles between them.
    """
    power = SHORTEST
    while 2 * power <= length:
        power *= 2
    fits = next(size for size in (power, power * 3 // 2, 2 * power) if size >= length)
    return min(fits, context)


def make_scorer(config: Config, batch_size: int, frozen: Any = None) -> Scorer:
    """Returns a function of parameters, as `config`'s train state has them, and requests: their scores, in their order.

    `frozen` is what the train step has as frozen.

    A context that is too long for the model loses its beginning; a completion is at most as long as the model's
    context. Each device scores `batch_size` sequences at once.
    """
    config = changed(config, compute=anywhere(config.compute))
    model, layout = config.model, layout_of(config)

    def batch_scores(
        params: Params, frozen: Any, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
    ) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        params, context = working(params, frozen, config, layout)
        params = with_scalar.model_of(params) if config.objective.scalar_head else params
        x, _, _ = family(model).features(params, inputs_of(tokens, model), context)
        losses, likeliest = _of_tokens(family(model).head(params), x, targets.reshape(-1), model)
        losses, likeliest = losses.reshape(targets.shape), likeliest.reshape(targets.shape)
        scores = -jnp.sum(losses, axis=1), jnp.all(likeliest | (targets == cross_entropy.IGNORED), axis=1)
        return scores if layout.devices == 1 else lax.all_gather(scores, AXIS, tiled=True)

    sequences, whole = PartitionSpec(AXIS), PartitionSpec()
    program = layout.jit(batch_scores, in_specs=(layout.specs(), whole, sequences, sequences), out_specs=(whole, whole))
    rows = batch_size * layout.devices
    own = layout.own_rows(rows)

    def scorer(params: Params, requests: Sequence[ScoringRequest]) -> list[Score]:
        # As tuples they can be compared: equal requests are scored once, and so are equal to the last bit.
        places = [ScoringRequest(tuple(context), tuple(completion)) for context, completion in requests]
        parts = [
            (length, group[start : start + rows])
            for length, group in _by_length(places, model.context).items()
            for start in range(0, len(group), rows)
        ]

        def dispatched() -> Iterator[tuple[Array, Array]]:
            for length, part in parts:
                batch = tuple(array[own] for array in _batch(part, rows, length, model.context))
                yield program(params, frozen, *layout.from_processes(batch, sequences))

        found: dict[ScoringRequest, Score] = {}
        for (_, part), (values, greedy) in zip(parts, in_turn(dispatched()), strict=True):
            found |= {
                request: Score(float(value), bool(all_greedy))
                for request, value, all_greedy in zip(part, values, greedy, strict=False)
            }
        return [found[request] for request in places]

    return scorer


def _of_tokens(
    head: unembedding.Params, x: Float[Array, "N C"], targets: Int[Array, " N"], model: Model
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """Returns each target's loss, and whether it is the likeliest token; 0 and False for ignored ones.

    Most tokens are context and padding. The others come first, so that logits are computed only of chunks with them.
    """
    count = targets.size
    chunk = min(CHUNK, count)
    padding = -count % chunk
    order = jnp.argsort(targets == cross_entropy.IGNORED, stable=True)
    x = jnp.pad(x[order], ((0, padding), (0, 0)))
    in_order = jnp.pad(targets[order], (0, padding), constant_values=cross_entropy.IGNORED)

    def scored(x, targets):
        logits = unembedding.logits(head, x, cap=model.logit_soft_cap)
        losses, _ = cross_entropy.forward(logits, targets, vocabulary_size=model.vocabulary_size)
        return losses, jnp.argmax(logits[:, : model.vocabulary_size], axis=-1) == targets

    def nothing(x, targets):
        return jnp.zeros(chunk, accumulation_dtype(x.dtype)), jnp.zeros(chunk, bool)

    def one_chunk(inputs):
        return lax.cond(inputs[1][0] != cross_entropy.IGNORED, scored, nothing, *inputs)

    found = lax.map(one_chunk, (x.reshape(-1, chunk, x.shape[-1]), in_order.reshape(-1, chunk)))
    losses, likeliest = (values.reshape(-1)[:count] for values in found)
    return jnp.zeros_like(losses).at[order].set(losses), jnp.zeros_like(likeliest).at[order].set(likeliest)


def _by_length(requests: list[ScoringRequest], context: int) -> dict[int, list[ScoringRequest]]:
    """Groups the different requests by the length that they are padded to.

    The longest come first, so that a lack of memory shows at once.
    """
    groups: dict[int, list[ScoringRequest]] = {}
    for request in sorted(set(requests), key=lambda request: (-sum(map(len, request)), request)):
        length = padded_length(min(sum(map(len, request)) - 1, context), context)
        groups.setdefault(length, []).append(request)
    return groups


def _batch(requests: list[ScoringRequest], rows: int, length: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and targets, int32 (rows, length)."""
    tokens = np.zeros((rows, length), np.int32)
    targets = np.full((rows, length), cross_entropy.IGNORED, np.int32)
    for row, (before, completion) in enumerate(requests):
        sequence = [*before, *completion][-(context + 1) :]
        tokens[row, : len(sequence) - 1] = sequence[:-1]
        targets[row, len(sequence) - 1 - len(completion) : len(sequence) - 1] = completion
    return tokens, targets


def make_validation_loss(
    config: Config, tokens: Tokens, sequence_length: int, frozen: Any = None
) -> Callable[[Params], float]:
    """Returns a function of parameters: the mean loss in nats over every token of `tokens` that has one before it.

    Of conversations the mean is over the assistant's tokens.

    It takes windows of `sequence_length` that do not overlap, the last one padded with ignored targets, so that the
    mean is the same whatever the batch size. With `evaluation_batches` it takes so many batches from the beginning. The
    parameters are a train state's, and `frozen` is what its train step has as frozen.
    """
    layout, batch_size = layout_of(config), config.training.batch_size

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        return loader.validation_batches(
            tokens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            limit=config.training.evaluation_batches or None,
            rows=layout.own_rows(batch_size),
        )

    count = target_count(config, tokens, sequence_length)

    def loss_sum(params: Params, frozen: Any, batch: tuple[Int[Array, "B T"], ...]) -> Float[Array, ""]:
        params, context = working(params, frozen, config, layout)
        scale = jnp.float32(1)
        return layout.total(next_token.loss(family(config.model), params, loader.Batch(*batch), context, scale=scale))

    sequences, whole = PartitionSpec(AXIS), PartitionSpec()
    batch_loss = layout.jit(loss_sum, in_specs=(layout.specs(), whole, sequences), out_specs=whole)

    def validation_loss(params: Params) -> float:
        sums = in_turn(batch_loss(params, frozen, layout.from_processes(batch, sequences)) for batch in batches())
        return float(np.sum(list(sums), dtype=np.float64) / count)

    return validation_loss


def bits_per_byte_of_one_nat(config: Config, tokens: Tokens, sequence_length: int, tokenizer: Tokenizer) -> float:
    """Returns the factor from the mean loss of `make_validation_loss` to bits per byte; NaN for targets of no bytes."""
    lengths = np.array([len(token) for token in tokenizer.tokens], np.int64)
    lengths[tokenizer.before_document] = 0
    count = target_count(config, tokens, sequence_length)
    if isinstance(tokens, Conversations):
        parts = tokens.targets(sequence_length, _rows(config))
    else:
        parts = (tokens[start : min(start + AT_ONCE, count + 1)] for start in range(1, count + 1, AT_ONCE))
    total = sum(int(np.bincount(part, minlength=len(lengths)) @ lengths) for part in parts)
    return count / total / math.log(2) if total else math.nan


def target_count(config: Config, tokens: Tokens, sequence_length: int) -> int:
    """Returns the number of tokens that the validation loss is the mean over."""
    if isinstance(tokens, Conversations):
        return max(1, sum(map(len, tokens.targets(sequence_length, _rows(config)))))
    training = config.training
    there = len(tokens) - 1
    return min(there, training.evaluation_batches * training.batch_size * sequence_length or there)


def _rows(config: Config) -> int:
    """Returns the most rows of conversations that a validation loss is of."""
    training = config.training
    return training.evaluation_batches * training.batch_size or sys.maxsize
