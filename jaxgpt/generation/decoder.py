"""Decoder of several texts at once, each with a cache of its own in a slot.

    prefill    one text's prompt into its cache, and its first token: one program for each power of two of the length
    decode     up to MOST_AT_ONCE further tokens of some texts, in one loop on the device: one program for each power of
               two of their number

A text that has filled the model's context forgets its older half: the newer half is run again as a prompt, and the text
goes on from there. So each token is drawn from at least half a context of text (if there is as much), and forgetting
costs one prefill in half a context of tokens. Where positions are not learned, there is one for any place: then a text
goes on beyond the context, and forgets only what it has no room for in its cache.

What a constrained text may go on with is known on the host alone, and only when its last token is. So it gets one token
from a call. Where a token takes long beside what a call costs, the texts beside it share its calls. Otherwise they have
theirs, of many tokens, and the constrained ones have as much time.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxgpt.generation.constrained import Constraint
from jaxgpt.generation.sampling import MOST_RUNNERS_UP, SamplingSettings, Scores, draw, no_scores, score, settings
from jaxgpt.kernels.choose import anywhere
from jaxgpt.models import family
from jaxgpt.models.attend import Cache
from jaxgpt.models.blocks import Context, Params, are_stacked, arrange, cast
from jaxgpt.models.cache import decode, init_cache, prefill
from jaxgpt.options.config import Compute, Model, Sampling

MOST_AT_ONCE = 32  # tokens of a text from one call of `decode`
SHORTEST = 16  # prompts are padded to powers of two from here on
BURST_SECONDS = 0.05  # what a call of `decode` may take, so that text comes as a stream
APART = 8  # tokens in that time from which on a call for each costs more than calls of their own for constrained texts


class Slot(NamedTuple):
    """A text on the device."""

    cache: Cache
    last: Int[Array, ""]  # the newest token, which is not in the cache yet
    length: Int[Array, ""]  # tokens in the cache
    drawn: Int[Array, ""]  # tokens drawn so far
    seen: Bool[Array, " V"]  # tokens that occur in the text


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="cache")
def _prefill(
    params: Params,
    cache: Cache,
    options: SamplingSettings,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    drawn: Int[Array, ""],
    seen: Bool[Array, " V"],
    allowed: Bool[Array, "1 V"] | None,
    scored: Bool[Array, ""],
    *,
    model: Model,
    compute: Compute,
) -> tuple[Slot, Int[Array, ""], Scores]:
    """Runs the first `length` of a prompt's tokens, and draws the token after them."""
    logits, cache = prefill(family(model), params, cache, tokens, length, Context(model, compute))
    token = draw(logits, options, drawn[None], seen[None], allowed)
    scores = score(logits, token, scored)
    return Slot(cache, token[0], length, drawn + 1, seen.at[token[0]].set(True)), token[0], scores


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="slots")
def _decode(
    params: Params,
    slots: tuple[Slot, ...],
    options: SamplingSettings,
    count: Int[Array, ""],
    allowed: Bool[Array, "B V"] | None,
    scored: Bool[Array, ""],
    *,
    model: Model,
    compute: Compute,
) -> tuple[tuple[Slot, ...], tuple[Int[Array, "N B"], Scores]]:
    """Draws `count` further tokens of each text, at most MOST_AT_ONCE = N; rows behind them mean nothing."""
    rows = jnp.arange(len(slots))
    last, length, drawn, seen = (jnp.stack(column) for column in list(zip(*slots, strict=True))[1:])

    def step(i: Array, carry: tuple) -> tuple:
        caches, last, seen, out = carry
        logits, caches = decode(family(model), params, caches, last, length + i, Context(model, compute))
        tokens = draw(logits, options, drawn + i, seen, allowed)
        new = tokens, score(logits, tokens, scored)
        out = jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0), out, new)
        return caches, tokens, seen.at[rows, tokens].set(True), out

    B = len(slots)
    most = min(MOST_RUNNERS_UP, model.vocabulary_size)
    out = jnp.zeros((MOST_AT_ONCE, B), jnp.int32), no_scores(MOST_AT_ONCE, B, most)
    caches, last, seen, out = lax.fori_loop(0, count, step, (tuple(slot.cache for slot in slots), last, seen, out))
    columns = zip(caches, last, length + count, drawn + count, seen, strict=True)
    return tuple(Slot(*column) for column in columns), out


