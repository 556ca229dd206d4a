"""Linear layer whose products have factors of 8 bits (FP8; Micikevicius et al. 2022, arXiv:2209.05433).

    y = x̂ ŵ + β          x̂ = s Q(x / s)          and ŵ likewise, each with its own s

Q rounds to the nearest number of a format with 8 bits, of which e4m3 has numbers up to 448 with 4 significant bits, and
e5m2 numbers up to 57344 with 3. Beyond the largest Q clamps. A tensor has one scale s, the smallest power of two for
which the largest magnitude that is expected of it is not clamped. Dividing by a power of two rounds nothing, and s Q is
a bfloat16 number exactly. So the product of x̂ and ŵ is that of the 8-bit numbers themselves, times both scales; XLA
finds this pattern for a GPU and multiplies them as they are, summing in float32, and elsewhere it is the same product
of the same numbers in a wider dtype.

Backward: Q is a staircase, whose derivative is 0 or isn't there. It is taken to be 1 instead (the straight-through
estimator, Bengio et al. 2013, arXiv:1308.3432), where Q clamps too: ∂x = ∂x̂ and ∂w = ∂ŵ. With
y_nj = Σ_i x̂_ni ŵ_ij + β_j

    ∂x_ni = Σ_j ∂y_nj ŵ_ij             ∂w_ij = Σ_n x̂_ni ∂y_nj             ∂β_j = Σ_n ∂y_nj

These two products have 8-bit factors as well: ĝ, which is ∂y in e5m2, since gradients need its range more than the
bit, stands for ∂y. x̂ and ŵ are forward's. ∂β is no product, and sums ∂y itself.

    ∂x = ĝ ŵᵀ                          ∂w = Σ_N x̂ᵀ ĝ                       ∂β = Σ_N ∂y

What isn't finite has no scale, and becomes NaN. A tensor of zeros has the scale 1.

The magnitudes that are expected, of x, w and ∂y, come with the parameters (`largest`). Those that were seen come back
in that place of the gradients: whoever keeps them expects as much next time (delayed scaling). Without expectations a
tensor is read once more to find its own (current scaling).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxgpt.layers import linear
from jaxgpt.layers.numerics import accumulation_dtype, not_before

LEAST_EXPONENT, LARGEST_EXPONENT = -100, 100  # of scales, so that neither they nor what is scaled is out of range


class Formats(NamedTuple):
    """Formats of the factors; None rounds nothing, for proofs."""

    forward: DTypeLike | None
    backward: DTypeLike | None


E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FORMATS = Formats(E4M3, E5M2)


class Params(NamedTuple):
    weight: Float[Array, "in out"]
    bias: Float[Array, "out"] | None = None
    largest: Float[Array, "3"] | None = None  # expected magnitudes of x, w, ∂y; None takes their own


class Quantised(NamedTuple):
    """A tensor of 8 bits a number: scale · codes. As residuals it is x̂."""

    codes: Float[Array, "*shape"]
    scale: Float[Array, ""]
    largest: Float[Array, ""]  # magnitude that was seen

    def numbers(self, dtype: DTypeLike) -> Float[Array, "*shape"]:
        """Returns the numbers that the codes stand for, which any dtype from bfloat16 on has exactly."""
        return self.codes.astype(dtype) * self.scale.astype(dtype)


def scale_of(largest: Float[Array, "*shape"], form: DTypeLike) -> Float[Array, "*shape"]:
    """Returns the scale for numbers up to this magnitude; 1 where it is 0, or isn't finite."""
    mantissa, exponent = jnp.frexp(largest / float(jnp.finfo(form).max))  # mantissa · 2^exponent, mantissa in [½, 1)
    exponent = jnp.clip(exponent - (mantissa == 0.5), LEAST_EXPONENT, LARGEST_EXPONENT)
    usual = jnp.isfinite(largest) & (largest > 0)
    return jnp.where(usual, jnp.ldexp(jnp.ones_like(largest), jnp.where(usual, exponent, 0)), 1)


