"""Attention of a block's tokens: to the text before them, or to the keys and values that were kept of it.

A family's `block_forward` is handed one of these and calls its `forward(q, k, v)` on (B, T, H, D). So a block's maths
is written once for training, prefill and decoding:

    WholeText      B sequences of T tokens at once; training, scoring and prefill
    KeptText       T further tokens of each of B texts, with the keys and values of the text so far kept

Each text has a cache of its own, with room for S tokens. A further token at the place n of its text:

    k[n], v[n] = this token's           out = Σ_{s ≤ n} softmax_s(q · k[s] / √D) v[s]

What a cache holds beyond n is left over and never seen: it is masked until a token overwrites it. So are keys that a
sliding window has passed by.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.kernels.choose import attention_layer
from jaxgpt.layers import dropout
from jaxgpt.layers.dropout import Masks
from jaxgpt.layers.numerics import product
from jaxgpt.models.blocks import Context

PROBABILITIES, ATTENTION, MLP = range(3)  # places of a block that have dropout: attention's, and each branch


class Layer(NamedTuple):
    """One layer's part of a text's cache."""

    k: Float[Array, "*L K S D"]
    v: Float[Array, "*L K S D"]


Cache = Layer | tuple[Layer, ...]  # as the parameters' blocks are: all on a leading L axis, or apart


@dataclass(frozen=True)
class WholeText:
    """Every token of B sequences with those before it in its document."""

    context: Context
    batch: int  # B
    length: int  # T
    starts: Int[Array, "B T"] | None = None
    masks: Masks | None = None  # this block's

    @property
    def places(self) -> Int[Array, "_ T"]:
        """Each token's place in its document, (B, T), or (1, T) where they are the same in every sequence."""
        places = jnp.arange(self.length)[None]
        return places if self.starts is None else places - self.starts

    @property
    def _layer(self) -> ModuleType:
        return attention_layer(self.context.compute)

    @property
    def _options(self) -> dict[str, Any]:
        block, window = self.context.compute.attention_block, self.context.model.window
        return {"block": block, "starts": self.starts, "window": window, "masks": self._masks(PROBABILITIES)}

    def _masks(self, place: int) -> Masks | None:
        return self.masks and self.masks.at(place)

    def drop(self, branch: Float[Array, "N C"], place: int) -> Float[Array, "N C"]:
        """A residual branch, with dropout where there is one."""
        return dropout.forward(branch, self._masks(place))

    def drop_backward(self, dbranch: Float[Array, "N C"], place: int) -> Float[Array, "N C"]:
        """The gradient by what `drop` was given."""
        return dropout.backward(self._masks(place), dbranch)

    def forward(
        self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]
    ) -> tuple[Float[Array, "B T H D"], Any]:
        """Attention's output, and its residuals."""
        return self._layer.forward(q, k, v, **self._options)

    def output(self, residuals: Any) -> Float[Array, "B T H D"]:
        """Forward's output, from its residuals."""
        return self._layer.output(residuals)

    def with_inputs(self, residuals: Any, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Any:
        """Returns the residuals with queries and keys that were computed again."""
        return self._layer.with_inputs(residuals, q, k)

    def backward(
        self, residuals: Any, dout: Float[Array, "B T H D"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Returns (dq, dk, dv)."""
        return self._layer.backward(residuals, dout, **self._options)


@dataclass(frozen=True)
class KeptText:
    """T further tokens of each text, with what its cache keeps of the text so far. Drawing has T = 1."""

    context: Context
    caches: tuple[Layer, ...]
    lengths: Int[Array, " B"]  # tokens in each cache, at most S - T
    count: int = 1  # T

    @property
    def batch(self) -> int:
        return len(self.caches)

    @property
    def places(self) -> Int[Array, "B T"]:
        """Each token's place in its text."""
        return self.lengths[:, None] + jnp.arange(self.count)

    def drop(self, branch: Float[Array, "N C"], place: int) -> Float[Array, "N C"]:
        """The branch as it is: drawing has no dropout."""
        return branch

    def forward(
        self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]
    ) -> tuple[Float[Array, "B T H D"], tuple[Layer, ...]]:
        """Attention's output, and the caches with these tokens."""
        caches = tuple(
            Layer(_put(cache.k, k[text], self.lengths[text]), _put(cache.v, v[text], self.lengths[text]))
            for text, cache in enumerate(self.caches)
        )
        window = self.context.model.window
        mixed = [_mixed(q[text], cache, self.lengths[text], window) for text, cache in enumerate(caches)]
        return jnp.stack(mixed), caches


def split_heads(x: Float[Array, "N C"], batch: int, heads: int) -> Float[Array, "B T H D"]:
    """Splits columns into heads: head h takes columns hD to (h+1)D."""
    return x.reshape(batch, x.shape[0] // batch, heads, x.shape[1] // heads)


def merge_heads(x: Float[Array, "B T H D"]) -> Float[Array, "N C"]:
    return x.reshape(x.shape[0] * x.shape[1], -1)


def _put(kept: Float[Array, "K S D"], new: Float[Array, "T K D"], place: Int[Array, ""]) -> Float[Array, "K S D"]:
    return lax.dynamic_update_slice(kept, new.transpose(1, 0, 2), (0, place, 0))


def _mixed(q: Float[Array, "T H D"], cache: Layer, length: Int[Array, ""], window: int) -> Float[Array, "T H D"]:
    """Attention of T tokens' queries, the first at place `length`, to the keys up to each's own; G share a key head."""
    T, H, D = q.shape
    K = cache.k.shape[0]
    G = H // K
    grouped = q.reshape(T, K, G, D).transpose(1, 0, 2, 3).reshape(K, T * G, D)
    scores = product("kgd,ksd->kgs", grouped, cache.k) / math.sqrt(D)
    places, own = jnp.arange(scores.shape[-1]), length + jnp.repeat(jnp.arange(T), G)[:, None]
    seen = places <= own
    if window:
        seen &= places > own - window
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    mixed = product("kgs,ksd->kgd", weights.astype(q.dtype), cache.v).astype(q.dtype)
    return mixed.reshape(K, T, G, D).transpose(1, 0, 2, 3).reshape(T, H, D)
