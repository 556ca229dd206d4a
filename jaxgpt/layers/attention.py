"""Causal attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1), in blocks of queries.

    s = q kᵀ / √D           p = softmax of s over the keys up to the query's own place           out = p v

Backward, with δ = Σ_D out ∂out for each query (which is Σ_k p ∂p, the softmax's own term):

    ∂v = pᵀ ∂out           ∂p = ∂out vᵀ           ∂s = p (∂p - δ)           ∂q = ∂s k / √D           ∂k = ∂sᵀ q / √D

Of the T×T square only one block of queries exists at a time, against just the keys that its last query may see.
Nothing of it is kept but each query's logsumexp, from which p = exp(s - logsumexp) comes back in one step (Dao et al.
2022, arXiv:2205.14135, algorithms 1 and 4; Milakov and Gimelshein 2018, arXiv:1805.02867).

With K key and value heads for H = K G query heads (Ainslie et al. 2023, arXiv:2305.13245) query head h sees key head
h // G. The G query heads of a group are taken as G times as many queries of one head: no key or value is repeated in
memory, and the products that give ∂k and ∂v sum over the group by themselves.

With `starts`, the place where each token's document begins, a query sees no key before it; with `window`, only that
many newest keys, its own among them (Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825). The
formulas stay: p is 0 for what isn't seen, and so is ∂s. Keys that no query of a block sees are left out of its
products, so that beyond the window a token costs the same however long the sequence.

With `masks` the probabilities have dropout (`dropout.py`), each multiplied by its m, 0 or 1 / (1 - rate):

    out = (m p) v           ∂v = (m p)ᵀ ∂out           ∂p = m (∂out vᵀ)           ∂s = p (∂p - δ)

and δ = Σ_k p ∂p = Σ_k m p (∂out vᵀ) = Σ_D out ∂out as before. The logsumexp is that of all scores. The masks of a block
of queries are drawn in forward and again in backward, and are the same for any size of the blocks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers import dropout
from jaxgpt.layers.dropout import Masks
from jaxgpt.layers.numerics import accumulation_dtype, not_before, product


class Residuals(NamedTuple):
    """Residuals, all with the heads first, as the products want them."""

    q: Float[Array, "B H T D"]
    k: Float[Array, "B K T D"]
    v: Float[Array, "B K T D"]
    out: Float[Array, "B H T D"]
    logsumexp: Float[Array, "B H T"]


@jax.named_scope("attention.forward")
def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    block: int,
    starts: Int[Array, "B T"] | None = None,
    window: int = 0,
    masks: Masks | None = None,
) -> tuple[Float[Array, "B T H D"], Residuals]:
    """Returns attention's output and its residuals. Scores are in the accumulation dtype.

    Args:
        q: Queries of H heads.
        k: Keys of K heads, which divides H.
        v: Values, likewise.
        block: The number of queries of a head whose scores exist at once.
        starts: The place where each token's document begins; None where all begin at 0.
        window: The number of newest keys that a query sees; 0 for all.
        masks: Of the probabilities' dropout; None for no dropout.
    """
    q, k, v = _swap(q), _swap(k), _swap(v)
    outs, logsumexps = [], []
    for rows, seen in _blocks(q.shape[2], block, window):
        scores = _scores(_grouped(q[:, :, rows], k), k[:, :, seen], rows, seen, starts, window)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if masks is not None:
            weights = _dropped(weights, masks, rows, seen, q.shape)
        out = product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, seen]) / total
        outs.append(_apart(out.astype(v.dtype), q))
        logsumexps.append(_apart(largest + jnp.log(total), q)[..., 0])
    out = jnp.concatenate(outs, axis=2)
    return _swap(out), Residuals(q, k, v, out, jnp.concatenate(logsumexps, axis=2))


@jax.named_scope("attention.backward")
def backward(
    residuals: Residuals,
    dout: Float[Array, "B T H D"],
    *,
    block: int,
    starts: Int[Array, "B T"] | None = None,
    window: int = 0,
    masks: Masks | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Returns (dq, dk, dv), in the dtype of dout. `block`, `starts`, `window` and `masks` are forward's."""
    q, k, v, out, logsumexp = residuals
    q, k, v = not_before(dout, (q, k, v))  # the scores are computed again
    masks = masks and dropout.again(masks, dout)
    dtype, dout = accumulation_dtype(dout.dtype), _swap(dout)
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), axis=-1, keepdims=True)
    scale = 1 / math.sqrt(q.shape[-1])
    dqs, dks, dvs, places = [], [], [], []
    for rows, seen in _blocks(q.shape[2], block, window):
        queries, douts, deltas, logsumexps = (
            _grouped(array[:, :, rows], k) for array in (q, dout, delta, logsumexp[..., None])
        )
        p = jnp.exp(_scores(queries, k[:, :, seen], rows, seen, starts, window) - logsumexps)
        dp = product("bhqd,bhkd->bhqk", douts, v[:, :, seen])
        seen_by_v = p
        if masks is not None:
            dp, seen_by_v = (_dropped(part, masks, rows, seen, q.shape) for part in (dp, p))
        ds = (p * (dp - deltas) * scale).astype(q.dtype)
        dqs.append(_apart(product("bhqk,bhkd->bhqd", ds, k[:, :, seen]), q))
        # The transposes of ∂k and ∂v: a CPU takes half as long again for the products that give these themselves.
        dks.append(product("bhqd,bhqk->bhdk", queries, ds))
        dvs.append(product("bhqd,bhqk->bhdk", douts, seen_by_v.astype(q.dtype)))
        places.append(seen)
    dk, dv = (_sum_over_blocks(parts, places).transpose(0, 3, 1, 2).astype(dout.dtype) for parts in (dks, dvs))
    return _swap(jnp.concatenate(dqs, axis=2).astype(dout.dtype)), dk, dv


