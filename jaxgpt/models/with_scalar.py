"""A model of any family with a scalar head beside its own head: a reward model, or a policy with its values.

The tree has a field `blocks` as a family's has, so that sharding, checkpoints and the memory plan treat it as one.
Adapters are such a tree too (`lora.py`), and have a scalar head beside them where one is trained with them.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxgpt.layers import random, scalar_head
from jaxgpt.models import blocks
from jaxgpt.options.config import Model


class Params(NamedTuple):
    ends: Any  # the family's parameters, or adapters, without its blocks
    blocks: Any
    scalar: scalar_head.Params


def attach(model: blocks.Params, scalar: scalar_head.Params) -> Params:
    """Returns the tree of a family's parameters and a scalar head, or of their gradients."""
    return Params(model._replace(blocks=()), model.blocks, scalar)


def model_of(params: Params) -> blocks.Params:
    """Returns the family's parameters."""
    return params.ends._replace(blocks=params.blocks)


def on_model(change: Callable[[Any], Any], params: Any) -> Any:
    """Applies `change` to a family's parameters, or to adapters. A scalar head beside them stays as it is."""
    if not isinstance(params, Params):
        return change(params)
    return attach(change(model_of(params)), params.scalar)


def init_scalar(model: Model, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> scalar_head.Params:
    """Normal weights of variance 1 / (C + 1), as Stiennon et al. 2020 (arXiv:2009.01325) begin; bias 0.

    Features that a norm has scaled have about C as their squared length, so that scores begin around ±1.
    """
    weight = random.normal(key, (model.width,), dtype) * (model.width + 1) ** -0.5
    return scalar_head.Params(weight, jnp.zeros((), dtype))


def decays(module: ModuleType, params: Params) -> Params:
    """Marks with True the tensors that weight decay applies to: the family's or the adapters', and not the head."""
    return attach(module.decays(model_of(params)), jax.tree.map(lambda _: False, params.scalar))
