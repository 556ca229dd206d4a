"""Soft cap of logits (Bello et al. 2016, arXiv:1611.09940, section 4.1; Gemma Team 2024, arXiv:2408.00118).

    y = c tanh(x / c)

Small numbers stay as they are, and none is beyond -c and c. Backward, since tanh' = 1 - tanh²:

    ∂x = ∂y (1 - (y / c)²)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.named_scope("soft_cap.forward")
def forward(x: Float[Array, "*batch V"], *, cap: float) -> Float[Array, "*batch V"]:
    """The capped numbers, in the dtype of x, which is to be an accumulation dtype. They are the residuals too."""
    return cap * jnp.tanh(x / cap)


@jax.named_scope("soft_cap.backward")
def backward(y: Float[Array, "*batch V"], dy: Float[Array, "*batch V"], *, cap: float) -> Float[Array, "*batch V"]:
    """The gradient by x, in the dtype of dy; `y` is forward's output."""
    return (dy * (1 - jnp.square(y / cap))).astype(dy.dtype)
