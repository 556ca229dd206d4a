"""GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).

    y = x s           s = (1 + tanh u)/2           u = √(2/π) (x + 0.044715 x³)

Backward, with tanh' = 1 - tanh², which makes s' = 2 s (1 - s) u':

    ∂x = ∂y [ s + x · 2 s (1 - s) √(2/π) (1 + 3·0.044715 x²) ]

The gate s is also 1 / (1 + e^-2u).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype

SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


class Residuals(NamedTuple):
    x: Float[Array, "*batch F"]


@jax.named_scope("gelu.forward")
def forward(x: Float[Array, "*batch F"]) -> tuple[Float[Array, "*batch F"], Residuals]:
    """Computes in the accumulation dtype; the output has the dtype of x.

    On a GPU y is written in x's own dtype, in the very form that XLA knows as a part of the product before: cuBLASLt
    then computes it in float32, before anything is rounded.
    """

    def part_of_a_product(x: Array) -> Array:
        return x * (0.5 * (1 + jnp.tanh(SLOPE * (x + CUBIC * (x * x * x)))))

    residuals = Residuals(x)
    return lax.platform_dependent(x, cpu=lambda _: output(residuals), default=part_of_a_product), residuals


def output(residuals: Residuals) -> Float[Array, "*batch F"]:
    """Forward's output from its residuals, for a model that would rather compute it again than keep it.

    `backward` computes the same gate, so that the compiler needs it once for both.
    """
    x = residuals.x.astype(accumulation_dtype(residuals.x.dtype))
    return (x * _gate(x)).astype(residuals.x.dtype)


@jax.named_scope("gelu.backward")
def backward(residuals: Residuals, dy: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """The gate is computed again rather than kept, if the caller's residuals are `not_before` the gradient."""
    x = residuals.x.astype(accumulation_dtype(residuals.x.dtype))
    gate = _gate(x)
    derivative = gate + x * gate * (1 - gate) * 2 * SLOPE * (1 + 3 * CUBIC * x * x)
    return (dy * derivative).astype(dy.dtype)


def _gate(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """Returns s, in the form that XLA computes within its users on a GPU, and fast on a CPU."""
    u = SLOPE * (x + CUBIC * x * x * x)
    return lax.platform_dependent(u, cpu=lambda u: 0.5 * (1 + jnp.tanh(u)), default=lambda u: jax.nn.sigmoid(2 * u))
