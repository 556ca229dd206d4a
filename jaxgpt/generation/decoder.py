"""Several texts that go on at once, in the slots of one cache.

    prefill    one text's prompt into its slot, and its first token: one program for each power of two of the length
    decode     up to MOST_AT_ONCE further tokens of all texts, in one loop on the device: one program

A text that has filled the model's context forgets its older half: the newer half is run again as a prompt, and the text
goes on from there. So each token is drawn from at least half a context of text (if there is as much), and forgetting
costs one prefill in half a context of tokens.
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

from jaxgpt.config import Compute, Model, Sampling
from jaxgpt.generation.sampling import Settings, draw, settings
from jaxgpt.models import gpt2, gpt2_cache
from jaxgpt.training.step import arrange, cast

MOST_AT_ONCE = 32  # tokens of a text from one call of `decode`
SHORTEST = 16  # prompts are padded to powers of two from here on
BURST_SECONDS = 0.05  # what a call of `decode` may take, so that text comes as a stream


class Slots(NamedTuple):
    """The texts on the device."""

    cache: gpt2_cache.Cache
    last: Int[Array, " B"]  # the newest token, which is not in the cache yet
    lengths: Int[Array, " B"]  # tokens in the cache
    drawn: Int[Array, " B"]  # tokens drawn so far
    seen: Bool[Array, "B V"]  # tokens that occur in the text


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="slots")
def _prefill(
    params: gpt2.Params,
    slots: Slots,
    options: Settings,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    drawn: Int[Array, ""],
    seen: Bool[Array, " V"],
    *,
    model: Model,
    compute: Compute,
) -> tuple[Slots, Int[Array, ""]]:
    logits, cache = gpt2_cache.prefill(params, slots.cache, slot, tokens, length, model, compute)
    options = jax.tree.map(lambda column: column[slot][None], options)
    token = draw(logits, options, drawn[None], seen[None])[0]
    return Slots(
        cache,
        slots.last.at[slot].set(token),
        slots.lengths.at[slot].set(length),
        slots.drawn.at[slot].set(drawn + 1),
        slots.seen.at[slot].set(seen.at[token].set(True)),
    ), token


@functools.partial(jax.jit, static_argnames="model", donate_argnames="slots")
def _decode(
    params: gpt2.Params,
    slots: Slots,
    options: Settings,
    active: Bool[Array, " B"],
    count: Int[Array, ""],
    *,
    model: Model,
) -> tuple[Slots, Int[Array, "B N"]]:
    """`count` tokens, at most MOST_AT_ONCE, of each active text; what is behind them or another's means nothing."""
    rows, one = jnp.arange(len(active)), active.astype(jnp.int32)

    def step(i: Array, carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
        slots, out = carry
        logits, cache = gpt2_cache.decode(params, slots.cache, slots.last, slots.lengths, model)
        tokens = jnp.where(active, draw(logits, options, slots.drawn, slots.seen), slots.last)
        slots = Slots(cache, tokens, slots.lengths + one, slots.drawn + one, slots.seen.at[rows, tokens].set(True))
        return slots, lax.dynamic_update_slice(out, tokens[:, None], (0, i))

    return lax.fori_loop(0, count, step, (slots, jnp.zeros((len(active), MOST_AT_ONCE), jnp.int32)))


@dataclasses.dataclass
class _Text:
    """What is known here of the text in a slot."""

    tokens: list[int]
    prompt: int  # how many of them were not drawn
    in_cache: int


class Decoder:
    """Slots of a model's cache, and the texts in them.

    `capacity` is the longest text, of prompt and drawn tokens, that there will be; texts may be longer where it is at
    least the model's context. Parameters are whole on each of their devices; the first one is used.
    """

    def __init__(self, params: gpt2.Params, model: Model, compute: Compute, *, slots: int, capacity: int):
        self.model, self.compute = model, computed_in(compute)
        self.capacity = min(model.context, _power_of_two(capacity))
        params = jax.tree.map(lambda array: array.addressable_data(0), params)
        self._params = cast(arrange(params, compute) if isinstance(params.blocks, gpt2.Block) else params, self.compute)
        zeros = np.zeros(slots, np.int32)
        seen = np.zeros((slots, model.vocabulary_size), bool)
        cache = gpt2_cache.init(self._params, slots, self.capacity, model)
        self._slots = jax.device_put(Slots(cache, zeros, zeros, zeros, seen))  # type: ignore[arg-type]
        self._options = [(Sampling(temperature=0.0), 0)] * slots
        self._texts: list[_Text | None] = [None] * slots
        self._burst = 1

    def free(self) -> list[int]:
        """The slots without a text."""
        return [slot for slot, text in enumerate(self._texts) if text is None]

    def start(self, slot: int, prompt: Sequence[int] | np.ndarray, sampling: Sampling, seed: int) -> int:
        """Puts a text into a free slot, and returns its first token. The prompt has at least one token."""
        self._texts[slot] = _Text(list(map(int, prompt)), len(prompt), 0)
        self._options[slot] = (sampling, seed)
        self._settings = settings(self._options)
        return self._run_prompt(slot, min(len(prompt), self.model.context))

    def stop(self, slot: int) -> None:
        """Frees a slot."""
        self._texts[slot] = None
        self._options[slot] = (Sampling(temperature=0.0), 0)
        self._settings = settings(self._options)

    def go_on(self, most: int = MOST_AT_ONCE) -> dict[int, list[int]]:
        """Some further tokens of each text, at least one and at most `most`, by slot."""
        texts = {slot: text for slot, text in enumerate(self._texts) if text is not None}
        full = [slot for slot, text in texts.items() if text.in_cache == self.model.context]
        if full:
            kept = max(1, self.model.context // 2)
            return {slot: [self._run_prompt(slot, kept)] for slot in full} | self._decode(
                {slot: text for slot, text in texts.items() if slot not in full}, 1
            )
        room = min(self.capacity - text.in_cache for text in texts.values())
        count = min(most, room, self._burst, MOST_AT_ONCE)
        started = time.perf_counter()
        drawn = self._decode(texts, count)
        seconds = (time.perf_counter() - started) / count
        self._burst = max(1, min(2 * self._burst, int(BURST_SECONDS / seconds)))
        return drawn

    def _decode(self, texts: dict[int, _Text], count: int) -> dict[int, list[int]]:
        if not texts:
            return {}
        active = np.array([slot in texts for slot in range(len(self._texts))])
        self._slots, out = _decode(self._params, self._slots, self._settings, active, np.int32(count), model=self.model)
        tokens = np.asarray(out)[:, :count]
        for slot, text in texts.items():
            text.tokens += tokens[slot].tolist()
            text.in_cache += count
        return {slot: tokens[slot].tolist() for slot in texts}

    def _run_prompt(self, slot: int, kept: int) -> int:
        """Runs the last `kept` tokens of the slot's text as its prompt, and returns the token that is drawn then."""
        text = self._texts[slot]
        assert text is not None
        padded = np.zeros((1, min(self.capacity, _power_of_two(kept))), np.int32)
        padded[0, :kept] = text.tokens[-kept:]
        seen = np.zeros(self.model.vocabulary_size, bool)
        seen[[token for token in text.tokens if token < len(seen)]] = True
        drawn = len(text.tokens) - text.prompt
        self._slots, token = _prefill(
            self._params,
            self._slots,
            self._settings,
            np.int32(slot),
            padded,
            np.int32(kept),
            np.int32(drawn),
            seen,
            model=self.model,
            compute=self.compute,
        )
        text.tokens.append(int(token))
        text.in_cache = kept
        return text.tokens[-1]


def computed_in(compute: Compute) -> Compute:
    """How text is computed. On a CPU in float32: a bfloat16 product of few rows takes many times as long there."""
    dtype = "float32" if jax.default_backend() == "cpu" else compute.dtype
    # The attention that takes any length, dtype and device, and keeps keys and values.
    return dataclasses.replace(compute, dtype=dtype, attention="blocks", recompute="norms")


def _power_of_two(length: int) -> int:
    return max(SHORTEST, 1 << (length - 1).bit_length())
