"""Next-token objective: the mean of -log p(target) over all tokens that have a target.

    loss = -scale Σ_i ℓ_i           ∂loss/∂ℓ_i = -scale           ℓ_i = log p(target_i)

with scale = 1 / (number of targets). A batch that is one of several, whose losses are to be summed, is given the scale
of all of them. Targets that are IGNORED have no part in it: of conversations these are all but the assistant's tokens,
so this is the objective of supervised fine-tuning too. The gradients are computed in one pass, while the logits exist.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.data.loader import Batch
from jaxgpt.kernels.choose import softmax_kernel
from jaxgpt.layers import cross_entropy, unembedding
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models.blocks import Context, Params, inputs_of
from jaxgpt.options.config import IN_DATA, Config

__all__ = ["Batch", "count", "loss", "loss_and_grads", "shapes"]


def shapes(config: Config) -> Batch:
    """Abstract shapes of a step's batch, with a leading axis of micro-batches."""
    training = config.training
    tokens = jax.ShapeDtypeStruct((training.micro_batches, training.batch_size, training.sequence_length), np.int32)
    return Batch(tokens, tokens, tokens if config.model.document_start == IN_DATA else None)


def count(batch: Batch) -> Int[Array, ""]:
    """Returns the number of tokens that the mean is over."""
    return jnp.sum(batch.targets != cross_entropy.IGNORED)


def loss(
    family: ModuleType, params: Params, batch: Batch, context: Context, *, scale: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """Returns the mean loss of this batch's targets, in nats; with `scale`, `scale` times their sum."""
    x, _, aux = family.features(params, inputs_of(batch.tokens, context.model, batch.starts), context)
    value, _ = _classify(family, params, x, batch, context, _scale(batch, scale))
    return aux.added(value, {}, _share(batch, scale))[0]


def loss_and_grads(
    family: ModuleType, params: Params, batch: Batch, context: Context, *, scale: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], dict[str, Any], Params]:
    """Returns `loss`, the family's metrics, and the gradient by every parameter, in the accumulation dtype.

    The metrics, as the family's own loss, are weighted by the batch's share of all targets: summed over batches they
    are means.
    """
    x, residuals, aux = family.features(params, inputs_of(batch.tokens, context.model, batch.starts), context)
    softmax = softmax_kernel(context.compute)
    value, classifier = _classify(family, params, x, batch, context, _scale(batch, scale), softmax)
    dhead, dx = unembedding.backward(classifier)
    share = _share(batch, scale)
    grads = family.features_backward(params, residuals, dx, dhead, share, context)
    return *aux.added(value, {}, share), grads


def _scale(batch: Batch, scale: Float[Array, ""] | None) -> Float[Array, ""]:
    return 1 / jnp.maximum(count(batch), 1) if scale is None else scale


def _share(batch: Batch, scale: Float[Array, ""] | None) -> Float[Array, ""] | float:
    """Returns this batch's share of all targets, by which the family's own loss is weighted."""
    return 1.0 if scale is None else scale * count(batch)


def _classify(
    family: ModuleType,
    params: Params,
    x: Float[Array, "N C"],
    batch: Batch,
    context: Context,
    scale: Float[Array, ""],
    softmax: unembedding.Softmax | None = None,
) -> tuple[Float[Array, ""], unembedding.Residuals]:
    scale = jnp.asarray(scale, accumulation_dtype(x.dtype))
    return unembedding.forward(
        family.head(params),
        x,
        batch.targets.reshape(-1),
        functools.partial(_chunk_loss, scale),
        vocabulary_size=context.model.vocabulary_size,
        chunk=context.compute.classifier_chunk,
        cap=context.model.logit_soft_cap,
        eight_bits=context.eight_bits and context.compute.fp8_head,
        softmax=softmax,
    )


def _chunk_loss(scale: Float[Array, ""], logp: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """Returns a chunk's loss, and its gradient by each log-probability."""
    return -scale * jnp.sum(logp), jnp.full(logp.shape, -scale)
