"""Random numbers: the very ones of `jax.random`, in a form that a CPU draws several times as fast.

JAX lowers its generator, threefry (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3), as
a loop over whole arrays on a CPU, to compile fast; each turn goes through memory. Written out, its 20 rounds and what
is done with the result are one pass, which keeps nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt

PARITY = 0x1BD11BDA  # of the key schedule
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of the rounds, four by four
COUNTED = 2**32  # numbers that one word counts


def bits(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike = jnp.uint32) -> UInt[Array, "..."]:
    """Random bits as unsigned integers of 8, 16 or 32 bits."""
    if not _counted_by_one_word(key, shape):
        return jax.random.bits(key, shape, dtype)
    return _bits_from(jnp.uint32(0), key, shape, dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))  # its many operations are traced once for a shape
def normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Normal(0, 1): √2 erf⁻¹(u) of u uniform in (-1, 1)."""
    if dtype != jnp.float32 or not _counted_by_one_word(key, shape):
        return jax.random.normal(key, shape, dtype)
    if len(shape) < 3:
        return _normal_from(jnp.uint32(0), key, shape)
    # A loop over the first axis: where its parts are all that is wanted, the compiler would write a program for each.
    part = shape[1:]
    return lax.map(
        lambda place: _normal_from(place * jnp.uint32(math.prod(part)), key, part),
        jnp.arange(shape[0], dtype=jnp.uint32),
    )


def bits_at(key: Key[Array, ""], first: UInt[Array, "..."], second: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Random bits, as unsigned integers of 32 bits, of places that two words count and that broadcast.

    They are a pure function of the key and the place, whatever other places are asked for. The key is one of threefry.
    """
    first, second = jnp.broadcast_arrays(first, second)
    words = _threefry(jax.random.key_data(key), second, first)
    return words[0] ^ words[1]


def _normal_from(first: UInt[Array, ""], key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Normal numbers whose place begins at `first`."""
    words = _bits_from(first, key, shape, jnp.uint32)
    # 23 bits below a one's exponent are a number in [1, 2).
    ones = lax.bitcast_convert_type(words >> 9 | jnp.uint32(0x3F800000), jnp.float32)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum((ones - 1) * (1 - least) + least, least)
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


def _bits_from(
    first: UInt[Array, ""], key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike
) -> UInt[Array, "..."]:
    """Random bits whose place begins at `first`."""
    words = _threefry(jax.random.key_data(key), first + _places(shape))
    return lax.convert_element_type(words[0] ^ words[1], dtype)


def _counted_by_one_word(key: Key[Array, ""], shape: tuple[int, ...]) -> bool:
    """Returns whether these are threefry's numbers whose places are below 2³², as of all but the largest models."""
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    return partitionable and str(jax.random.key_impl(key)) == "threefry2x32" and math.prod(shape) < COUNTED


def _places(shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """Each number's place among all. Counted along each axis, so that a device counts its own part alone."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    counts = [lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride) for axis, stride in enumerate(strides)]
    return sum(counts, jnp.zeros(shape, jnp.uint32))


def _threefry(
    key: UInt[Array, "2"], places: UInt[Array, "..."], higher: UInt[Array, "..."] | None = None
) -> tuple[UInt[Array, "..."], UInt[Array, "..."]]:
    """Two random words of each place, a counter of two words of which the higher is 0 unless it is given."""
    schedule = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY)
    x, y = schedule[0] if higher is None else higher + schedule[0], places + schedule[1]
    for turn in range(5):
        for distance in ROTATIONS[turn % 2]:
            x = x + y
            y = x ^ (y << distance | y >> (32 - distance))
        x = x + schedule[(turn + 1) % 3]
        y = y + schedule[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return x, y