def quantise(x: Float[Array, "*shape"], form: DTypeLike | None, expected: Float[Array, ""] | None = None) -> Quantised:
    """Returns x in this format, with the scale for what is expected of it, or for what it has."""
    wide = x.astype(accumulation_dtype(x.dtype))
    largest = _largest(wide)
    scale = scale_of(largest if expected is None else expected, E4M3 if form is None else form)
    if form is None:
        return Quantised(wide / scale, scale, largest)
    limit = float(jnp.finfo(form).max)
    codes = jnp.where(jnp.isfinite(wide), jnp.clip(wide / scale, -limit, limit), jnp.nan)
    return Quantised(codes.astype(form), scale, largest)


def _largest(x: Float[Array, "*batch C"]) -> Float[Array, ""]:
    """Returns max |x|, by columns first: a GPU finds it in the same kernel as sums over tokens, as that of a bias."""
    columns = jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)))
    return jnp.max(lax.optimization_barrier(columns))  # without the barrier XLA makes one maximum of the two


def _expected(params: Params, place: int) -> Float[Array, ""] | None:
    return None if params.largest is None else params.largest[place]


def _weight(params: Params, formats: Formats) -> Quantised:
    return quantise(params.weight, formats.forward, _expected(params, 1))


@jax.named_scope("fp8.forward")
def forward(
    params: Params, x: Float[Array, "*batch in"], *, formats: Formats = FORMATS
) -> tuple[Float[Array, "*batch out"], Quantised]:
    """Returns y, summed in the accumulation dtype, in the dtype of x."""
    quantised = quantise(x, formats.forward, _expected(params, 0))
    weight = _weight(params, formats).numbers(x.dtype)
    y, _ = linear.forward(linear.Params(weight, params.bias), quantised.numbers(x.dtype))
    # Without the barrier XLA would make a GELU that follows a part of the product, and has no such one of 8 bits.
    return lax.optimization_barrier(y), quantised


@jax.named_scope("fp8.forward")
def forward_in_parts(
    params: Params, x: Float[Array, "*batch in"], parts: int | Sequence[int], *, formats: Formats = FORMATS
) -> tuple[list[Float[Array, "*batch part"]], Quantised]:
    """Like `forward`, with the output's columns in parts, as `linear.forward_in_parts` has them."""
    quantised = quantise(x, formats.forward, _expected(params, 0))
    whole = linear.Params(_weight(params, formats).numbers(x.dtype), params.bias)
    return linear.forward_in_parts(whole, quantised.numbers(x.dtype), parts)[0], quantised


@jax.named_scope("fp8.backward")
def backward(
    params: Params,
    residuals: Quantised | linear.Residuals,
    dy: Float[Array, "*batch out"],
    *,
    formats: Formats = FORMATS,
) -> tuple[Params, Float[Array, "*batch in"]]:
    """Gradients of the parameters in the accumulation dtype, and in the place of `largest` the magnitudes that were
    seen; dx in the dtype of dy. Of residuals that are x itself, x̂ is computed again.
    """
    x = residuals
    if isinstance(x, linear.Residuals):
        x = quantise(not_before(dy, x.x), formats.forward, _expected(params, 0))
    weight, gradient = _weight(params, formats), quantise(dy, formats.backward, _expected(params, 2))
    dense, kept = linear.Params(weight.numbers(dy.dtype)), linear.Residuals(x.numbers(dy.dtype))
    dweight, dx = linear.backward(dense, kept, gradient.numbers(dy.dtype))
    rows = dy.reshape(-1, dy.shape[-1])
    dbias = None if params.bias is None else jnp.sum(rows, axis=0, dtype=accumulation_dtype(dy.dtype))
    return Params(dweight.weight, dbias, jnp.stack([x.largest, weight.largest, gradient.largest])), dx
