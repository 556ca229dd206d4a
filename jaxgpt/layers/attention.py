"""Causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1), in blocks of queries.

    s = q kᵀ / √D           p = softmax of s over the keys up to the query's own place           out = p v

Backward, with δ = Σ_D out ∂out for each query (which is Σ_k p ∂p, the softmax's own term):

    ∂v = pᵀ ∂out           ∂p = ∂out vᵀ           ∂s = p (∂p - δ)           ∂q = ∂s k / √D           ∂k = ∂sᵀ q / √D

Of the T×T square only one block of queries exists at a time, against just the keys that its last query may see.
Nothing of it is kept but each query's logsumexp, from which p = exp(s - logsumexp) comes back in one step (Dao et al.
2022, arXiv:2205.14135, algorithms 1 and 4; Milakov and Gimelshein 2018, arXiv:1805.02867).

With `starts`, the place where each token's document begins, a query sees no key before it. The formulas stay: p is 0
there, and so is ∂s.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers.numerics import accumulation_dtype, not_before, product


class Residuals(NamedTuple):
    """Residuals, all with the heads first, as the products want them."""

    q: Float[Array, "B H T D"]
    k: Float[Array, "B H T D"]
    v: Float[Array, "B H T D"]
    out: Float[Array, "B H T D"]
    logsumexp: Float[Array, "B H T"]


@jax.named_scope("attention.forward")
def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    *,
    block: int,
    starts: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H D"], Residuals]:
    """`block` is the number of queries whose scores exist at once. Scores are in the accumulation dtype."""
    q, k, v = _swap(q), _swap(k), _swap(v)
    outs, logsumexps = [], []
    for rows in _blocks(q.shape[2], block):
        scores = _scores(q[:, :, rows], k[:, :, : rows.stop], rows, starts)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, : rows.stop]) / total
        outs.append(out.astype(v.dtype))
        logsumexps.append((largest + jnp.log(total))[..., 0])
    out = jnp.concatenate(outs, axis=2)
    return _swap(out), Residuals(q, k, v, out, jnp.concatenate(logsumexps, axis=2))


@jax.named_scope("attention.backward")
def backward(
    residuals: Residuals, dout: Float[Array, "B T H D"], *, block: int, starts: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """Returns (dq, dk, dv), in the dtype of dout. `block` and `starts` are forward's."""
    q, k, v, out, logsumexp = residuals
    q, k, v = not_before(dout, (q, k, v))  # the scores are computed again
    dtype, dout = accumulation_dtype(dout.dtype), _swap(dout)
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), axis=-1, keepdims=True)
    scale = 1 / math.sqrt(q.shape[-1])
    dqs, dks, dvs = [], [], []
    for rows in _blocks(q.shape[2], block):
        seen = slice(0, rows.stop)
        p = jnp.exp(_scores(q[:, :, rows], k[:, :, seen], rows, starts) - logsumexp[:, :, rows, None])
        dp = product("bhqd,bhkd->bhqk", dout[:, :, rows], v[:, :, seen])
        ds = (p * (dp - delta[:, :, rows]) * scale).astype(q.dtype)
        dqs.append(product("bhqk,bhkd->bhqd", ds, k[:, :, seen]))
        # The transposes of ∂k and ∂v: a CPU takes half as long again for the products that give these themselves.
        dks.append(product("bhqd,bhqk->bhdk", q[:, :, rows], ds))
        dvs.append(product("bhqd,bhqk->bhdk", dout[:, :, rows], p.astype(q.dtype)))
    dk, dv = (_sum_over_blocks(parts).transpose(0, 3, 1, 2).astype(dout.dtype) for parts in (dks, dvs))
    return _swap(jnp.concatenate(dqs, axis=2).astype(dout.dtype)), dk, dv


def output(residuals: Residuals) -> Float[Array, "B T H D"]:
    """Forward's output, which its residuals hold."""
    return _swap(residuals.out)


def _sum_over_blocks(parts: list[Float[Array, "B H D _"]]) -> Float[Array, "B H D T"]:
    """The sum of what each block of queries gives to the keys it sees: the first keys, and for the last block all."""
    *earlier, total = parts
    for part in earlier:
        total = total.at[..., : part.shape[-1]].add(part)
    return total


def _blocks(length: int, block: int) -> Iterator[slice]:
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


def _swap(x: Float[Array, "B a b D"]) -> Float[Array, "B b a D"]:
    """Swaps (B, T, H, D) to (B, H, T, D), and back."""
    return jnp.swapaxes(x, 1, 2)


def _scores(
    q: Float[Array, "B H Tq D"], k: Float[Array, "B H Tk D"], rows: slice, starts: Int[Array, "B T"] | None
) -> Float[Array, "B H Tq Tk"]:
    """q kᵀ / √D of the queries at `rows` with the keys before rows.stop; -∞ where a query doesn't see the key."""
    scores = product("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    query = rows.start + lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    key = lax.broadcasted_iota(jnp.int32, scores.shape, 3)
    seen = key <= query
    if starts is not None:
        seen &= key >= starts[:, None, rows, None]
    return jnp.where(seen, scores, -jnp.inf)
