"""Decoder of several texts at once, each with a cache of its own in a slot.

    prefill    one text's prompt into its cache, and its first token: one program for each power of two of the length
    decode     up to MOST_AT_ONCE further tokens of some texts, in one loop on the device: one program for each power of
               two of their number

A text that has filled the model's context forgets its older half: the newer half is run again as a prompt, and the text
goes on from there. So each token is drawn from at least half a context of text (if there is as much), and forgetting
costs one prefill in half a context of tokens. Where positions are not learned, there is one for any place: then a text
goes on beyond the context, and forgets only what it has no room for in its cache.
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

from jaxgpt.generation.sampling import SamplingSettings, draw, settings
from jaxgpt.models import family
from jaxgpt.models.attend import Cache
from jaxgpt.models.blocks import Context, Params, are_stacked, arrange, cast
from jaxgpt.models.cache import decode, init_cache, prefill
from jaxgpt.options.config import Compute, Model, Sampling

MOST_AT_ONCE = 32  # tokens of a text from one call of `decode`
SHORTEST = 16  # prompts are padded to powers of two from here on
BURST_SECONDS = 0.05  # what a call of `decode` may take, so that text comes as a stream


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
    *,
    model: Model,
    compute: Compute,
) -> tuple[Slot, Int[Array, ""]]:
    """Runs the first `length` of a prompt's tokens, and draws the token after them."""
    logits, cache = prefill(family(model), params, cache, tokens, length, Context(model, compute))
    token = draw(logits, options, drawn[None], seen[None])[0]
    return Slot(cache, token, length, drawn + 1, seen.at[token].set(True)), token


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="slots")
def _decode(
    params: Params,
    slots: tuple[Slot, ...],
    options: SamplingSettings,
    count: Int[Array, ""],
    *,
    model: Model,
    compute: Compute,
) -> tuple[tuple[Slot, ...], Int[Array, "B N"]]:
    """Draws `count` further tokens of each text, at most MOST_AT_ONCE = N; columns behind them mean nothing."""
    rows = jnp.arange(len(slots))
    last, length, drawn, seen = (jnp.stack(column) for column in list(zip(*slots, strict=True))[1:])

    def step(i: Array, carry: tuple) -> tuple:
        caches, last, seen, out = carry
        logits, caches = decode(family(model), params, caches, last, length + i, Context(model, compute))
        tokens = draw(logits, options, drawn + i, seen)
        return caches, tokens, seen.at[rows, tokens].set(True), lax.dynamic_update_slice(out, tokens[:, None], (0, i))

    out = jnp.zeros((len(slots), MOST_AT_ONCE), jnp.int32)
    caches, last, seen, out = lax.fori_loop(0, count, step, (tuple(slot.cache for slot in slots), last, seen, out))
    columns = zip(caches, last, length + count, drawn + count, seen, strict=True)
    return tuple(Slot(*column) for column in columns), out


@dataclasses.dataclass
class _Text:
    """The host's record of the text in a slot."""

    tokens: list[int]
    prompt: int  # how many of them were not drawn
    options: tuple[Sampling, int]
    in_cache: int = 0


NOTHING = (Sampling(temperature=0.0), 0)  # the options of a slot without a text


