"""The norms of the residual stream: LayerNorm or RMSNorm, by XLA or by fused kernels. Here alone they are told apart.

A block's functions call these in place of a layer's. Backward adds the gradient that goes past the norm, in the stream.
"""

from types import ModuleType
from typing import Any, TypeVar

from jaxtyping import Array, Float

from jaxgpt.kernels import pallas_norm
from jaxgpt.layers import layernorm, rmsnorm
from jaxgpt.layers.numerics import not_before
from jaxgpt.models.blocks import Context

Params = TypeVar("Params", layernorm.Params, rmsnorm.Params)
Residuals = Any  # the layer's
LAYERS: dict[type, ModuleType] = {layernorm.Params: layernorm, rmsnorm.Params: rmsnorm}


def forward(params: Params, x: Float[Array, "N C"], context: Context) -> tuple[Float[Array, "N C"], Residuals]:
    """The layer's `forward`."""
    layer = pallas_norm if context.compute.kernels == "pallas" else LAYERS[type(params)]
    return layer.forward(params, x, epsilon=context.model.norm_epsilon)


def output(params: Params, residuals: Residuals) -> Float[Array, "N C"]:
    """Forward's output from its residuals."""
    return LAYERS[type(params)].output(params, residuals)


def backward(
    params: Params,
    residuals: Residuals,
    dy: Float[Array, "N C"],
    past: Float[Array, "N C"] | None,
    context: Context,
    *,
    earlier: Float[Array, "N C"] | None = None,
) -> tuple[Params, Float[Array, "N C"]]:
    """Gradients of the parameters, and of x: the layer's and `past`, which the gradient past the norm is.

    What XLA computes again of the residuals, it computes when dy is there; `earlier` is that of `not_before`.
    """
    if context.compute.kernels == "pallas":
        return pallas_norm.backward(params, residuals, dy, past)
    grads, dx = LAYERS[type(params)].backward(params, not_before(dy, residuals, earlier=earlier), dy)
    return grads, dx if past is None else past + dx
