"""Softmax cross-entropy by a fused kernel of our own, written in Pallas for Triton.

The same function as `layers/cross_entropy.py`, with its gradient at once: XLA reads the logits from memory for their
logsumexp and again for the gradient. Here a program has a row of them, and walks over it twice in pieces of W columns.

    first       the row's maximum m and the sum l = Σ exp(z - m), merged piece by piece (Milakov and Gimelshein 2018,
                arXiv:1805.02867); the logsumexp is m + log l, and the loss logsumexp - z[target]
    second      exp(z - logsumexp) - onehot(target), which is ∂loss/∂z

A row has 200 kB at GPT-2's vocabulary, and those of all programs that run at once fit a recent card's second-level
cache, so that the second walk need not go to memory.

No GPU has run this kernel yet: it has been compiled for one, and interpreted on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxgpt.kernels import pallas
from jaxgpt.layers.cross_entropy import IGNORED

PIECE = 4096  # columns, W
WARPS = 8


@jax.named_scope("cross_entropy.forward")
def forward(
    logits: Float[Array, "N Vp"], targets: Int[Array, " N"], *, vocabulary_size: int, dtype: DTypeLike
) -> tuple[Float[Array, " N"], Float[Array, "N Vp"]]:
    """Returns the loss of each token in nats, and its gradient by the logits in `dtype`.

    Of an IGNORED target the loss is 0; its row of the gradient is any, for the caller to multiply by 0.
    """
    N, columns = logits.shape
    shapes = [jax.ShapeDtypeStruct((N,), logits.dtype), jax.ShapeDtypeStruct(logits.shape, dtype)]
    kernel = functools.partial(_softmax_kernel, columns, vocabulary_size)
    losses, dlogits = pallas.call(kernel, shapes, (N,), warps=WARPS)(logits, targets)
    return losses, dlogits


def _softmax_kernel(columns: int, vocabulary_size: int, z_ref, target_ref, loss_ref, dz_ref) -> None:
    row = pl.program_id(0)
    width = min(PIECE, pl.next_power_of_2(columns))
    pieces = _numbers(row, pl.cdiv(columns, width))
    target = target_ref[row]
    lowest = float(jnp.finfo(z_ref.dtype).min)  # for -∞, which could not be subtracted from

    def piece(number: Int[Array, ""]) -> tuple[Int[Array, " W"], Float[Array, " W"]]:
        """Returns a piece's columns and its logits, the lowest number beyond the vocabulary."""
        column = number * width + lax.broadcasted_iota(jnp.int32, (width,), 0)
        there = z_ref.at[row, pl.ds(number * width, width)]
        return column, triton.load(there, mask=column < vocabulary_size, other=lowest)

    def add(number: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        before, total = carry
        _, z = piece(number)
        largest = jnp.maximum(before, jnp.max(z))
        return largest, total * jnp.exp(before - largest) + jnp.sum(jnp.exp(z - largest))

    start = jnp.full((), lowest, z_ref.dtype), jnp.zeros((), z_ref.dtype)
    largest, total = lax.fori_loop(*pieces, add, start)
    logsumexp = largest + jnp.log(total)
    at_target = z_ref[row, jnp.maximum(target, 0)]
    loss_ref[row] = jnp.where(target == IGNORED, 0, logsumexp - at_target)

    def write(number: Int[Array, ""], _: None) -> None:
        column, z = piece(number)
        dz = jnp.exp(z - logsumexp) - (column == target)
        there = dz_ref.at[row, pl.ds(number * width, width)]
        triton.store(there, dz.astype(dz_ref.dtype), mask=column < columns)

    lax.fori_loop(*pieces, write, None)


def _numbers(row: Int[Array, ""], count: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns 0 and a count, with 64-bit numbers too of the type that the row's number has."""
    return row * 0, row * 0 + count
