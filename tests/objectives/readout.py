"""A family without blocks, whose features are its parameters: an objective's gradients by features and heads alone."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.layers import scalar_head, unembedding
from jaxgpt.models import with_scalar
from jaxgpt.models.blocks import NO_AUX, Context
from jaxgpt.options.config import Compute, Model, Objective

C, V, Vp = 6, 11, 128


class Params(NamedTuple):
    x: Any  # features of all tokens
    weight: Any
    blocks: Any = ()


FAMILY: Any = SimpleNamespace(
    features=lambda params, inputs, context: (params.x, None, NO_AUX),
    head=lambda params: unembedding.Params(params.weight),
    features_backward=lambda params, residuals, dx, dhead, daux, context: Params(dx, dhead.weight),
)


def context(options: Objective, chunk: int = 5) -> Context:
    model = Model(width=C, vocabulary_size=V)
    return Context(model, Compute(classifier_chunk=chunk), objective=options)


def params(rng: np.random.Generator, tokens: int) -> Params:
    return Params(jnp.asarray(rng.normal(size=(tokens, C))), jnp.asarray(rng.normal(size=(Vp, C))))


def with_head(model: Params, rng: np.random.Generator) -> with_scalar.Params:
    head = scalar_head.Params(jnp.asarray(rng.normal(size=C)), jnp.asarray(rng.normal()))
    return with_scalar.attach(model, head)


def run(objective: Any, model: Any, batch: Any, options: Objective, **more: Any) -> tuple[Any, dict[str, Any], Any]:
    """The objective's loss, metrics and gradients."""
    return objective.loss_and_grads(FAMILY, model, type(batch)(*map(jnp.asarray, batch)), context(options), **more)
