"""SwiGLU, a gated activation (Shazeer 2020, arXiv:2002.05202, equation 6, without its products).

    y = silu(g) u           silu(g) = g s,  s = 1 / (1 + e^-g)

Backward, with s' = s (1 - s):

    ∂u = ∂y silu(g)         ∂g = ∂y u s (1 + g (1 - s))
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype


class Residuals(NamedTuple):
    gate: Float[Array, "*batch F"]
    up: Float[Array, "*batch F"]


@jax.named_scope("swiglu.forward")
def forward(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> tuple[Float[Array, "*batch F"], Residuals]:
    """Computes in the accumulation dtype; the output has the dtype of the inputs."""
    residuals = Residuals(gate, up)
    return output(residuals), residuals


def output(residuals: Residuals) -> Float[Array, "*batch F"]:
    """Forward's output from its residuals, for a model that would rather compute it again than keep it."""
    g, u = (array.astype(accumulation_dtype(array.dtype)) for array in residuals)
    return (g * jax.nn.sigmoid(g) * u).astype(residuals.gate.dtype)


@jax.named_scope("swiglu.backward")
def backward(
    residuals: Residuals, dy: Float[Array, "*batch F"]
) -> tuple[Float[Array, "*batch F"], Float[Array, "*batch F"]]:
    """Returns (dgate, dup), in the dtype of dy. The sigmoid is computed again rather than kept."""
    dtype = accumulation_dtype(dy.dtype)
    g, u = (array.astype(dtype) for array in residuals)
    s = jax.nn.sigmoid(g)
    dgate = dy * u * s * (1 + g * (1 - s))
    dup = dy * g * s
    return dgate.astype(dy.dtype), dup.astype(dy.dtype)
