"""Reinforcement: a policy is made likelier to draw what was better than expected (REINFORCE, PPO, GRPO).

    loss = scale Σ_i w_i (f(ℓ_i) + β k(ℓ_i) - c_H H_i + c_V v(V_i))           scale = 1 / Σ_i w_i

over the drawn tokens i. f is the surrogate of the reward, k the divergence from a reference, v the loss of the value,
each with its derivative in `surrogates.py`; H_i is the entropy of the distribution that the token was drawn from, which
keeps a policy from settling too early. Each term depends on one token, so the gradients are known while the chunk's
logits exist:

    ∂ℓ_i = scale w_i (f' + β k')           ∂H_i = -scale w_i c_H           ∂V_i = scale w_i c_V v'

The weights are 1 for the mean over all tokens, or 1 / (tokens of the answer) for the mean over answers; Σ w then counts
answers. REINFORCE is f alone, with the reward as the advantage; PPO has a value head on the policy's own features and
generalised advantages; GRPO has advantages of groups and no value. `advantages.py` makes what the batch has of these.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.layers import scalar_head, unembedding
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import with_scalar
from jaxgpt.models.blocks import Aux, Context, inputs_of
from jaxgpt.objectives import surrogates
from jaxgpt.options.config import Config, Objective


class Batch(NamedTuple):
    """Drawn texts. All but the tokens is 0 where the target wasn't drawn; what is old is from before the update."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]  # the next token where it was drawn, ignored elsewhere
    weights: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    old: Float[Array, "B T"]  # log-probability of the target when it was drawn
    reference: Float[Array, "B T"]  # and under the reference
    old_values: Float[Array, "B T"]
    returns: Float[Array, "B T"]


Params = Any  # a family's, or with_scalar.Params where there is a value head


def shapes(config: Config) -> Batch:
    """Abstract shapes of a step's batch, with a leading axis of micro-batches."""
    training = config.training
    of_tokens = training.micro_batches, training.batch_size, training.sequence_length
    tokens, numbers = (jax.ShapeDtypeStruct(of_tokens, dtype) for dtype in (np.int32, np.float32))
    return Batch(tokens, tokens, *[numbers] * 6)  # type: ignore[arg-type]


def count(batch: Batch) -> Float[Array, ""]:
    """Returns the sum of the weights, which the mean is over."""
    return jnp.sum(batch.weights)


def loss(
    family: ModuleType, params: Params, batch: Batch, context: Context, *, scale: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """Returns the loss of this batch; with `scale`, `scale` times the weighted sum."""
    model, scale = _model_of(params, context), _scale(batch, scale)
    x, _, aux = family.features(model, inputs_of(batch.tokens, context.model), context)
    found, _ = _classify(family, model, x, batch, context, scale)
    of_values = _of_values(params, x, batch, context, scale)[0] if context.objective.value_coefficient else None
    return _results(found, of_values, batch, aux, scale)[0]


def loss_and_grads(
    family: ModuleType, params: Params, batch: Batch, context: Context, *, scale: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], dict[str, Any], Params]:
    """Returns `loss`, the metrics, which summed over batches are means, and the gradient by every parameter."""
    model, scale = _model_of(params, context), _scale(batch, scale)
    x, residuals, aux = family.features(model, inputs_of(batch.tokens, context.model), context)
    found, classifier = _classify(family, model, x, batch, context, scale)
    dhead, dx = unembedding.backward(classifier)
    daux = _share(batch, scale)
    if not context.objective.value_coefficient:
        grads = family.features_backward(model, residuals, dx, dhead, daux, context)
        return *_results(found, None, batch, aux, scale), grads
    of_values, dvalues, head = _of_values(params, x, batch, context, scale)
    dscalar, dx_through_values = scalar_head.backward(params.scalar, head, dvalues)
    dx = dx + dx_through_values
    grads = with_scalar.attach(family.features_backward(model, residuals, dx, dhead, daux, context), dscalar)
    return *_results(found, of_values, batch, aux, scale), grads


def _model_of(params: Params, context: Context) -> Params:
    return with_scalar.model_of(params) if context.objective.value_coefficient else params


def _scale(batch: Batch, scale: Float[Array, ""] | None) -> Float[Array, ""]:
    total = count(batch)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0) if scale is None else scale


