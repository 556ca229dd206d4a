"""Drawing text with any family, with the keys and values of the text so far kept (`attend.KeptText`)."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxgpt.layers import unembedding
from jaxgpt.models.attend import Cache, Layer
from jaxgpt.models.blocks import Context, Inputs, Params, are_stacked, inputs_of
from jaxgpt.options.config import Model


def init_cache(params: Params, capacity: int, model: Model, dtype: DTypeLike) -> Cache:
    """An empty cache for one text of at most `capacity` tokens, in layers as the parameters' are."""
    shape = (model.key_value_heads, capacity, model.width_per_head)

    def layer(*leading: int) -> Layer:
        return Layer(jnp.zeros((*leading, *shape), dtype), jnp.zeros((*leading, *shape), dtype))

    if are_stacked(params.blocks):
        return layer(len(jax.tree.leaves(params.blocks)[0]))
    return tuple(layer() for _ in params.blocks)


def prefill(
    family: ModuleType,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    context: Context,
) -> tuple[Float[Array, "1 V"], Cache]:
    """The logits after the first `length` of the tokens, and the cache with their keys and values at its beginning.

    T is at most the cache's capacity. `compute.attention` is "blocks", whose residuals have the heads first, and
    `compute.recompute` "none", so that they are there. Of the other residuals the compiler computes nothing.
    """
    x, residuals, _ = family.features(params, inputs_of(tokens, context.model), context)
    x = lax.dynamic_slice_in_dim(x, length - 1, 1)
    return _logits(family, params, x, context), _filled(cache, residuals.blocks)


def decode(
    family: ModuleType,
    params: Params,
    caches: tuple[Cache, ...],
    tokens: Int[Array, " B"],
    lengths: Int[Array, " B"],
    context: Context,
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """The logits after one further token of each text, and the caches with it; `lengths` are without it.

    The texts share every product with a weight, so that it is read once for all of them.
    """
    logits, caches = extend(family, params, caches, tokens[:, None], lengths, context)
    return logits[:, 0], caches


def extend(
    family: ModuleType,
    params: Params,
    caches: tuple[Cache, ...],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    context: Context,
) -> tuple[Float[Array, "B T V"], tuple[Cache, ...]]:
    """The logits after each of T further tokens of each text, and the caches with them; `lengths` are without them."""
    inputs = Inputs(tokens, jnp.broadcast_to(-lengths[:, None], tokens.shape))  # each text began so many tokens ago
    x, residuals, _ = family.features(params, inputs, context, caches)
    logits = _logits(family, params, x, context).reshape(*tokens.shape, -1)
    if are_stacked(params.blocks):
        return logits, residuals.blocks.attention
    by_text = zip(*(block.attention for block in residuals.blocks), strict=True)
    return logits, tuple(by_text)


def _logits(family: ModuleType, params: Params, x: Float[Array, "N C"], context: Context) -> Float[Array, "N V"]:
    found = unembedding.logits(family.head(params), x, cap=context.model.logit_soft_cap)
    return found[:, : context.model.vocabulary_size]


def _filled(cache: Cache, blocks: Any) -> Cache:
    """The cache with a prompt's keys and values, which are among the residuals of `features`."""

    def put(kept: Array, new: Array) -> Array:  # (…, K, S, D) and (…, 1, K, T, D)
        return lax.dynamic_update_slice(kept, jnp.squeeze(new, -4).astype(kept.dtype), (0,) * kept.ndim)

    def put_layer(layer: Layer, residuals: Any) -> Layer:
        return Layer(put(layer.k, residuals.attention.k), put(layer.v, residuals.attention.v))

    return put_layer(cache, blocks) if isinstance(cache, Layer) else tuple(map(put_layer, cache, blocks))
