"""A whole model under the loss of the next token, called with arrays and options rather than a batch and a context."""

import itertools
from typing import Any

import pytest

from jaxgpt import models
from jaxgpt.data.loader import Batch
from jaxgpt.models.blocks import RECOMPUTE_LEVELS, Context
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


def levels() -> list[Any]:
    """Returns every recompute level with layers scanned and unrolled; all but two of them are for the nightly tests."""
    quick = {("norms", "scanned"), ("block", "unrolled")}
    every = itertools.product(RECOMPUTE_LEVELS, ("scanned", "unrolled"))
    return [pytest.param(*one, marks=[] if one in quick else [pytest.mark.slow]) for one in every]
