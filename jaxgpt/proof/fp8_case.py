"""Case of a linear layer whose products have factors of 8 bits, for the gradient check.

Rounding is a staircase, of which no derivative is to be had. So here nothing is rounded, and everything else is as it
is in training: each factor is divided by its scale and multiplied by it again.
"""

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxgpt.layers import fp8, linear
from jaxgpt.proof.gradcheck import Case
from jaxgpt.proof.inputs import normals

UNROUNDED = fp8.Formats(None, None)
LARGEST = (3.0, 0.7, 11.0)  # expected magnitudes of x, w and ∂y, that give three scales


def fp8_case(key: Key[Array, ""], B: int, T: int, inputs: int, outputs: int, *, again: bool = False) -> Case:
    """Returns the case of residuals that forward keeps, or with `again` of x itself."""
    weight, bias, x = normals(key, (inputs, outputs), (outputs,), (B, T, inputs))

    def forward(inputs):
        weight, bias = inputs["params"]
        params = fp8.Params(weight, bias, jnp.asarray(LARGEST, inputs["x"].dtype))
        return params, *fp8.forward(params, inputs["x"], formats=UNROUNDED)

    def backward(inputs, dy):
        params, _, kept = forward(inputs)
        residuals = linear.Residuals(inputs["x"]) if again else kept
        grads, dx = fp8.backward(params, residuals, dy, formats=UNROUNDED)
        return {"params": linear.Params(grads.weight, grads.bias), "x": dx}

    name = "fp8_of_x" if again else "fp8"
    return Case(name, {"params": linear.Params(weight, bias), "x": x}, lambda inputs: forward(inputs)[1], backward)
