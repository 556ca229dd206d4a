"""Preferences without a reward model: DPO, IPO and their length-normalised and reference-free forms.

    ℓ = Σ_i log p(target_i) of a text's answer           r = (ℓ - ℓ_reference) / n,  n its tokens or 1
    h = β (r_chosen - r_rejected) - γ                    loss = mean over pairs of f(h)

f is `comparisons.sigmoid_loss` (DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7) or `square_loss` / β² (IPO,
Azar et al. 2023, arXiv:2310.12036, equation 17). Length-normalised, without a reference, and with γ it is SimPO (Meng
et al. 2024, arXiv:2405.14734). βr is the reward of which the model is the best policy: a reward model in disguise.

Backward. ∂h = f'(h) is one number of a pair, and every token of an answer has the same weight in it:

    ∂ℓ_i = ±β f'(h) / n           + for tokens of the chosen text, - for the rejected one's

f'(h) is known only when both sums are, so the classifier runs twice: once for the log-probabilities, without gradients,
and once with these weights. The features, by far the most of the work, are computed once. The reference never changes,
so its log-probabilities are computed before training and are a part of the batch.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.kernels.choose import softmax_kernel
from jaxgpt.layers import cross_entropy, unembedding
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models.blocks import Aux, Context, Params, inputs_of
from jaxgpt.objectives.comparisons import sigmoid_loss, square_loss
from jaxgpt.options.config import Config, Objective

CHOSEN, REJECTED = 0, 1


class Batch(NamedTuple):
    tokens: Int[Array, "B 2 T"]  # of each pair the chosen text and the rejected one
    targets: Int[Array, "B 2 T"]  # ignored but in the answer; of a row that only fills the batch up, everywhere
    reference: Float[Array, "B 2"]  # log-probability of each answer under the reference


class Margins(NamedTuple):
    """Rewards, losses and gradients of some pairs."""

    rewards: Float[Array, "B 2"]  # βr
    losses: Float[Array, " B"]
    dlogp: Float[Array, "B 2"]  # derivative of a pair's loss by each log-probability of an answer's token


def shapes(config: Config) -> Batch:
    """Abstract shapes of a step's batch, with a leading axis of micro-batches."""
    training = config.training
    texts = (training.micro_batches, training.batch_size, 2)
    tokens = jax.ShapeDtypeStruct((*texts, training.sequence_length), np.int32)
    return Batch(tokens, tokens, jax.ShapeDtypeStruct(texts, np.float32))  # type: ignore[arg-type]


def count(batch: Batch) -> Int[Array, ""]:
    """Returns the number of pairs, which the mean is over."""
    return jnp.sum(_there(batch))


def answers_logp(
    family: ModuleType, params: Params, x: Float[Array, "N C"], targets: Int[Array, "B S T"], context: Context
) -> Float[Array, "B S"]:
    """Returns the log-probability of each answer, from the features of its text: the first pass, or a reference's."""
    logp = unembedding.log_probabilities(family.head(params), x, targets.reshape(-1), **_classifier(context))
    return jnp.sum(logp.reshape(targets.shape), axis=-1)


def margins(logp: Float[Array, "B 2"], batch: Batch, options: Objective) -> Margins:
    """Returns the pairs' losses and their gradients from the log-probabilities of the answers."""
    lengths = jnp.sum(batch.targets != cross_entropy.IGNORED, axis=-1)
    lengths = jnp.maximum(lengths, 1).astype(logp.dtype) if options.length_normalised else jnp.ones_like(logp)
    reference = jnp.zeros_like(logp) if options.reference_free else batch.reference.astype(logp.dtype)
    rewards = options.beta * (logp - reference) / lengths
    h = rewards[:, CHOSEN] - rewards[:, REJECTED] - options.margin
    if options.preference_loss == "sigmoid":
        losses, dh = sigmoid_loss(h, smoothing=options.label_smoothing)
    else:
        losses, dh = (part / options.beta**2 for part in square_loss(h))
    there = _there(batch)
    dlogp = options.beta * jnp.stack([dh, -dh], axis=1) / lengths
    return Margins(rewards, jnp.where(there, losses, 0), jnp.where(there[:, None], dlogp, 0))


def loss(
    family: ModuleType, params: Params, batch: Batch, context: Context, *, scale: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """Returns the mean loss of this batch's pairs; with `scale`, `scale` times their sum."""
    x, _, aux = family.features(params, _inputs(batch, context), context)
    found = margins(answers_logp(family, params, x, batch.targets, context), batch, context.objective)
    return results(found, batch, aux, _scale(batch, scale))[0]


def loss_and_grads(
    family: ModuleType, params: Params, batch: Batch, context: Context, *, scale: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], dict[str, Any], Params]:
    """Returns `loss`, the metrics, which summed over batches are means, and the gradient by every parameter."""
    x, residuals, aux = family.features(params, _inputs(batch, context), context)
    found = margins(answers_logp(family, params, x, batch.targets, context), batch, context.objective)
    scale = jnp.asarray(_scale(batch, scale), accumulation_dtype(x.dtype))
    weights = jnp.broadcast_to((scale * found.dlogp)[..., None], batch.targets.shape)
    _, classifier = unembedding.forward(
        family.head(params),
        x,
        batch.targets.reshape(-1),
        _weighted,
        weights.reshape(-1),
        softmax=softmax_kernel(context.compute),
        **_classifier(context),
    )
    dhead, dx = unembedding.backward(classifier)
    grads = family.features_backward(params, residuals, dx, dhead, _share(batch, scale), context)
    return *results(found, batch, aux, scale), grads


def _weighted(logp: Float[Array, " n"], weights: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """Returns a chunk's loss of the second pass, linear in the log-probabilities, and its gradient."""
    return jnp.sum(weights * logp), weights


def _classifier(context: Context) -> dict[str, Any]:
    return {
        "vocabulary_size": context.model.vocabulary_size,
        "chunk": context.compute.classifier_chunk,
        "cap": context.model.logit_soft_cap,
    }


def _inputs(batch: Batch, context: Context) -> Any:
    return inputs_of(batch.tokens.reshape(-1, batch.tokens.shape[-1]), context.model)


def _scale(batch: Batch, scale: Float[Array, ""] | None) -> Float[Array, ""]:
    return 1 / jnp.maximum(count(batch), 1) if scale is None else scale


def _share(batch: Batch, scale: Float[Array, ""]) -> Float[Array, ""]:
    """Returns this batch's share of all that the mean is over, by which the family's own loss is weighted."""
    return scale * count(batch)


def _there(batch: Batch) -> Bool[Array, " B"]:
    """Marks the pairs that are there: both answers have a token."""
    return jnp.all(jnp.any(batch.targets != cross_entropy.IGNORED, axis=-1), axis=-1)


def results(found: Margins, batch: Batch, aux: Aux, scale: Float[Array, ""]) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Returns the loss, and the metrics: the share of pairs that the rewards put in order, the rewards, and aux's."""
    chosen, rejected = (jnp.where(_there(batch), found.rewards[:, side], 0) for side in (CHOSEN, REJECTED))
    metrics = {
        "accuracy": scale * jnp.sum(chosen > rejected),
        "margin": scale * jnp.sum(chosen - rejected),
        "chosen_reward": scale * jnp.sum(chosen),
        "rejected_reward": scale * jnp.sum(rejected),
    }
    return aux.added(scale * jnp.sum(found.losses), metrics, _share(batch, scale))
