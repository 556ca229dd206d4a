"""Reward model: scores of whole texts, trained so that the better one of each pair of a ranking has the higher score.

    s = scalar head of the features at a text's last token           loss = mean of the rankings' losses

`comparisons.py` has a ranking's loss, and its gradient by the scores. All K texts of a ranking go through the model
together, once, whatever the number of its pairs. No classifier is needed, and the family's own head has the gradient 0.
A batch that is one of several, whose losses are to be summed, is given the scale of all: 1 / number of rankings.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.layers import scalar_head, unembedding
from jaxgpt.models import with_scalar
from jaxgpt.models.blocks import Aux, Context, inputs_of
from jaxgpt.objectives.comparisons import pairs, ranking_loss
from jaxgpt.options.config import Config


class Batch(NamedTuple):
    tokens: Int[Array, "B K T"]  # K texts of each ranking, filled up behind their ends
    last: Int[Array, "B K"]  # the place of each text's last token
    ranks: Int[Array, "B K"]  # 0 for the best; -1 for a text that isn't there


def shapes(config: Config) -> Batch:
    """Abstract shapes of a step's batch, with a leading axis of micro-batches."""
    training = config.training
    texts = (training.micro_batches, training.batch_size, config.objective.completions)
    tokens = jax.ShapeDtypeStruct((*texts, training.sequence_length), np.int32)
    return Batch(tokens, *[jax.ShapeDtypeStruct(texts, np.int32)] * 2)  # type: ignore[arg-type]


def count(batch: Batch) -> Int[Array, ""]:
    """Returns the number of rankings with a pair, which the mean is over, of micro-batches together or one."""
    return jnp.sum(_ranked(batch))


def scores(
    family: ModuleType, params: with_scalar.Params, batch: Batch, context: Context
) -> tuple[Float[Array, "B K"], scalar_head.Residuals, Any, Aux]:
    """Returns the scores of all texts, and what the backward needs: the head's and the model's residuals, and aux."""
    B, K, T = batch.tokens.shape
    inputs = inputs_of(batch.tokens.reshape(B * K, T), context.model)
    x, residuals, aux = family.features(with_scalar.model_of(params), inputs, context)
    places = jnp.arange(B * K) * T + batch.last.reshape(-1)
    found, head = scalar_head.forward(params.scalar, x, places)
    return found.reshape(B, K), head, residuals, aux


def loss(
    family: ModuleType,
    params: with_scalar.Params,
    batch: Batch,
    context: Context,
    *,
    scale: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Returns the mean loss of this batch's rankings; with `scale`, `scale` times their sum."""
    found, _, _, aux = scores(family, params, batch, context)
    losses, _ = ranking_loss(found, batch.ranks, centre=context.objective.centre)
    return results(losses, found, batch, aux, _scale(batch, scale))[0]


def loss_and_grads(
    family: ModuleType,
    params: with_scalar.Params,
    batch: Batch,
    context: Context,
    *,
    scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Any], with_scalar.Params]:
    """Returns `loss`, the metrics, which summed over batches are means, and the gradient by every parameter."""
    found, head, residuals, aux = scores(family, params, batch, context)
    scale = _scale(batch, scale)
    losses, dscores = ranking_loss(found, batch.ranks, centre=context.objective.centre)
    dscores = scale * dscores
    dscalar, dx = scalar_head.backward(params.scalar, head, dscores.reshape(-1))
    model, daux = with_scalar.model_of(params), _share(batch, scale)
    unused = unembedding.Params(jnp.zeros(family.head(model).weight.shape, dscores.dtype))
    grads = with_scalar.attach(family.features_backward(model, residuals, dx, unused, daux, context), dscalar)
    return *results(losses, found, batch, aux, scale), grads


def _scale(batch: Batch, scale: Float[Array, ""] | None) -> Float[Array, ""]:
    return 1 / jnp.maximum(count(batch), 1) if scale is None else scale


def _share(batch: Batch, scale: Float[Array, ""]) -> Float[Array, ""]:
    """Returns this batch's share of all that the mean is over, by which the family's own loss is weighted."""
    return scale * count(batch)


def _ranked(batch: Batch) -> Bool[Array, "*batch"]:
    return jnp.any(pairs(batch.ranks), axis=(-2, -1))


def results(
    losses: Float[Array, " B"], found: Float[Array, "B K"], batch: Batch, aux: Aux, scale: Float[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Returns the loss, and the metrics: the share of pairs that the scores put in order, their difference, aux's."""
    marks = pairs(batch.ranks)
    weights = scale * marks / jnp.maximum(jnp.sum(marks, axis=(1, 2), keepdims=True), 1)
    difference = found[:, :, None] - found[:, None, :]
    metrics = {"accuracy": jnp.sum(weights * (difference > 0)), "score_margin": jnp.sum(weights * difference)}
    return aux.added(scale * jnp.sum(losses), metrics, _share(batch, scale))
