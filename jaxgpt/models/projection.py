"""The products of a block with its weights: trained, frozen, or with factors of 8 bits. Here alone they are told apart.

A block's functions call these in place of a layer's. What comes back as the gradient of a frozen weight's `Params` is
the gradient of its adapter, or None.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers import fp8, linear, lora

Params = linear.Params | lora.Params | fp8.Params
Residuals = Any  # linear.Residuals; fp8.Quantised where the factors have 8 bits
Gradients = Any  # linear.Params, lora.Adapter, fp8.Params or None
LAYERS: dict[type, ModuleType] = {linear.Params: linear, lora.Params: lora, fp8.Params: fp8}


def forward(params: Params, x: Float[Array, "*batch in"]) -> tuple[Float[Array, "*batch out"], Residuals]:
    """The layer's `forward`."""
    return LAYERS[type(params)].forward(params, x)


def forward_in_parts(
    params: Params, x: Float[Array, "*batch in"], parts: int | Sequence[int]
) -> tuple[list[Float[Array, "*batch part"]], Residuals]:
    """Like `forward`, with the output's columns in parts, as `linear.forward_in_parts` has them."""
    if not isinstance(params, lora.Params):
        return LAYERS[type(params)].forward_in_parts(params, x, parts)
    y, residuals = lora.forward(params, x)
    return jnp.split(y, parts, axis=-1), residuals


def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"]
) -> tuple[Gradients, Float[Array, "*batch in"]]:
    """The layer's `backward`."""
    return LAYERS[type(params)].backward(params, residuals, dy)
