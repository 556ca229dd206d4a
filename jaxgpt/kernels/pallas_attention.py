"""Causal attention by fused kernels of our own, written in Pallas for Triton (Dao 2023, FlashAttention-2,
arXiv:2307.08691, algorithms 1 and 2).

The same function as `layers/attention.py`, whose scores never leave the chip here. A program of the grid has a tile of
R queries, and walks over the tiles of keys that they see. Of all scores so far it has each query's maximum m, the sum
l = Σ exp(s - m) and the output o = Σ exp(s - m) v. With a further tile's scores s (Milakov and Gimelshein 2018,
arXiv:1805.02867):

    m' = max(m, max s)        c = exp(m - m')        l ← c l + Σ exp(s - m')        o ← c o + exp(s - m') v

At the end out = o / l, and the logsumexp m + log l is kept. Backward has two kernels, in each of which a program sums
what it writes alone, so that the same bits come out every time:

    dq       a tile of queries over the keys that they see:       δ = Σ_D out ∂out,  ∂q = Σ_k ∂s k / √D
    dk, dv   a tile of keys over the queries that see them,
             those of all the query heads that share them:        ∂v = Σ_q p ∂out,  ∂k = Σ_q ∂s q / √D

with p = exp(s - logsumexp) and ∂s = p (∂out · v - δ). Scores are computed twice, which is 7 products where 5 would do,
but nothing is added up between programs.

What isn't seen has the lowest score rather than -∞. A query may see no key of its first tiles, in a window or beyond
the border of its document: then exp(s - m) is 1 there, and c is 0 as soon as a key is seen, as its own is at last.
Tiles that no query of a program sees are left out.

What it takes is in `choose.py`. No GPU has run it yet: it has been compiled for one, and interpreted on a CPU. On a
machine with one `python tests/kernels/compare_kernels.py` compares it with the blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxgpt.kernels import pallas
from jaxgpt.layers.attention import keys_seen
from jaxgpt.layers.numerics import accumulation_dtype

WIDEST = 256  # head, of which a tile has 16 rows in float32
LEAST = 16  # rows and columns of a product
TILE_BYTES = 16 * 1024  # of a tile's queries or keys: several of them are on the chip at once
WARPS = 4


class Residuals(NamedTuple):
    """Residuals in the layout of forward's inputs."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    out: Float[Array, "B T H D"]
    logsumexp: Float[Array, "B H T"]


class Sizes(NamedTuple):
    """Sizes of the padded arrays, and what else the kernels are made for."""

    B: int
    T: int
    H: int
    K: int
    D: int
    tile: int  # R, the queries or keys of a program
    scale: float
    window: int

    @property
    def group(self) -> int:
        return self.H // self.K

    @property
    def tiles(self) -> int:
        return self.T // self.tile


@jax.named_scope("attention.forward")
def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    block: int,
    starts: Int[Array, "B T"] | None = None,
    window: int = 0,
    masks: None = None,
) -> tuple[Float[Array, "B T H D"], Residuals]:
    """Returns attention's output and its residuals.

    `block` is the option of `layers/attention.py`, and changes nothing here. Dropout (`masks`) isn't offered.
    """
    sizes = _sizes(q, k, window)
    arrays = (_padded(q, sizes), _padded(k, sizes), _padded(v, sizes), _padded_starts(starts, sizes))
    out, logsumexp = _forward(sizes, *arrays)
    out, logsumexp = out[:, : q.shape[1], :, : q.shape[3]], logsumexp[..., : q.shape[1]]
    return out, Residuals(q, k, v, out, logsumexp)


