"""Dropout (Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting").

    y = m x           m = 1 / (1 - p) with probability 1 - p, else 0

for each number by itself, so that the mean of m is 1 and nothing has to be scaled where there is no dropout. Backward:
y_i depends on x_i alone, and m does not depend on x, so

    ∂x_i = Σ_j ∂y_j ∂y_j/∂x_i = m_i ∂y_i

which is forward's own formula on ∂y. No mask is kept: m is a pure function of a key and of the number's place, and
backward draws it again. A number is dropped where 32 random bits, counted by the number's place, are below p 2³². The
place is that of the sequence among all of the step's, and that within the sequence. So the masks of a step are the same
however its sequences are divided among devices and micro-batches, however blocks of attention cut the scores, and
whatever is computed again. Two words count places; where 2³² of one are not enough, masks repeat.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jaxgpt.layers import random
from jaxgpt.layers.numerics import accumulation_dtype, not_before


class Masks(NamedTuple):
    """All that masks depend on. A function that is given None in place of it drops nothing."""

    key: Key[Array, ""]
    rows: Int[Array, " S"]  # each sequence's place among all of the step's
    rate: float  # p, at least 0 and below 1

    def at(self, place: int | Int[Array, ""]) -> "Masks":
        """Returns the masks of another place in the model: a layer, or one of the places of a layer."""
        return self._replace(key=jax.random.fold_in(self.key, place))

    def of_texts(self, count: int) -> UInt[Array, " B"]:
        """Returns each text's place among all of the step's, of `count` texts in these rows, as many in each."""
        each = count // self.rows.size
        return (self.rows[:, None] * each + jnp.arange(each)).astype(jnp.uint32).reshape(-1)

    def keeps(self, first: UInt[Array, "..."], second: UInt[Array, "..."]) -> Bool[Array, "..."]:
        """Marks the numbers that stay, by their places: two words that broadcast against each other."""
        return random.bits_at(self.key, first, second) >= jnp.uint32(round(self.rate * 2**32))


@jax.named_scope("dropout.forward")
def forward(x: Float[Array, "*batch C"], masks: Masks | None) -> Float[Array, "*batch C"]:
    """Returns y; the first axes of x count the rows of the masks, and what is in each."""
    if masks is None:
        return x
    wide = x.astype(accumulation_dtype(x.dtype))
    return jnp.where(_keep(masks, x.shape), wide / (1 - masks.rate), 0).astype(x.dtype)


@jax.named_scope("dropout.backward")
def backward(masks: Masks | None, dy: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Returns dx. The masks are forward's."""
    if masks is None:
        return dy
    wide = dy.astype(accumulation_dtype(dy.dtype))
    return jnp.where(_keep(again(masks, dy), dy.shape), wide / (1 - masks.rate), 0).astype(dy.dtype)


def again(masks: Masks, gradient: Float[Array, "..."]) -> Masks:
    """Returns the same masks, which are drawn once there is the gradient.

    The compiler would find out that it has drawn them in the forward pass, and keep those.
    """
    data = not_before(gradient, jax.random.key_data(masks.key))
    return masks._replace(key=jax.random.wrap_key_data(data, impl=jax.random.key_impl(masks.key)))


def _keep(masks: Masks, shape: tuple[int, ...]) -> Bool[Array, "*batch C"]:
    """Marks the numbers of an array of this shape that stay."""
    rows = masks.rows.astype(jnp.uint32)[:, None]
    places = jnp.arange(math.prod(shape) // masks.rows.size, dtype=jnp.uint32)
    return masks.keeps(rows, places[None]).reshape(shape)
