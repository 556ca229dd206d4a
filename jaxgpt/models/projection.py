"""The products of a block with its weights, whether these are trained or frozen: here alone the two are told apart.

A block's functions call these in place of a layer's. What comes back as the gradient of a frozen weight's `Params` is
the gradient of its adapter, or None.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers import linear, lora
from jaxgpt.layers.linear import Residuals

Params = linear.Params | lora.Params
Gradients = Any  # linear.Params, lora.Adapter or None


def forward(params: Params, x: Float[Array, "*batch in"]) -> tuple[Float[Array, "*batch out"], Residuals]:
    """The layer's `forward`."""
    return lora.forward(params, x) if isinstance(params, lora.Params) else linear.forward(params, x)


def forward_in_parts(
    params: Params, x: Float[Array, "*batch in"], parts: int | Sequence[int]
) -> tuple[list[Float[Array, "*batch part"]], Residuals]:
    """Like `forward`, with the output's columns in parts, as `linear.forward_in_parts` has them."""
    if not isinstance(params, lora.Params):
        return linear.forward_in_parts(params, x, parts)
    y, residuals = lora.forward(params, x)
    return jnp.split(y, parts, axis=-1), residuals


def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"]
) -> tuple[Gradients, Float[Array, "*batch in"]]:
    """The layer's `backward`."""
    if isinstance(params, lora.Params):
        return lora.backward(params, residuals, dy)
    return linear.backward(params, residuals, dy)
