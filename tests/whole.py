"""A whole model under the loss of the next token, called with arrays and options rather than a batch and a context."""

from typing import Any

from jaxgpt import models
from jaxgpt.data.loader import Batch
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Compute, Model


def logits(params: Any, tokens: Any, model: Model, compute: Compute) -> Any:
    return models.logits(params, tokens, Context(model, compute))


def loss(params: Any, tokens: Any, targets: Any, model: Model, compute: Compute, **options: Any) -> Any:
    return next_token.loss(models.family(model), params, Batch(tokens, targets), Context(model, compute), **options)


def loss_and_grads(params: Any, tokens: Any, targets: Any, model: Model, compute: Compute, **options: Any) -> Any:
    """(loss, gradients)."""
    family, context = models.family(model), Context(model, compute)
    value, _, grads = next_token.loss_and_grads(family, params, Batch(tokens, targets), context, **options)
    return value, grads
