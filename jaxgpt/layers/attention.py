"""Causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1), in blocks of queries.

    s = q kᵀ / √D           p = softmax of s over the keys up to the query's own place           out = p v

Backward, with δ = Σ_D out ∂out for each query (which is Σ_k p ∂p, the softmax's own term):

    ∂v = pᵀ ∂out           ∂p = ∂out vᵀ           ∂s = p (∂p - δ)           ∂q = ∂s k / √D           ∂k = ∂sᵀ q / √D

Of the T×T square only one block of queries exists at a time, against just the keys that its last query may see.
Nothing of it is kept but each query's logsumexp, from which p = exp(s - logsumexp) comes back in one step (Dao et al.
2022, arXiv:2205.14135, algorithms 1 and 4; Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import accumulation_dtype, product


class Residuals(NamedTuple):
    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H D"]
    out: Float[Array, "B T H D"]
    logsumexp: Float[Array, "B H T"]


def forward(
    q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], *, block: int
) -> tuple[Float[Array, "B T H D"], Residuals]:
    """`block` is the number of queries whose scores exist at once. Scores are in the accumulation dtype."""
    queries, keys, values = _heads_first(q), _heads_first(k), _heads_first(v)
    outs, logsumexps = [], []
    for rows in _blocks(q.shape[1], block):
        scores = _scores(queries[:, :, rows], keys[:, :, : rows.stop], rows)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = product("bhqk,bhkd->bhqd", weights.astype(v.dtype), values[:, :, : rows.stop]) / total
        outs.append(out.astype(v.dtype))
        logsumexps.append((largest + jnp.log(total))[..., 0])
    out = _heads_first(jnp.concatenate(outs, axis=2))
    return out, Residuals(q, k, v, out, jnp.concatenate(logsumexps, axis=2))


def backward(
    residuals: Residuals, dout: Float[Array, "B T H D"], *, block: int
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """(dq, dk, dv), in the dtype of dout."""
    dtype = accumulation_dtype(dout.dtype)
    q, k, v, out, douts = (_heads_first(array) for array in (*residuals[:4], dout))
    delta = jnp.sum(out.astype(dtype) * douts.astype(dtype), axis=-1, keepdims=True)
    scale = 1 / math.sqrt(q.shape[-1])
    dqs = []
    dk, dv = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    for rows in _blocks(q.shape[2], block):
        seen = slice(0, rows.stop)
        scores = _scores(q[:, :, rows], k[:, :, seen], rows)
        p = jnp.exp(scores - residuals.logsumexp[:, :, rows, None])
        dp = product("bhqd,bhkd->bhqk", douts[:, :, rows], v[:, :, seen])
        ds = (p * (dp - delta[:, :, rows]) * scale).astype(q.dtype)
        dqs.append(product("bhqk,bhkd->bhqd", ds, k[:, :, seen]).astype(dout.dtype))
        dk = dk.at[:, :, seen].add(product("bhqk,bhqd->bhkd", ds, q[:, :, rows]))
        dv = dv.at[:, :, seen].add(product("bhqk,bhqd->bhkd", p.astype(q.dtype), douts[:, :, rows]))
    dq = jnp.concatenate(dqs, axis=2)
    return _heads_first(dq), _heads_first(dk.astype(dout.dtype)), _heads_first(dv.astype(dout.dtype))


def _blocks(length: int, block: int) -> Iterator[slice]:
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


def _heads_first(x: Float[Array, "B a b D"]) -> Float[Array, "B b a D"]:
    """(B, T, H, D) to (B, H, T, D), and back."""
    return jnp.swapaxes(x, 1, 2)


def _scores(
    q: Float[Array, "B H Tq D"], k: Float[Array, "B H Tk D"], rows: slice
) -> Float[Array, "B H Tq Tk"]:
    """q kᵀ / √D of the queries at `rows` with the keys before rows.stop; -∞ where a key comes after its query."""
    scores = product("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    query = rows.start + lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    key = lax.broadcasted_iota(jnp.int32, scores.shape, 3)
    return jnp.where(key <= query, scores, -jnp.inf)
