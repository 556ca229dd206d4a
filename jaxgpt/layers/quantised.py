"""Matrices that are not trained, in 8 or 4 bits a number, by blocks of 64.

Each block of 64 numbers w of one row has a scale, its largest magnitude m = max |w|, and keeps w / m as a code:

    int8     round(127 w / m), a whole number                     w ≈ m code / 127
    nf4      the nearest of the 16 levels below to w / m          w ≈ m level[code]

Weights of a trained matrix are close to normal. NF4's levels (Dettmers et al. 2023, arXiv:2305.14314, section 3) are
quantiles of a normal distribution, which uses 16 codes more equally than even steps; 0 and ±1 are exactly among them.
Two codes make a byte, the first in its higher half.

Scales in float32 take 32 / 64 = 0.5 bits a number. Double quantisation takes their mean away and keeps the rest in 8
bits itself, by blocks of 256: 8 / 64 + 32 / (64 · 256) = 0.127 bits. So NF4 takes 4.5 or 4.127 bits a number.

What is not trained needs no gradient, so this layer has no backward: a matrix is multiplied after `dequantise`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

BLOCK = 64  # numbers with a scale of their own
OF_SCALES = 256  # scales with a scale of their own, in double quantisation

# The quantiles of appendix E of the paper, as bitsandbytes has them.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


class Scales(NamedTuple):
    """A matrix's scales in 8 bits: mean + largest code / 127."""

    codes: Int8[Array, "groups 256"]  # the last of them filled up with zeros
    largest: Float[Array, " groups"]
    mean: Float[Array, ""]


class Int8Matrix(NamedTuple):
    codes: Int8[Array, "*in blocks 64"]
    scales: Float[Array, "*in blocks"] | Scales


class NF4Matrix(NamedTuple):
    codes: UInt8[Array, "*in blocks 32"]
    scales: Float[Array, "*in blocks"] | Scales


def is_quantised(leaf: Any) -> bool:
    """Returns whether this is a matrix of this module; for `jax.tree.map(..., is_leaf=is_quantised)`."""
    return isinstance(leaf, Int8Matrix | NF4Matrix)


def quantise(weight: Float[Array, "*in out"], form: str, *, double: bool = False) -> Int8Matrix | NF4Matrix:
    """Returns a matrix in `form`, "int8" or "nf4", with its scales in 8 bits too where `double`.

    The last axis is a multiple of 64. A block of zeros has the scale 0, and comes back as zeros.
    """
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    kept = _quantised_scales(scales) if double else scales
    relative = blocks / jnp.where(scales > 0, scales, 1)[..., None]
    if form == "int8":
        return Int8Matrix(jnp.round(127 * relative).astype(jnp.int8), kept)
    codes = jnp.searchsorted(jnp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2), relative).astype(jnp.uint8)
    return NF4Matrix(codes[..., 0::2] << 4 | codes[..., 1::2], kept)


def dequantise(matrix: Int8Matrix | NF4Matrix, dtype: DTypeLike) -> Float[Array, "*in out"]:
    """Returns the numbers that the codes stand for, computed in float32."""
    codes = matrix.codes
    scales = _scales(matrix.scales, codes.shape[:-1])[..., None]
    if isinstance(matrix, Int8Matrix):
        numbers = codes.astype(jnp.float32) * (scales / 127)
    else:
        both = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], BLOCK)
        numbers = jnp.asarray(LEVELS)[both] * scales
    return numbers.astype(dtype).reshape(*codes.shape[:-2], -1)


def _quantised_scales(scales: Float[Array, "*in blocks"]) -> Scales:
    mean = jnp.mean(scales)
    flat = (scales - mean).reshape(-1)
    groups = jnp.pad(flat, (0, -flat.size % OF_SCALES)).reshape(-1, OF_SCALES)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    codes = jnp.round(127 * groups / jnp.where(largest > 0, largest, 1)[:, None])
    return Scales(codes.astype(jnp.int8), largest, mean)


def _scales(scales: Float[Array, "*in blocks"] | Scales, shape: tuple[int, ...]) -> Float[Array, "*in blocks"]:
    if not isinstance(scales, Scales):
        return scales
    numbers = scales.mean + scales.codes.astype(jnp.float32) * (scales.largest / 127)[:, None]
    return numbers.reshape(-1)[: int(np.prod(shape))].reshape(shape)