@jax.named_scope("attention.backward")
def backward(
    residuals: Residuals,
    dout: Float[Array, "B T H D"],
    *,
    block: int,
    starts: Int[Array, "B T"] | None = None,
    window: int = 0,
    masks: None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Returns (dq, dk, dv), in the dtype of dout. All options are forward's."""
    *arrays, logsumexp = residuals
    q, k = arrays[:2]
    sizes = _sizes(q, k, window)
    T, D = q.shape[1], q.shape[3]
    q, k, v, out, dout_ = (_padded(array, sizes) for array in (*arrays, dout.astype(q.dtype)))
    logsumexp = _filled(logsumexp, (sizes.B, sizes.H, sizes.T))
    starts = _padded_starts(starts, sizes)
    dq, delta = _backward_queries(sizes, q, k, v, out, dout_, logsumexp, starts)
    dk, dv = _backward_keys(sizes, q, k, v, dout_, logsumexp, delta, starts)
    dq, dk, dv = (gradient[:, :T, :, :D].astype(dout.dtype) for gradient in (dq, dk, dv))
    return dq, dk, dv


def output(residuals: Residuals) -> Float[Array, "B T H D"]:
    """Forward's output, which its residuals hold."""
    return residuals.out


def with_inputs(residuals: Residuals, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Residuals:
    """Returns the residuals with queries and keys that were not kept, but computed again."""
    return residuals._replace(q=q, k=k)


# Sizes


def _sizes(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], window: int) -> Sizes:
    B, T, H, D = q.shape
    width = max(LEAST, pl.next_power_of_2(D))
    tile = min(64, max(LEAST, TILE_BYTES // (width * q.dtype.itemsize)), max(LEAST, pl.next_power_of_2(T)))
    return Sizes(B, -(-T // tile) * tile, H, k.shape[2], width, tile, 1 / math.sqrt(D), window)


def _padded(x: Float[Array, "B T n D"], sizes: Sizes) -> Float[Array, "B Tp n Dp"]:
    """Fills tiles up with tokens, which come after all others and so are seen by none, and heads with zeros."""
    return _filled(x, (sizes.B, sizes.T, x.shape[2], sizes.D))


def _filled(x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Fills an array up to a shape with zeros. One that has it is returned itself, so that XLA copies nothing."""
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, size - had) for size, had in zip(shape, x.shape, strict=True)])


def _padded_starts(starts: Int[Array, "B T"] | None, sizes: Sizes) -> Int[Array, "B Tp"] | None:
    """Puts the tokens that fill up a tile into the last document."""
    return None if starts is None else jnp.pad(starts, ((0, 0), (0, sizes.T - starts.shape[1])), mode="edge")


# Kernels. Their references are to a tile's rows, or to all tokens of a head.


def _forward_kernel(sizes: Sizes, q_ref, k_ref, v_ref, starts_ref, out_ref, logsumexp_ref) -> None:
    tile, place = sizes.tile, pl.program_id(0)
    q = q_ref[...]
    starts = None if starts_ref is None else starts_ref[...]
    dtype = accumulation_dtype(q.dtype)

    def turn(number, carry):
        largest, total, out = carry
        keys = pl.ds(number * tile, tile)
        scores = _scores(sizes, q, k_ref[keys, :], place, number, starts)
        before, largest = largest, jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - largest[:, None])
        kept = jnp.exp(before - largest)
        total = kept * total + jnp.sum(weights, axis=1)
        v = v_ref[keys, :]
        return largest, total, kept[:, None] * out + _product(weights.astype(v.dtype), v, (1, 0))

    start = jnp.full(tile, _lowest(dtype)), jnp.zeros(tile, dtype), jnp.zeros((tile, sizes.D), dtype)
    largest, total, out = lax.fori_loop(_first_keys(sizes, place, starts), place + 1, turn, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    logsumexp_ref[...] = largest + jnp.log(total)


def _backward_queries_kernel(
    sizes: Sizes, q_ref, k_ref, v_ref, out_ref, dout_ref, logsumexp_ref, starts_ref, dq_ref, delta_ref
) -> None:
    tile, place = sizes.tile, pl.program_id(0)
    q, dout, logsumexp = q_ref[...], dout_ref[...], logsumexp_ref[...]
    starts = None if starts_ref is None else starts_ref[...]
    dtype = accumulation_dtype(q.dtype)
    delta = jnp.sum(out_ref[...].astype(dtype) * dout.astype(dtype), axis=1)

    def turn(number, dq):
        keys = pl.ds(number * tile, tile)
        k = k_ref[keys, :]
        p = jnp.exp(_scores(sizes, q, k, place, number, starts) - logsumexp[:, None])
        ds = p * (_product(dout, v_ref[keys, :], (1, 1)) - delta[:, None])
        return dq + _product(ds.astype(k.dtype), k, (1, 0))

    first = _first_keys(sizes, place, starts)
    dq = lax.fori_loop(first, place + 1, turn, jnp.zeros((tile, sizes.D), dtype))
    dq_ref[...] = (dq * sizes.scale).astype(dq_ref.dtype)
    delta_ref[...] = delta


def _backward_keys_kernel(
    sizes: Sizes, q_ref, k_ref, v_ref, dout_ref, logsumexp_ref, delta_ref, starts_ref, ends_ref, dk_ref, dv_ref
) -> None:
    """The references to queries, and to what belongs to them, are to those of all heads of the group."""
    tile, place = sizes.tile, pl.program_id(0)
    k, v = k_ref[...], v_ref[...]
    last = sizes.tiles
    if sizes.window:
        last = jnp.minimum(last, _quotient((place + 1) * tile - 2 + sizes.window, tile) + 1)
    if ends_ref is not None:
        last = jnp.minimum(last, ends_ref[...])

    def of_head(head, carry):
        def turn(number, carry):
            dk, dv = carry
            rows = pl.ds(number * tile, tile)
            q, dout = q_ref[rows, head, :], dout_ref[rows, head, :]
            starts = None if starts_ref is None else starts_ref[rows]
            p = jnp.exp(_scores(sizes, q, k, number, place, starts) - logsumexp_ref[head, rows][:, None])
            dv = dv + _product(p.astype(dout.dtype), dout, (0, 0))
            ds = p * (_product(dout, v, (1, 1)) - delta_ref[head, rows][:, None])
            return dk + _product(ds.astype(q.dtype), q, (0, 0)), dv

        return lax.fori_loop(place, last, turn, carry)

    zeros = jnp.zeros((tile, sizes.D), accumulation_dtype(k.dtype))
    dk, dv = lax.fori_loop(0, sizes.group, of_head, (zeros, zeros))
    dk_ref[...] = (dk * sizes.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _scores(
    sizes: Sizes,
    q: Float[Array, "R D"],
    k: Float[Array, "R D"],
    queries: Int[Array, ""],
    keys: Int[Array, ""],
    starts: Int[Array, " R"] | None,
) -> Float[Array, "R R"]:
    """Returns q kᵀ / √D of these tiles of queries and keys; the lowest number where a query doesn't see the key."""
    scores = _product(q, k, (1, 1)) * sizes.scale
    query = queries * sizes.tile + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    key = keys * sizes.tile + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    visible = key <= query
    if sizes.window:
        visible &= key > query - sizes.window
    if starts is not None:
        visible &= key >= starts[:, None]
    return jnp.where(visible, scores, _lowest(scores.dtype))


def _first_keys(sizes: Sizes, queries: Int[Array, ""], starts: Int[Array, " R"] | None) -> Int[Array, ""]:
    """Returns the number of the first tile of keys of which a query of this tile sees one."""
    first = queries * 0
    if sizes.window:
        first = jnp.maximum(queries * sizes.tile - sizes.window + 1, first)
    if starts is not None:
        first = jnp.maximum(jnp.min(starts), first)
    return _quotient(first, sizes.tile)


def _quotient(a: Int[Array, ""], b: int) -> Int[Array, ""]:
    """Returns a // b for numbers that aren't negative."""
    return lax.div(a, jnp.asarray(b, a.dtype))


def _product(a: Float[Array, "_ _"], b: Float[Array, "_ _"], summed: tuple[int, int]) -> Float[Array, "_ _"]:
    """Returns the product summed over these axes, in the accumulation dtype."""
    axes = ((summed[0],), (summed[1],)), ((), ())
    return lax.dot_general(a, b, axes, preferred_element_type=accumulation_dtype(a.dtype))


def _lowest(dtype: Any) -> float:
    """Returns the number that stands for -∞: half the lowest, so that a difference of two is finite."""
    return float(jnp.finfo(dtype).min) / 2


# Calls


def _forward(
    sizes: Sizes,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    starts: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    shapes = q, _row_shape(sizes, q)
    row, rows, keys = _specs_of_queries(sizes)
    return _call(
        _forward_kernel, sizes, sizes.H, 2, shapes, (rows, keys, keys, _starts_spec(sizes, starts)), (rows, row)
    )(q, k, v, starts)


def _backward_queries(sizes: Sizes, q, k, v, out, dout, logsumexp, starts) -> tuple[Array, Array]:
    """Returns dq and δ."""
    shapes = q, _row_shape(sizes, q)
    row, rows, keys = _specs_of_queries(sizes)
    specs = (rows, keys, keys, rows, rows, row, _starts_spec(sizes, starts))
    arrays = (q, k, v, out, dout, logsumexp, starts)
    return _call(_backward_queries_kernel, sizes, sizes.H, 3, shapes, specs, (rows, row))(*arrays)


def _backward_keys(sizes: Sizes, q, k, v, dout, logsumexp, delta, starts) -> tuple[Array, Array]:
    """Returns dk and dv."""
    T, tile, D, G = sizes.T, sizes.tile, sizes.D, sizes.group
    rows = pl.BlockSpec((None, tile, None, D), lambda place, head, text: (text, place, head, 0))
    queries = pl.BlockSpec((None, T, G, D), lambda place, head, text: (text, 0, head, 0))
    of_queries = pl.BlockSpec((None, G, T), lambda place, head, text: (text, head, 0))
    starts_spec = ends_spec = ends = None
    if starts is not None:
        # The tiles of queries before the end of the last document that has begun by the tile's last key.
        last = tile * jnp.arange(1, sizes.tiles + 1, dtype=jnp.int32) - 1
        ends = jnp.sum(starts[:, None] <= last[:, None], axis=-1, dtype=jnp.int32)
        ends = (ends + tile - 1) // tile
        starts_spec = pl.BlockSpec((None, T), lambda place, head, text: (text, 0))
        ends_spec = pl.BlockSpec((None, None), lambda place, head, text: (text, place))
    specs = (queries, rows, rows, queries, of_queries, of_queries, starts_spec, ends_spec)
    arrays = (q, k, v, dout, logsumexp, delta, starts, ends)
    return _call(_backward_keys_kernel, sizes, sizes.K, 4, (k, v), specs, (rows, rows))(*arrays)


def _specs_of_queries(sizes: Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Returns where a program finds its queries' numbers, such as the logsumexp, their rows, and the keys they see."""
    T, tile, D, G = sizes.T, sizes.tile, sizes.D, sizes.group
    return (
        pl.BlockSpec((None, None, tile), lambda place, head, text: (text, head, place)),
        pl.BlockSpec((None, tile, None, D), lambda place, head, text: (text, place, head, 0)),
        pl.BlockSpec((None, T, None, D), lambda place, head, text: (text, 0, _quotient(head, G), 0)),
    )


def _starts_spec(sizes: Sizes, starts: Int[Array, "B T"] | None) -> pl.BlockSpec | None:
    spec = pl.BlockSpec((None, sizes.tile), lambda place, head, text: (text, place))
    return None if starts is None else spec


def _row_shape(sizes: Sizes, q: Float[Array, "B T H D"]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((sizes.B, sizes.H, sizes.T), accumulation_dtype(q.dtype))


def _call(
    kernel: Callable, sizes: Sizes, heads: int, products: int, shapes: Any, in_specs: Any, out_specs: Any
) -> Callable:
    """Returns the kernel as a function of arrays, with so many products of half of the square."""
    operations = products * 2 * sizes.B * sizes.H * sizes.T * keys_seen(sizes.T, sizes.window) * sizes.D
    bound = functools.partial(kernel, sizes)
    grid = (sizes.tiles, heads, sizes.B)
    return pallas.call(bound, shapes, grid, warps=WARPS, specs=(in_specs, list(out_specs)), operations=operations)
