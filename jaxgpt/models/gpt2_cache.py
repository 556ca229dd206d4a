"""GPT-2 with the keys and values of the text so far kept, so that a further token costs one token's work.

A cache has room for B texts ("slots") of up to S tokens each. `prefill` runs a whole prompt and puts its keys and
values into one slot; `decode` runs one further token of every slot, each at its own place:

    k[b, n_b], v[b, n_b] = this token's           n_b = tokens in slot b so far
    out[b] = Σ_{s ≤ n_b} softmax_s(q[b] · k[b, s] / √D) v[b, s]

Both compute what `gpt2.forward` does for the same tokens. What a slot holds at n_b and beyond is left over, and never
seen: it is masked until a token overwrites it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.config import Compute, Model
from jaxgpt.layers import gelu, layernorm, linear, residual, unembedding
from jaxgpt.layers.numerics import product
from jaxgpt.models import gpt2


class Layer(NamedTuple):
    """One layer's part of the cache."""

    k: Float[Array, "*L B H S D"]
    v: Float[Array, "*L B H S D"]


Cache = Layer | tuple[Layer, ...]  # as the parameters' blocks are: all on a leading L axis, or apart


def init(params: gpt2.Params, slots: int, capacity: int, model: Model) -> Cache:
    """An empty cache for these parameters: in their dtype, and in layers as theirs are."""
    shape = (slots, model.heads, capacity, model.width // model.heads)
    dtype = params.embedding.token.dtype

    def layer(*leading: int) -> Layer:
        return Layer(jnp.zeros((*leading, *shape), dtype), jnp.zeros((*leading, *shape), dtype))

    return layer(model.layers) if isinstance(params.blocks, gpt2.Block) else tuple(layer() for _ in params.blocks)


def prefill(
    params: gpt2.Params,
    cache: Cache,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    model: Model,
    compute: Compute,
) -> tuple[Float[Array, "1 V"], Cache]:
    """The logits after the first `length` of the tokens, and the cache with those in this slot.

    T is at most S. `compute.attention` is "blocks", and `compute.recompute` not "block": the keys and values are among
    what the forward keeps for a backward. Of the rest of that the compiler computes nothing.
    """
    x, residuals = gpt2.features(params, tokens, model, compute)
    logits = _logits(params, lax.dynamic_slice_in_dim(x, length - 1, 1), model)

    def put(kept: Array, new: Array) -> Array:  # (…, B, H, S, D) and (…, 1, H, T, D)
        start = (0,) * (kept.ndim - 4) + (slot, 0, 0, 0)
        return lax.dynamic_update_slice(kept, new.astype(kept.dtype), start)

    def put_layer(layer: Layer, kept: gpt2.BlockResiduals) -> Layer:
        return Layer(put(layer.k, kept.attention.k), put(layer.v, kept.attention.v))

    if isinstance(cache, Layer):
        return logits, put_layer(cache, residuals.blocks)
    return logits, tuple(map(put_layer, cache, residuals.blocks))


def decode(
    params: gpt2.Params, cache: Cache, tokens: Int[Array, " B"], lengths: Int[Array, " B"], model: Model
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits after one further token of every slot, and the cache with it; `lengths`, below S, are without it."""
    x = params.embedding.token[tokens] + params.embedding.position[lengths]
    x, cache = gpt2.walk(lambda x, block, layer: _block(block, x, layer, lengths, model), x, params.blocks, cache)
    x, _ = layernorm.forward(params.final_norm, x)
    return _logits(params, x, model), cache


def _block(
    params: gpt2.Block, x: Float[Array, "B C"], cache: Layer, lengths: Int[Array, " B"], model: Model
) -> tuple[Float[Array, "B C"], Layer]:
    """`gpt2.block_forward` for one token of each text."""
    normalised, _ = layernorm.forward(params.attention_norm, x)
    qkv, _ = linear.forward(params.qkv, normalised)
    q, k, v = (part.reshape(len(x), model.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    cache = Layer(_put(cache.k, k, lengths), _put(cache.v, v, lengths))
    branch, _ = linear.forward(params.attention_out, _attention(q, cache, lengths).reshape(x.shape))
    x = residual.forward(x, branch)

    normalised, _ = layernorm.forward(params.mlp_norm, x)
    hidden, _ = linear.forward(params.mlp_in, normalised)
    activated, _ = gelu.forward(hidden)
    branch, _ = linear.forward(params.mlp_out, activated)
    return residual.forward(x, branch), cache


def _put(
    kept: Float[Array, "B H S D"], new: Float[Array, "B H D"], places: Int[Array, " B"]
) -> Float[Array, "B H S D"]:
    """Each text's new row at its place."""
    return jax.vmap(lambda kept, new, place: lax.dynamic_update_slice(kept, new[:, None], (0, place, 0)))(
        kept, new, places
    )


def _attention(q: Float[Array, "B H D"], cache: Layer, lengths: Int[Array, " B"]) -> Float[Array, "B H D"]:
    """Of one query of each text with its keys up to place `lengths`, the query's own."""
    scores = product("bhd,bhsd->bhs", q, cache.k) / math.sqrt(q.shape[-1])
    seen = jnp.arange(scores.shape[-1]) <= lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return product("bhs,bhsd->bhd", weights.astype(q.dtype), cache.v).astype(q.dtype)


def _logits(params: gpt2.Params, x: Float[Array, "N C"], model: Model) -> Float[Array, "N V"]:
    return unembedding.logits(unembedding.Params(params.embedding.token), x)[:, : model.vocabulary_size]