def _share(batch: Batch, scale: Float[Array, ""]) -> Float[Array, ""]:
    """Returns this batch's share of all that the mean is over, by which the family's own loss is weighted."""
    return scale * count(batch)


def _classify(
    family: ModuleType, model: Any, x: Float[Array, "N C"], batch: Batch, context: Context, scale: Float[Array, ""]
) -> tuple[tuple[Float[Array, ""], dict[str, Any]], unembedding.Residuals]:
    scale = jnp.asarray(scale, accumulation_dtype(x.dtype))
    per_token = (batch.weights, batch.advantages, batch.old, batch.reference)
    return unembedding.forward(
        family.head(model),
        x,
        batch.targets.reshape(-1),
        functools.partial(_chunk_loss, context.objective, scale),
        *(array.reshape(-1) for array in per_token),
        vocabulary_size=context.model.vocabulary_size,
        chunk=context.compute.classifier_chunk,
        cap=context.model.logit_soft_cap,
        with_entropy=True,
    )


def _chunk_loss(
    options: Objective,
    scale: Float[Array, ""],
    logp: Float[Array, " n"],
    entropy: Float[Array, " n"],
    weights: Float[Array, " n"],
    advantages: Float[Array, " n"],
    old: Float[Array, " n"],
    reference: Float[Array, " n"],
) -> tuple[tuple[Float[Array, ""], dict[str, Any]], Float[Array, " n"], Float[Array, " n"]]:
    """Returns a chunk's loss and metrics, and the loss's gradients by log-probabilities and entropies."""
    w = scale * weights.astype(logp.dtype)
    advantages = advantages.astype(logp.dtype)
    if options.surrogate == "reinforce":
        losses, dlogp = surrogates.reinforce(logp, advantages)
    else:
        losses, dlogp = surrogates.clipped(logp, old.astype(logp.dtype), advantages, **_clip(options))
    if options.kl_coefficient:
        divergence, dkl = surrogates.divergence(logp, reference.astype(logp.dtype), estimator=options.kl)
        losses = losses + options.kl_coefficient * divergence
        dlogp = dlogp + options.kl_coefficient * dkl
    losses = losses - options.entropy_coefficient * entropy
    metrics = _metrics(options, w, logp, entropy, advantages, old, reference)
    return (jnp.sum(w * losses), metrics), w * dlogp, -options.entropy_coefficient * w


def _clip(options: Objective) -> dict[str, float]:
    return {"below": options.clip, "above": options.clip_above or options.clip}


def _metrics(
    options: Objective, w: Array, logp: Array, entropy: Array, advantages: Array, old: Array, reference: Array
) -> dict[str, Any]:
    """Returns a chunk's part of the means: divergences (k3) from reference and drawing policy, entropy, clips."""
    ratio = jnp.exp(logp - old)
    spent = surrogates.is_clipped(ratio, advantages, **_clip(options))
    if options.has_reference:
        of_reference = {"kl": jnp.sum(w * surrogates.divergence(logp, reference, estimator="k3")[0])}
    else:
        of_reference = {}
    return of_reference | {
        "kl_of_update": jnp.sum(w * surrogates.divergence(logp, old, estimator="k3")[0]),
        "entropy": jnp.sum(w * entropy),
        "ratio": jnp.sum(w * ratio),
        "clip_fraction": jnp.sum(w * spent),
    }


def _results(
    found: tuple[Float[Array, ""], dict[str, Any]],
    of_values: Float[Array, ""] | None,
    batch: Batch,
    aux: Aux,
    scale: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Returns the loss and the metrics, of the classifier, the values and the family together."""
    value, metrics = aux.added(*found, _share(batch, scale))
    return (value, metrics) if of_values is None else (value + of_values, metrics | {"value_loss": of_values})


def _of_values(
    params: with_scalar.Params, x: Float[Array, "N C"], batch: Batch, context: Context, scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, " N"], scalar_head.Residuals]:
    """Returns the values' part of the loss, its gradient by each value, and the scalar head's residuals."""
    values, residuals = scalar_head.forward(params.scalar, x)
    weights, old, returns = (
        array.reshape(-1).astype(values.dtype) for array in (batch.weights, batch.old_values, batch.returns)
    )
    losses, dvalues = surrogates.value_loss(values, old, returns, clip=context.objective.value_clip)
    w = scale * context.objective.value_coefficient * weights
    return jnp.sum(w * losses), w * dvalues, residuals