class TokenScore(NamedTuple):
    """Log-probability of a drawn token, and of the tokens that the model held the likeliest at its place."""

    log_probability: float
    likeliest: list[tuple[int, float]]


@dataclasses.dataclass
class _Text:
    """The host's record of the text in a slot."""

    tokens: list[int]
    prompt: int  # how many of them were not drawn
    options: tuple[Sampling, int]
    constraint: Constraint | None
    scores: list[TokenScore] | None  # of the drawn ones, where they are wanted
    in_cache: int = 0

    def take(self, tokens: list[int], scores: Scores) -> None:
        """Adds drawn tokens, and their scores, (N,) and (N, R)."""
        self.tokens += tokens
        if self.constraint:
            for token in tokens:
                self.constraint.take(token)
        if self.scores is not None:
            for drawn, likeliest, theirs in zip(*(np.asarray(part).tolist() for part in scores), strict=True):
                self.scores.append(TokenScore(drawn, list(zip(likeliest, theirs, strict=True))))


NOTHING = (Sampling(temperature=0.0), 0)  # the options of a slot without a text


class Decoder:
    """Slots, and the texts in them.

    `capacity` is the longest text, of prompt and drawn tokens, that there will be; texts may be longer, and forget,
    where it is at least the model's context. Parameters are whole on each of their devices; the first one is used.

    `burst` is the number of tokens that a call draws of each text. Without it, it follows from the time that they take;
    then what is drawn side by side differs from one time to the next, and so does the rounding.
    """

    def __init__(
        self, params: Params, model: Model, compute: Compute, *, slots: int, capacity: int, burst: int | None = None
    ):
        self.model, self.compute = model, computed_in(compute)
        self.capacity = max(SHORTEST, power_of_two(capacity))
        if family(model).LEARNED_POSITIONS or capacity <= model.context:
            self.capacity = min(model.context, self.capacity)
        params = jax.tree.map(lambda array: array.addressable_data(0), params)
        arranged = arrange(params, self.compute) if are_stacked(params.blocks) else params
        self._params = cast(arranged, self.compute.dtype)
        self._slots = [self._empty() for _ in range(slots)]
        self._texts: list[_Text | None] = [None] * slots
        self._burst, self._steady = burst or 1, burst is not None

    def _empty(self) -> Slot:
        seen = jnp.zeros(self.model.vocabulary_size, bool)
        last, length, drawn = (jnp.int32(0) for _ in range(3))  # an array each: one is not donated twice
        return Slot(init_cache(self._params, self.capacity, self.model, self.compute.dtype), last, length, drawn, seen)

    def free(self) -> list[int]:
        """Returns the slots without a text."""
        return [slot for slot, text in enumerate(self._texts) if text is None]

    def start(
        self,
        slot: int,
        prompt: Sequence[int] | np.ndarray,
        sampling: Sampling,
        seed: int,
        *,
        constraint: Constraint | None = None,
        scored: bool = False,
    ) -> int:
        """Puts a text into a free slot, and returns its first token. The prompt has at least one token.

        With a constraint only tokens that it allows are drawn, until it has ended: then the slot has to be stopped.
        Where it has an error, the last token means nothing. With `scored` there are `scores`.
        """
        tokens = list(map(int, prompt))
        self._texts[slot] = _Text(tokens, len(tokens), (sampling, seed), constraint, [] if scored else None)
        return self._run_prompt(slot, min(len(prompt), self.capacity))

    def scores(self, slot: int) -> list[TokenScore]:
        """Returns the scores of all tokens that were drawn of the slot's text; empty where they weren't wanted."""
        text = self._texts[slot]
        return text.scores or [] if text else []

    def stop(self, slot: int) -> None:
        """Frees a slot."""
        self._texts[slot] = None

    def go_on(self, most: int = MOST_AT_ONCE) -> dict[int, list[int]]:
        """Draws some further tokens of each text, at least one and at most `most`; returns them by slot."""
        running = {slot: text for slot, text in enumerate(self._texts) if text is not None}
        full = [slot for slot, text in running.items() if text.in_cache == self.capacity]
        drawn = {slot: [self._run_prompt(slot, max(1, self.capacity // 2))] for slot in full}
        others = [slot for slot in running if slot not in full]
        bound = [slot for slot in others if running[slot].constraint]
        shared = bool(bound) and (bool(full) or self._burst < APART or len(bound) == len(others))
        free = others if shared else [slot for slot in others if slot not in bound]
        if not free:
            return drawn
        room = min(self.capacity - running[slot].in_cache for slot in others)
        count = 1 if full or shared else min(most, room, self._burst, MOST_AT_ONCE)
        started = time.perf_counter()
        drawn |= self._decode(free, count)
        seconds = time.perf_counter() - started
        if not self._steady:
            self._burst = max(1, min(2 * self._burst, int(BURST_SECONDS * count / seconds)))
        return drawn if shared else drawn | self._decode_bound(bound, count, time.perf_counter() + seconds)

    def _decode_bound(self, slots: list[int], count: int, until: float) -> dict[int, list[int]]:
        """Draws one to `count` tokens of constrained texts, until one has ended or it is so late."""
        drawn: dict[int, list[int]] = {slot: [] for slot in slots}
        texts = [self._texts[slot] for slot in slots]
        for number in range(count if slots else 0):
            if number and (
                time.perf_counter() > until or any(t and t.constraint and t.constraint.ended for t in texts)
            ):
                break
            for slot, tokens in self._decode(slots, 1).items():
                drawn[slot] += tokens
        return drawn

    def _decode(self, slots: list[int], count: int) -> dict[int, list[int]]:
        """Draws `count` tokens of the texts in these slots; returns them by slot.

        Free slots are decoded too, to make a power of two as far as there are any: so few programs are compiled.
        """
        number = min(power_of_two(len(slots)), len(self._slots))
        rows = [*slots, *self.free()][:number]
        texts = [self._texts[slot] for slot in rows]
        changed, (out, scores) = _decode(
            self._params,
            tuple(self._slots[slot] for slot in rows),
            settings([NOTHING if text is None else text.options for text in texts]),
            np.int32(count),
            self._allowed(texts),
            np.bool_(any(text is not None and text.scores is not None for text in texts)),
            model=self.model,
            compute=self.compute,
        )
        for slot, new in zip(rows, changed, strict=True):
            self._slots[slot] = new
        drawn = np.asarray(out)[:count].T.tolist()
        scores = jax.tree.map(lambda part: np.asarray(part)[:count], scores)
        for row, (text, tokens) in enumerate(zip(texts, drawn, strict=True)):
            if text is not None:
                text.take(tokens, Scores(*(part[:, row] for part in scores)))
                text.in_cache += count
        return dict(zip(slots, drawn, strict=False))

    def _allowed(self, texts: Sequence[_Text | None]) -> np.ndarray | None:
        """Returns the tokens that each text may go on with, as `draw` takes them; None where no text is constrained."""
        if not any(text and text.constraint for text in texts):
            return None
        allowed = np.ones((len(texts), self.model.vocabulary_size), bool)
        for row, text in zip(allowed, texts, strict=True):
            if text and text.constraint:
                row[:] = text.constraint.mask()
        return allowed

    def _run_prompt(self, slot: int, kept: int) -> int:
        """Runs the last `kept` tokens of the slot's text as its prompt, and returns the token that is drawn then."""
        text = self._texts[slot]
        assert text is not None
        padded = np.zeros((1, min(self.capacity, max(SHORTEST, power_of_two(kept)))), np.int32)
        padded[0, :kept] = text.tokens[-kept:]
        seen = np.zeros(self.model.vocabulary_size, bool)
        seen[[token for token in text.tokens if token < len(seen)]] = True
        self._slots[slot], token, scores = _prefill(
            self._params,
            self._slots[slot].cache,
            settings([text.options]),
            padded,
            np.int32(kept),
            np.int32(len(text.tokens) - text.prompt),
            seen,
            self._allowed([text]),
            np.bool_(text.scores is not None),
            model=self.model,
            compute=self.compute,
        )
        text.take([int(token)], scores)
        text.in_cache = kept
        return text.tokens[-1]


def computed_in(compute: Compute) -> Compute:
    """Returns the options by which text is computed.

    A CPU computes in float32: a bfloat16 product of few rows takes many times as long there.
    """
    dtype = "float32" if jax.default_backend() == "cpu" else compute.dtype
    # Attention in blocks keeps keys and values too. Layers apart, unless there are many, since a loop over them would
    # copy each layer's weights for every token.
    return dataclasses.replace(anywhere(compute), dtype=dtype, recompute="none", layers="auto")


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least the number."""
    return 1 << (number - 1).bit_length()