def keys_seen(length: int, window: int) -> float:
    """Returns the number of keys that a query of a sequence of this length sees, on average."""
    W = min(window or length, length)
    return (W * (W + 1) / 2 + (length - W) * W) / length


def keys_multiplied(length: int, block: int, window: int) -> float:
    """Returns the number of keys that a query is multiplied with here, on average: those that its block sees."""
    sizes = ((rows.stop - rows.start, seen.stop - seen.start) for rows, seen in _blocks(length, block, window))
    return sum(queries * keys for queries, keys in sizes) / length


def output(residuals: Residuals) -> Float[Array, "B T H D"]:
    """Forward's output, which its residuals hold."""
    return _swap(residuals.out)


def with_inputs(residuals: Residuals, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Residuals:
    """Returns the residuals with queries and keys that were not kept, but computed again."""
    return residuals._replace(q=_swap(q), k=_swap(k))


def _sum_over_blocks(parts: list[Float[Array, "B K D _"]], places: list[slice]) -> Float[Array, "B K D T"]:
    """The sum of what each block of queries gives to the keys that it sees."""
    *earlier, last = parts
    total = jnp.pad(last, ((0, 0), (0, 0), (0, 0), (places[-1].start, 0)))
    for part, seen in zip(earlier, places, strict=False):
        total = total.at[..., seen].add(part)
    return total


def _blocks(length: int, block: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Yields each block's queries, and the keys that one of them sees."""
    for start in range(0, length, block):
        stop = min(start + block, length)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _swap(x: Float[Array, "B a b D"]) -> Float[Array, "B b a D"]:
    """Swaps (B, T, H, D) to (B, H, T, D), and back."""
    return jnp.swapaxes(x, 1, 2)


def _grouped(x: Float[Array, "B H n D"], k: Float[Array, "B K T _"]) -> Float[Array, "B K Gn D"]:
    """The query heads that share a key head of k as further queries of one head."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])


def _apart(x: Float[Array, "B K Gn D"], q: Float[Array, "B H T _"]) -> Float[Array, "B H n D"]:
    """The inverse of `_grouped`."""
    return x.reshape(x.shape[0], q.shape[1], -1, x.shape[3])


def _scores(
    q: Float[Array, "B K Gn D"],
    k: Float[Array, "B K s D"],
    rows: slice,
    seen: slice,
    starts: Int[Array, "B T"] | None,
    window: int,
) -> Float[Array, "B K Gn s"]:
    """q kᵀ / √D of the queries at `rows` with the keys at `seen`; -∞ where a query doesn't see the key."""
    scores = product("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    queries = rows.stop - rows.start
    query = rows.start + lax.broadcasted_iota(jnp.int32, scores.shape, 2) % queries
    key = seen.start + lax.broadcasted_iota(jnp.int32, scores.shape, 3)
    visible = key <= query
    if window and rows.stop - seen.start > window:
        visible &= key > query - window
    if starts is not None:
        begins = jnp.tile(starts[:, rows], (1, q.shape[2] // queries))
        visible &= key >= begins[:, None, :, None]
    return jnp.where(visible, scores, -jnp.inf)


def _dropped(
    x: Float[Array, "B K Gn s"], masks: Masks, rows: slice, seen: slice, shape: tuple[int, ...]
) -> Float[Array, "B K Gn s"]:
    """Applies the masks to a block's probabilities, or their gradients; `shape` is that of all queries, (B, H, T, D).

    Text and head are the first word of a place, query and key the second.
    """
    B, H, T, _ = shape
    _, K, Gn, _ = x.shape
    queries = rows.stop - rows.start
    of_group = jnp.arange(Gn, dtype=jnp.uint32)
    heads = jnp.arange(K, dtype=jnp.uint32)[:, None] * (H // K) + of_group // queries
    texts = masks.of_texts(B)[:, None, None] * H + heads
    keys = jnp.arange(seen.start, seen.stop, dtype=jnp.uint32)
    places = (rows.start + of_group % queries)[:, None] * T + keys
    return jnp.where(masks.keeps(texts[..., None], places), x / (1 - masks.rate), 0)
