"""GPT-2 with the keys and values of the text so far kept, so that a further token costs one token's work.

Each text has a cache of its own, with room for S tokens. `prefill` runs a whole prompt and puts its keys and values in
it; `decode` runs one further token of several texts, each at its own place n:

    k[n], v[n] = this token's           out = Σ_{s ≤ n} softmax_s(q · k[s] / √D) v[s]

The texts share every product with a weight, so that it is read once for all of them; attention is each text's own. Both
compute what `gpt2.forward` does for the same tokens. What a cache holds at n and beyond is left over and never seen: it
is masked until a token overwrites it.
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
    """One layer's part of a text's cache."""

    k: Float[Array, "*L H S D"]
    v: Float[Array, "*L H S D"]


Cache = Layer | tuple[Layer, ...]  # as the parameters' blocks are: all on a leading L axis, or apart


def init(params: gpt2.Params, capacity: int, model: Model) -> Cache:
    """An empty cache for these parameters: in their dtype, and in layers as theirs are."""
    shape, dtype = (model.heads, capacity, model.width // model.heads), params.embedding.token.dtype

    def layer(*leading: int) -> Layer:
        return Layer(jnp.zeros((*leading, *shape), dtype), jnp.zeros((*leading, *shape), dtype))

    return layer(model.layers) if isinstance(params.blocks, gpt2.Block) else tuple(layer() for _ in params.blocks)


def prefill(
    params: gpt2.Params,
    cache: Cache,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    model: Model,
    compute: Compute,
) -> tuple[Float[Array, "1 V"], Cache]:
    """The logits after the first `length` of the tokens, and the cache with those from its beginning on.

    T is at most S. `compute.attention` is "blocks", and `compute.recompute` not "block": the keys and values are among
    what the forward keeps for a backward. Of the rest of that the compiler computes nothing.
    """
    x, residuals = gpt2.features(params, tokens, model, compute)
    logits = _logits(params, lax.dynamic_slice_in_dim(x, length - 1, 1), model)

    def put(kept: Array, new: Array) -> Array:  # (…, H, S, D) and (…, 1, H, T, D)
        return lax.dynamic_update_slice(kept, jnp.squeeze(new, -4).astype(kept.dtype), (0,) * kept.ndim)

    def put_layer(layer: Layer, kept: gpt2.BlockResiduals) -> Layer:
        return Layer(put(layer.k, kept.attention.k), put(layer.v, kept.attention.v))

    if isinstance(cache, Layer):
        return logits, put_layer(cache, residuals.blocks)
    return logits, tuple(map(put_layer, cache, residuals.blocks))


def decode(
    params: gpt2.Params,
    caches: tuple[Cache, ...],
    tokens: Int[Array, " B"],
    lengths: Int[Array, " B"],
    model: Model,
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """The logits after one further token of each text, and the caches with it; `lengths`, below S, are without it."""
    x = params.embedding.token[tokens] + params.embedding.position[lengths]

    def one_block(x: Array, block: gpt2.Block, *layers: Layer) -> tuple[Array, tuple[Layer, ...]]:
        return _block(block, x, layers, lengths, model)

    x, grown = gpt2.walk(one_block, x, params.blocks, *caches)
    x, _ = layernorm.forward(params.final_norm, x)
    by_text = grown if isinstance(params.blocks, gpt2.Block) else tuple(zip(*grown, strict=True))
    return _logits(params, x, model), by_text


def _block(
    params: gpt2.Block, x: Float[Array, "B C"], caches: tuple[Layer, ...], lengths: Int[Array, " B"], model: Model
) -> tuple[Float[Array, "B C"], tuple[Layer, ...]]:
    """`gpt2.block_forward` for one token of each text."""
    normalised, _ = layernorm.forward(params.attention_norm, x)
    qkv, _ = linear.forward(params.qkv, normalised)
    q, k, v = (part.reshape(len(x), model.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    caches = tuple(
        Layer(_put(cache.k, k[text], lengths[text]), _put(cache.v, v[text], lengths[text]))
        for text, cache in enumerate(caches)
    )
    mixed = jnp.stack([_attention(q[text], cache, lengths[text]) for text, cache in enumerate(caches)])
    branch, _ = linear.forward(params.attention_out, mixed.reshape(x.shape))
    x = residual.forward(x, branch)

    normalised, _ = layernorm.forward(params.mlp_norm, x)
    hidden, _ = linear.forward(params.mlp_in, normalised)
    activated, _ = gelu.forward(hidden)
    branch, _ = linear.forward(params.mlp_out, activated)
    return residual.forward(x, branch), caches


def _put(kept: Float[Array, "H S D"], new: Float[Array, "H D"], place: Int[Array, ""]) -> Float[Array, "H S D"]:
    return lax.dynamic_update_slice(kept, new[:, None], (0, place, 0))


def _attention(q: Float[Array, "H D"], cache: Layer, length: Int[Array, ""]) -> Float[Array, "H D"]:
    """Of one query with the keys up to place `length`, its own."""
    scores = product("hd,hsd->hs", q, cache.k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(jnp.arange(scores.shape[-1]) <= length, scores, -jnp.inf), axis=-1)
    return product("hs,hsd->hd", weights.astype(q.dtype), cache.v).astype(q.dtype)


def _logits(params: gpt2.Params, x: Float[Array, "N C"], model: Model) -> Float[Array, "N V"]:
    return unembedding.logits(unembedding.Params(params.embedding.token), x)[:, : model.vocabulary_size]