class Decoder:
    """Slots, and the texts in them.

    `capacity` is the longest text, of prompt and drawn tokens, that there will be; texts may be longer, and forget,
    where it is at least the model's context. Parameters are whole on each of their devices; the first one is used.
    """

    def __init__(self, params: Params, model: Model, compute: Compute, *, slots: int, capacity: int):
        self.model, self.compute = model, computed_in(compute)
        self.capacity = max(SHORTEST, power_of_two(capacity))
        if family(model).LEARNED_POSITIONS or capacity <= model.context:
            self.capacity = min(model.context, self.capacity)
        params = jax.tree.map(lambda array: array.addressable_data(0), params)
        arranged = arrange(params, self.compute) if are_stacked(params.blocks) else params
        self._params = cast(arranged, self.compute.dtype)
        self._slots = [self._empty() for _ in range(slots)]
        self._texts: list[_Text | None] = [None] * slots
        self._burst = 1

    def _empty(self) -> Slot:
        seen = jnp.zeros(self.model.vocabulary_size, bool)
        last, length, drawn = (jnp.int32(0) for _ in range(3))  # an array each: one is not donated twice
        return Slot(init_cache(self._params, self.capacity, self.model, self.compute.dtype), last, length, drawn, seen)

    def free(self) -> list[int]:
        """Returns the slots without a text."""
        return [slot for slot, text in enumerate(self._texts) if text is None]

    def start(self, slot: int, prompt: Sequence[int] | np.ndarray, sampling: Sampling, seed: int) -> int:
        """Puts a text into a free slot, and returns its first token. The prompt has at least one token."""
        self._texts[slot] = _Text(list(map(int, prompt)), len(prompt), (sampling, seed))
        return self._run_prompt(slot, min(len(prompt), self.capacity))

    def stop(self, slot: int) -> None:
        """Frees a slot."""
        self._texts[slot] = None

    def go_on(self, most: int = MOST_AT_ONCE) -> dict[int, list[int]]:
        """Draws some further tokens of each text, at least one and at most `most`; returns them by slot."""
        running = {slot: text for slot, text in enumerate(self._texts) if text is not None}
        full = [slot for slot, text in running.items() if text.in_cache == self.capacity]
        forgetful = {slot: [self._run_prompt(slot, max(1, self.capacity // 2))] for slot in full}
        others = [slot for slot in running if slot not in full]
        if not others:
            return forgetful
        room = min(self.capacity - running[slot].in_cache for slot in others)
        count = 1 if full else min(most, room, self._burst, MOST_AT_ONCE)
        started = time.perf_counter()
        drawn = self._decode(others, count)
        seconds = (time.perf_counter() - started) / count
        self._burst = max(1, min(2 * self._burst, int(BURST_SECONDS / seconds)))
        return forgetful | drawn

    def _decode(self, slots: list[int], count: int) -> dict[int, list[int]]:
        """Draws `count` tokens of the texts in these slots; returns them by slot.

        Free slots are decoded too, to make a power of two as far as there are any: so few programs are compiled.
        """
        number = min(power_of_two(len(slots)), len(self._slots))
        rows = [*slots, *self.free()][:number]
        texts = [self._texts[slot] for slot in rows]
        options = settings([NOTHING if text is None else text.options for text in texts])
        slots_of = tuple(self._slots[slot] for slot in rows)
        changed, out = _decode(self._params, slots_of, options, np.int32(count), model=self.model, compute=self.compute)
        for slot, new in zip(rows, changed, strict=True):
            self._slots[slot] = new
        drawn = np.asarray(out)[:, :count].tolist()
        for text, tokens in zip(texts, drawn, strict=True):
            if text is not None:
                text.tokens += tokens
                text.in_cache += count
        return dict(zip(slots, drawn, strict=False))

    def _run_prompt(self, slot: int, kept: int) -> int:
        """Runs the last `kept` tokens of the slot's text as its prompt, and returns the token that is drawn then."""
        text = self._texts[slot]
        assert text is not None
        padded = np.zeros((1, min(self.capacity, max(SHORTEST, power_of_two(kept)))), np.int32)
        padded[0, :kept] = text.tokens[-kept:]
        seen = np.zeros(self.model.vocabulary_size, bool)
        seen[[token for token in text.tokens if token < len(seen)]] = True
        self._slots[slot], token = _prefill(
            self._params,
            self._slots[slot].cache,
            settings([text.options]),
            padded,
            np.int32(kept),
            np.int32(len(text.tokens) - text.prompt),
            seen,
            model=self.model,
            compute=self.compute,
        )
        text.tokens.append(int(token))
        text.in_cache = kept
        return text.tokens[-1]


def computed_in(compute: Compute) -> Compute:
    """Returns the options by which text is computed.

    A CPU computes in float32: a bfloat16 product of few rows takes many times as long there.
    """
    dtype = "float32" if jax.default_backend() == "cpu" else compute.dtype
    # The attention that takes any length, dtype and device, and keeps keys and values; layers apart, unless there are
    # many, since a loop over them would copy each layer's weights for every token.
    return dataclasses.replace(compute, dtype=dtype, attention="blocks", recompute="none", layers="auto")


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least the number."""
    return 1 << (number - 1).bit_length()
