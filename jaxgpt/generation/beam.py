"""Beam search: of all continuations of a prompt, one that the model holds likely as a whole.

The `beams` likeliest beginnings are kept. In each step each is continued by every token, and the likeliest of all these
are kept again. A continuation that ends is set aside; its score is the mean log-probability of its tokens, the end's
included, and the one with the highest is the answer. With as many beams as there are beginnings it is the likeliest
continuation of all; with one beam it is the greedy one.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.errors import UserError
from jaxgpt.generation.decoder import SHORTEST, power_of_two
from jaxgpt.generation.speculative import Speaker
from jaxgpt.models import family
from jaxgpt.models.attend import Cache
from jaxgpt.models.blocks import Context, Params
from jaxgpt.models.cache import decode, init_cache, prefill
from jaxgpt.options.config import Compute, Model


class Found(NamedTuple):
    tokens: list[int]  # without the one that ends them
    log_probability: float  # of all tokens
    score: float  # its mean


@functools.partial(jax.jit, static_argnames=("model", "compute", "most"), donate_argnames="cache")
def _begin(
    params: Params,
    cache: Cache,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    *,
    model: Model,
    compute: Compute,
    most: int,
) -> tuple[Float[Array, " R"], Int[Array, " R"], Cache]:
    logits, cache = prefill(family(model), params, cache, tokens, length, Context(model, compute))
    values, tokens = lax.top_k(jax.nn.log_softmax(logits[0].astype(jnp.float32)), most)
    return values, tokens, cache


@functools.partial(jax.jit, static_argnames=("model", "compute", "most"), donate_argnames="caches")
def _step(
    params: Params,
    caches: tuple[Cache, ...],
    parents: Int[Array, " B"],
    tokens: Int[Array, " B"],
    sums: Float[Array, " B"],
    length: Int[Array, ""],
    *,
    model: Model,
    compute: Compute,
    most: int,
) -> tuple[Float[Array, " R"], Int[Array, " R"], Int[Array, " R"], tuple[Cache, ...]]:
    """Adds a token to each beam, which goes on with its parent's text; returns the likeliest next ones of all beams:
    their beginnings' log-probabilities, their beams and tokens.
    """
    chosen = jax.tree.map(lambda *each: jnp.stack(each)[parents], *caches)
    caches = tuple(jax.tree.map(lambda each, i=i: each[i], chosen) for i in range(len(caches)))
    lengths = jnp.full(len(caches), length)
    logits, caches = decode(family(model), params, caches, tokens, lengths, Context(model, compute))
    scores = sums[:, None] + jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, places = lax.top_k(scores.ravel(), most)
    return values, places // scores.shape[1], places % scores.shape[1], caches


def search(
    speaker: Speaker,
    prompt: Sequence[int] | np.ndarray,
    tokens: int,
    beams: int,
    ends: frozenset[int] = frozenset(),
) -> list[Found]:
    """Returns up to `beams` continuations of a prompt of at most `tokens` tokens, the one with the best score first.

    UserError where the text does not fit in the model's context.
    """
    params, model, compute = speaker
    length, longest = len(prompt), len(prompt) + tokens
    if family(model).LEARNED_POSITIONS and longest > model.context:
        raise UserError(f"a text may have {longest:,} tokens, and the model's context is {model.context:,}: draw fewer")
    capacity = max(SHORTEST, longest)
    most = min(beams * (1 + len(ends)), model.vocabulary_size * beams)  # so many that `beams` of them don't end
    padded = np.zeros((1, min(capacity, max(SHORTEST, power_of_two(length)))), np.int32)
    padded[0, :length] = prompt
    how = {"model": model, "compute": compute}
    first = init_cache(params, capacity, model, compute.dtype)
    sums, next_tokens, first = _begin(
        params, first, padded, np.int32(length), most=min(most, model.vocabulary_size), **how
    )
    caches = tuple(jax.tree.map(jnp.copy, first) for _ in range(beams))
    parents: np.ndarray = np.zeros(len(sums), np.int32)
    texts: list[list[int]] = [[]]
    finished: list[Found] = []
    for drawn in range(1, tokens + 1):
        live: list[tuple[float, int, int]] = []
        for total, parent, token in zip(*(np.asarray(a).tolist() for a in (sums, parents, next_tokens)), strict=True):
            if total == -np.inf:  # of a row that counts for nothing
                continue
            if token in ends:
                finished.append(Found(texts[parent], total, total / drawn))
            elif len(live) < beams:
                live.append((total, parent, token))
        texts = [[*texts[parent], token] for _, parent, token in live]
        best_live = max((total for total, *_ in live), default=-np.inf)
        best_found = sorted((one.score for one in finished), reverse=True)[:beams]
        # Further tokens make a sum less; its mean is at most what it would be over all tokens.
        if drawn == tokens or not live or (len(best_found) == beams and best_found[-1] >= best_live / tokens):
            break
        rows = live + [live[0]] * (
            beams - len(live)
        )  # as many rows as there are caches; those behind count for nothing
        sums, parents, next_tokens, caches = _step(
            params,
            caches,
            np.array([parent for _, parent, _ in rows], np.int32),
            np.array([token for *_, token in rows], np.int32),
            np.array([total if i < len(live) else -np.inf for i, (total, *_) in enumerate(rows)], np.float32),
            np.int32(length + drawn - 1),
            most=most,
            **how,
        )
    finished += [Found(text, total, total / len(text)) for text, (total, *_) in zip(texts, live, strict=True)]
    return sorted(finished, key=lambda found: found.score, reverse=True)[:beams]
