"""Speculative decoding: a small model drafts tokens, and the large one checks them all at once.

    the draft   d₁ … d_k   the small model's likeliest tokens, one after another
    the check   g₀ … g_k   the large model's likeliest after the text, after d₁, …, after d_k: one forward pass

As long as d₁ = g₀, d₂ = g₁, … the draft is what the large model would have drawn; behind it stands its own next token.
So a round gives one to k + 1 tokens, and the text is the large model's greedy text, token for token (up to rounding: a
product of k + 1 rows may differ from one of a single row in the last bit). It is faster where the small model often
guesses right, since a pass over k + 1 tokens reads the weights once (Leviathan et al. 2023, arXiv:2211.17192).

Both models keep their keys and values. What a rejected token left in a cache lies behind its text, where nothing sees
it, until the next one overwrites it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxgpt.errors import UserError
from jaxgpt.generation.decoder import SHORTEST, computed_in, power_of_two
from jaxgpt.models import family
from jaxgpt.models.attend import Cache
from jaxgpt.models.blocks import Context, Params, are_stacked, arrange, cast
from jaxgpt.models.cache import decode, extend, init_cache, prefill
from jaxgpt.options.config import Compute, Model

DRAFTED = 4  # k


class Speaker(NamedTuple):
    """A model that draws, with its parameters as they are computed with."""

    params: Params
    model: Model
    compute: Compute


def speaker(params: Params, model: Model, compute: Compute) -> Speaker:
    """Returns a model ready to draw, on the first of its devices."""
    computed = computed_in(compute)
    params = jax.tree.map(lambda array: array.addressable_data(0), params)
    params = arrange(params, computed) if are_stacked(params.blocks) else params
    return Speaker(cast(params, computed.dtype), model, computed)


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="cache")
def _begin(
    params: Params, cache: Cache, tokens: Int[Array, "1 T"], length: Int[Array, ""], *, model: Model, compute: Compute
) -> tuple[Int[Array, ""], Cache]:
    logits, cache = prefill(family(model), params, cache, tokens, length, Context(model, compute))
    return jnp.argmax(logits[0]), cache


@functools.partial(jax.jit, static_argnames=("models", "computes", "drafted"), donate_argnames="caches")
def _round(
    params: tuple[Params, Params],
    caches: tuple[Cache, Cache],
    last: Int[Array, ""],
    length: Int[Array, ""],
    *,
    models: tuple[Model, Model],
    computes: tuple[Compute, Compute],
    drafted: int,
) -> tuple[Int[Array, " N"], Int[Array, ""], tuple[Cache, Cache]]:
    """Returns the large model's tokens after the text and after each of the draft, how many of them are right, and the
    caches: of `length` tokens before, to which `last` and as many as are right are added.
    """
    large, small = (Context(model, compute) for model, compute in zip(models, computes, strict=True))

    def guess(i: Array, carry: tuple) -> tuple:
        cache, tokens = carry
        logits, (cache,) = decode(family(models[1]), params[1], (cache,), tokens[i][None], (length + i)[None], small)
        token = jnp.argmax(logits[0]).astype(jnp.int32)
        return cache, tokens.at[i + 1].set(token, mode="drop")  # behind the last one: only for its keys and values

    tokens = jnp.zeros(drafted + 1, jnp.int32).at[0].set(last)
    draft_cache, tokens = lax.fori_loop(0, drafted + 1, guess, (caches[1], tokens))
    logits, (cache,) = extend(family(models[0]), params[0], (caches[0],), tokens[None], length[None], large)
    wanted = jnp.argmax(logits[0], axis=-1).astype(jnp.int32)
    right = jnp.cumprod(wanted[:-1] == tokens[1:]).sum()
    return wanted, right + 1, (cache, draft_cache)


def speculate(
    large: Speaker, small: Speaker, prompt: Sequence[int] | np.ndarray, tokens: int, drafted: int = DRAFTED
) -> Iterator[list[int]]:
    """Yields the large model's greedy text after a prompt, some tokens at a time, until there are so many or more.

    UserError where the models have other vocabularies, or the text does not fit in both of their contexts.
    """
    if large.model.vocabulary_size != small.model.vocabulary_size:
        raise UserError(
            f"the draft model knows {small.model.vocabulary_size:,} tokens, and the model "
            f"{large.model.vocabulary_size:,}: take one of the same tokenizer"
        )
    longest = len(prompt) + tokens + drafted + 1
    for one in (large, small):
        if family(one.model).LEARNED_POSITIONS and longest > one.model.context:
            raise UserError(
                f"the text may have {longest:,} tokens with its draft, and a model's context is {one.model.context:,}: "
                "draw fewer"
            )
    capacity = max(SHORTEST, longest)
    length = len(prompt)
    padded = np.zeros((1, min(capacity, max(SHORTEST, power_of_two(length)))), np.int32)
    padded[0, :length] = prompt
    firsts, caches = [], []
    for one in (large, small):
        cache = init_cache(one.params, capacity, one.model, one.compute.dtype)
        size = np.int32(length)
        first, cache = _begin(one.params, cache, padded, size, model=one.model, compute=one.compute)
        firsts.append(int(first))
        caches.append(cache)
    last, drawn, kept = firsts[0], 1, (caches[0], caches[1])
    yield [last]
    while drawn < tokens:
        wanted, right, kept = _round(
            (large.params, small.params),
            kept,
            np.int32(last),
            np.int32(length),
            models=(large.model, small.model),
            computes=(large.compute, small.compute),
            drafted=drafted,
        )
        found = np.asarray(wanted)[: int(right)].tolist()
        length += len(found)
        drawn += len(found)
        last = found[-1]
        yield found
