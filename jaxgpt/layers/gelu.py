"""GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).

    y = x/2 (1 + tanh u)           u = √(2/π) (x + 0.044715 x³)

Backward, with tanh' = 1 - tanh²:

    ∂x = ∂y [ (1 + tanh u)/2 + x/2 (1 - tanh² u) √(2/π) (1 + 3·0.044715 x²) ]
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype, not_before

SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


class Residuals(NamedTuple):
    x: Float[Array, "*batch F"]


@jax.named_scope("gelu.forward")
def forward(x: Float[Array, "*batch F"]) -> tuple[Float[Array, "*batch F"], Residuals]:
    """Computes in the accumulation dtype; the output has the dtype of x."""
    wide = x.astype(accumulation_dtype(x.dtype))
    y = 0.5 * wide * (1 + jnp.tanh(SLOPE * (wide + CUBIC * wide * wide * wide)))
    return y.astype(x.dtype), Residuals(x)


@jax.named_scope("gelu.backward")
def backward(residuals: Residuals, dy: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """The tanh is computed again rather than kept."""
    x = not_before(dy, residuals.x).astype(accumulation_dtype(residuals.x.dtype))
    tanh = jnp.tanh(SLOPE * (x + CUBIC * x * x * x))
    derivative = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * SLOPE * (1 + 3 * CUBIC * x * x)
    return (dy * derivative).astype(dy.dtype)
