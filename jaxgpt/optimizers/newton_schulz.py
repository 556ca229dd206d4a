"""Orthogonalisation of matrices by Newton-Schulz iterations (Björck and Bowie 1971; Higham 2008, chapter 8).

    X ← M / (1.02 ‖M‖_F)
    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X          five times, each time with other a, b, c

With M = U S Vᵀ, (X Xᵀ)ᵏ X = U Σ²ᵏ⁺¹ Vᵀ where X = U Σ Vᵀ: U and V stay, and each singular value σ becomes
p(σ) = a σ + b σ³ + c σ⁵. If all of them come close to 1, X is close to U Vᵀ, the nearest matrix with orthonormal rows,
or columns. It takes products alone, and no SVD.

The coefficients are those of Polar Express (Amsel et al. 2025, arXiv:2505.16932, algorithm 1 and appendix G): each p is
the odd polynomial of degree 5 that is nearest to 1 on the interval in which the one before it left the singular values,
beginning with [0.001, 1], with a safety factor of 1.02 for rounding and a cushion of 0.02, as modded-nanogpt and
nanochat have them. Singular values from 0.001 to 1 end between 0.8588 and 1.1412, and smaller ones grow by at most 990.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype, product

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02  # keeps the largest singular value below 1 when the norm is rounded
EPSILON = 1e-8  # added to the norm: zeros stay zeros, and what decays without new gradients fades in the end
TOGETHER = 1 << 24  # numbers of the matrices that are multiplied at once; of larger ones one after another


def orthogonalise(matrices: Float[Array, "S M N"]) -> Float[Array, "S M N"]:
    """Returns the nearly orthogonal matrices of these, with products in their dtype and sums in the accumulation dtype.

    Products are fewest where M is at most N. A matrix's transpose has the transpose as its result.
    """
    numbers = math.prod(matrices.shape[1:])
    return lax.map(_orthogonalised, matrices, batch_size=max(1, TOGETHER // numbers))


def _orthogonalised(matrix: Float[Array, "M N"]) -> Float[Array, "M N"]:
    dtype = matrix.dtype
    wide = matrix.astype(accumulation_dtype(matrix.dtype))
    norm = jnp.sqrt(jnp.sum(jnp.square(wide)))
    x = (wide / (SAFETY * (norm + EPSILON))).astype(dtype)
    for a, b, c in COEFFICIENTS:
        gram = product("mn,kn->mk", x, x, dtype=dtype)
        polynomial = b * gram + c * product("mk,kl->ml", gram, gram, dtype=dtype)
        x = a * x + product("mk,kn->mn", polynomial, x, dtype=dtype)
    return x


def operations(rows: int, columns: int) -> int:
    """Operations of one matrix's products: of each iteration 2M²N for the Gram matrix, 2M³, and 2M²N."""
    M, N = sorted((rows, columns))
    return len(COEFFICIENTS) * (4 * M * M * N + 2 * M**3)
