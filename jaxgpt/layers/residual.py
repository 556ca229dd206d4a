"""Residual sum (He et al. 2015, arXiv:1512.03385, equation 1).

    y = x + branch

Backward: the sum hands its gradient to both of its terms unchanged,

    ∂x = ∂y           ∂branch = ∂y

so where the branch was computed from x, the branch's own gradient by x is added to ∂x by the model.
"""

import jax
from jaxtyping import Array, Float


@jax.named_scope("residual.forward")
def forward(x: Float[Array, "*batch C"], branch: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Returns the sum; nothing is kept for backward."""
    return x + branch


@jax.named_scope("residual.backward")
def backward(dy: Float[Array, "*batch C"]) -> tuple[Float[Array, "*batch C"], Float[Array, "*batch C"]]:
    """Returns (dx, dbranch)."""
    return dy, dy
