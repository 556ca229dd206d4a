"""Rotary positions (Su et al. 2021, arXiv:2104.09864, equation 34), with the pairs half a head apart.

Columns i and i + D/2 of a head are a pair, which the place n of its token turns by the angle n ω_i, ω_i = base^(-2i/D):

    y_i = x_i cos - x_{i+D/2} sin           y_{i+D/2} = x_{i+D/2} cos + x_i sin

So the product of a turned query and a turned key depends on how far apart they are, and not on where. Backward: a turn
is orthogonal, so the gradient is turned back, by the opposite angle:

    ∂x_i = ∂y_i cos + ∂y_{i+D/2} sin        ∂x_{i+D/2} = ∂y_{i+D/2} cos - ∂y_i sin

The paper, and Meta's files of Llama, pair neighbours; which columns are a pair is a permutation of the weights before.
Llama's weights, as Hugging Face has them, are for halves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.layers.numerics import accumulation_dtype


class Frequencies(NamedTuple):
    """The frequencies ω_i, by their base and their scaling for a context longer than was trained.

    A frequency that has t_i = original_context ω_i / 2π turns in the original context becomes (Llama 3.1, Grattafiori
    et al. 2024, arXiv:2407.21783)

        ω_i ((1 - s_i) / factor + s_i)          s_i = (t_i - low) / (high - low), within 0 and 1

    so that fast ones, which tell near places apart, stay, and slow ones are divided by the factor. With `linear` all
    are (s_i = 0; Chen et al. 2023, arXiv:2306.15595). A factor of 1 scales nothing.
    """

    base: float = 10_000.0
    factor: float = 1.0
    linear: bool = False
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192

    def values(self, width: int) -> np.ndarray:
        """Returns the frequencies of heads of this width, half as many, in float64."""
        plain = self.base ** (-np.arange(0, width, 2) / width)
        turns = self.original_context * plain / (2 * np.pi)
        kept = 0 if self.linear else np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * ((1 - kept) / self.factor + kept)


PLAIN = Frequencies()


@jax.named_scope("rotary.forward")
def forward(
    x: Float[Array, "B T H D"], places: Int[Array, "#B T"], *, frequencies: Frequencies = PLAIN
) -> Float[Array, "B T H D"]:
    """Computes in the accumulation dtype; the output has the dtype of x. Nothing is kept for backward. D is even."""
    cos, sin = _turns(x, places, frequencies)
    first, second = _halves(x)
    y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return y.astype(x.dtype)


@jax.named_scope("rotary.backward")
def backward(
    dy: Float[Array, "B T H D"], places: Int[Array, "#B T"], *, frequencies: Frequencies = PLAIN
) -> Float[Array, "B T H D"]:
    """The gradient by x, in the dtype of dy. `places` and `frequencies` are forward's."""
    cos, sin = _turns(dy, places, frequencies)
    first, second = _halves(dy)
    dx = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return dx.astype(dy.dtype)


def _turns(
    x: Float[Array, "B T H D"], places: Int[Array, "b T"], frequencies: Frequencies
) -> tuple[Float[Array, "b T 1 half"], Float[Array, "b T 1 half"]]:
    """The cosines and sines of each place's angles, the same for all heads."""
    dtype = accumulation_dtype(x.dtype)
    angles = places[:, :, None, None].astype(dtype) * frequencies.values(x.shape[-1]).astype(dtype)
    return jnp.cos(angles), jnp.sin(angles)


def _halves(x: Float[Array, "B T H D"]) -> tuple[Float[Array, "B T H half"], Float[Array, "B T H half"]]:
    first, second = jnp.split(x.astype(accumulation_dtype(x.dtype)), 2, axis=-1)
    return first, second
