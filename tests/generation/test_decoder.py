"""Texts in the slots of a cache: the tokens that the uncached model draws, whatever is beside them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.generation import decoder
from jaxgpt.generation.decoder import Decoder
from jaxgpt.models import blocks, cache, gpt2
from jaxgpt.models.blocks import Context
from jaxgpt.options.config import Compute, Model, Sampling
from tests import whole

MODEL = Model(layers=2, heads=2, width=16, context=13, vocabulary_size=20)
COMPUTE = Compute()
PROMPTS = [np.array([3, 1, 4, 1, 5]), np.array([2]), np.arange(20)]  # the last is longer than the context
GREEDY = Sampling(temperature=0.0)
TOKENS = 30  # more than two contexts
SLOTS = 3


@pytest.fixture(scope="module")
def params():
    """Parameters larger than at initialisation, so that the model's tokens are not all about as likely."""
    return jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def uncached(params):
    """A function that draws greedily, running the whole window anew for each token."""
    forward = jax.jit(functools.partial(whole.logits, model=MODEL, compute=COMPUTE))

    def draw(prompt, count=TOKENS, penalty=1.0):
        window, tokens = list(map(int, prompt))[-MODEL.context :], []
        for _ in range(count):
            padded = np.zeros((1, MODEL.context), np.int32)  # what lies behind the last token has no influence
            padded[0, : len(window)] = window
            logits = np.array(forward(params, padded)[0, len(window) - 1])
            for token in {*map(int, prompt), *tokens}:
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            tokens.append(int(np.argmax(logits)))
            window.append(tokens[-1])
            if len(window) > MODEL.context:
                window = window[-(MODEL.context // 2) :]
        return tokens

    return draw


@pytest.fixture(scope="module")
def together(params):
    """A function that draws texts side by side, each (prompt, options, seed) in the slot of its place."""

    def draw(texts, count=TOKENS, slots=SLOTS, model=MODEL, most=decoder.MOST_AT_ONCE, capacity=100):
        slotted = Decoder(params, model, COMPUTE, slots=slots, capacity=capacity)
        drawn = {slot: [slotted.start(slot, *text)] for slot, text in enumerate(texts)}
        while drawn:
            short = [slot for slot in drawn if len(drawn[slot]) < count]
            if not short:
                break
            for slot, tokens in slotted.go_on(most).items():
                drawn[slot] += tokens
        return [drawn[slot][:count] for slot in sorted(drawn)]

    return draw


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2], PROMPTS])
def test_greedy_texts_are_those_of_the_uncached_model(together, uncached, prompts):
    """The prompts fill one to all of the slots, differ in length, and go beyond the context."""
    expected = [uncached(prompt) for prompt in prompts]
    assert together([(prompt, GREEDY, 0) for prompt in prompts]) == expected
    assert all(len(set(text)) > 3 for text in expected)  # texts in which a mistake would show


def test_a_free_slot_that_never_had_a_text_goes_along(together, uncached):
    """Three texts of four slots: the fourth makes it a power of two."""
    expected = [uncached(prompt) for prompt in PROMPTS]
    assert together([(prompt, GREEDY, 0) for prompt in PROMPTS], slots=4) == expected


def test_one_slot(together, uncached):
    assert together([(PROMPTS[0], GREEDY, 0)], slots=1) == [uncached(PROMPTS[0])]


def test_how_many_tokens_come_at_once_changes_nothing(together, uncached):
    expected = [uncached(prompt) for prompt in PROMPTS]
    for most in (1, 3):
        assert together([(prompt, GREEDY, 0) for prompt in PROMPTS], most=most) == expected


def test_stacked_layers_are_walked_as_well(together, uncached, monkeypatch):
    """Layers stay stacked in a model that has more of them than are unrolled."""
    monkeypatch.setattr(decoder, "arrange", lambda params, compute: params)
    assert together([(PROMPTS[0], GREEDY, 0)]) == [uncached(PROMPTS[0])]


def test_a_context_of_one_token():
    model = Model(layers=1, heads=1, width=8, context=1, vocabulary_size=7)
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(model, jax.random.key(1)))
    slotted = Decoder(params, model, COMPUTE, slots=1, capacity=9)
    text = [3, slotted.start(0, [3], GREEDY, 0)]
    for _ in range(4):
        text += slotted.go_on()[0]
    logits = jax.jit(functools.partial(whole.logits, model=model, compute=COMPUTE))(params, jnp.arange(7)[:, None])
    follows = jnp.argmax(logits[:, 0], axis=-1).tolist()
    assert text[1:] == [follows[token] for token in text[:-1]]


def test_a_text_that_begins_later_in_a_used_slot(params, uncached):
    """The slot's last text has no influence, and the texts beside it go on."""
    slotted = Decoder(params, MODEL, COMPUTE, slots=2, capacity=100)
    first = [slotted.start(0, PROMPTS[0], GREEDY, 0)]
    slotted.start(1, PROMPTS[2], Sampling(temperature=3.0), 5)
    for _ in range(7):
        first += slotted.go_on(2)[0]
    slotted.stop(1)
    assert slotted.free() == [1]
    first += slotted.go_on(1)[0]
    second = [slotted.start(1, PROMPTS[1], GREEDY, 0)]
    while len(second) < TOKENS:
        drawn = slotted.go_on()
        first += drawn[0]
        second += drawn[1]
    assert second[:TOKENS] == uncached(PROMPTS[1])
    assert first == uncached(PROMPTS[0], len(first))


DRAWN = [
    (PROMPTS[0], Sampling(temperature=1.5), 1),
    (PROMPTS[1], Sampling(temperature=1.0, top_k=5, min_p=0.05), 2),
    (PROMPTS[2], Sampling(temperature=2.0, top_p=0.8, repetition_penalty=1.5), 3),
]


def test_a_seed_draws_the_same_text_whatever_is_beside_it(together):
    alone = [together([text])[0] for text in DRAWN]
    assert together(DRAWN) == alone
    assert together(DRAWN[::-1]) == alone[::-1]
    assert together([DRAWN[0], (PROMPTS[0], GREEDY, 0), DRAWN[0]])[::2] == [alone[0]] * 2
    assert together([(*DRAWN[0][:2], 7)]) != [alone[0]]


def test_a_longer_text_begins_with_the_shorter_one(together):
    assert together(DRAWN[:1], count=20)[0][:5] == together(DRAWN[:1], count=5)[0]


def test_the_repetition_penalty_counts_prompt_and_drawn_tokens(together, uncached):
    """All of them, those that the context has forgotten too."""
    options = Sampling(temperature=0.0, repetition_penalty=1.5)
    texts = together([(prompt, options, 0) for prompt in PROMPTS])
    assert texts == [uncached(prompt, penalty=1.5) for prompt in PROMPTS]
    assert texts != [uncached(prompt) for prompt in PROMPTS]


def test_a_token_beyond_the_vocabulary_is_not_drawn(together):
    model = dataclasses.replace(MODEL, vocabulary_size=5)
    (text,) = together([(PROMPTS[0] % 5, Sampling(temperature=50.0), 0)], count=100, model=model)
    assert set(text) == set(range(5))


def test_one_program_serves_every_setting_and_length(together):
    program: Any = decoder._decode
    together(DRAWN)
    before = program._cache_size()
    for count in (2, 5, 17):
        together([(PROMPTS[0][:2], Sampling(temperature=0.3, top_k=count), count)], count=count)
    assert program._cache_size() == before


def test_a_short_text_has_a_small_cache(params):
    """A power of two that holds it, and at most the context."""
    model = dataclasses.replace(MODEL, context=1000)
    lengths = [Decoder(params, model, COMPUTE, slots=1, capacity=n).capacity for n in (3, 60, 64, 65, 2000)]
    assert lengths == [16, 64, 64, 128, 1000]


@pytest.mark.parametrize(("dtype", "layers"), [("float32", "apart"), ("bfloat16", "stacked")])
def test_logits_are_those_of_the_whole_forward(params, dtype, layers):
    """Prompts of different lengths, then token by token.

    In bfloat16 both ways round each activation, of 8 bits, in places of their own; what comes out differs from the
    float32 logits by as much, and no more is asked of them.
    """
    compute = Compute(dtype=dtype)
    cast = jax.tree.map(lambda array: array.astype(dtype), params)
    cast = cast if layers == "stacked" else blocks.unstacked(cast)
    context = Context(MODEL, compute)
    prefill = jax.jit(lambda *of: cache.prefill(gpt2, *of, context))
    decode = jax.jit(lambda *of: cache.decode(gpt2, *of, context))
    texts = np.random.default_rng(0).integers(20, size=(3, MODEL.context)).astype(np.int32)
    forward = jax.jit(whole.logits, static_argnames=("model", "compute"))
    exact, rounded = forward(params, texts, MODEL, COMPUTE), forward(cast, texts, MODEL, compute)
    limit = 1e-5 * float(jnp.abs(exact).max()) if dtype == "float32" else 2 * float(jnp.abs(rounded - exact).max())
    lengths = np.array([4, 1, 7], np.int32)
    caches = []
    for text, length in enumerate(lengths):
        padded = np.where(np.arange(8) < length, texts[text, :8], 9)[None]  # what is behind must not matter
        logits, filled = prefill(cast, cache.init_cache(cast, MODEL.context, MODEL, dtype), padded, length)
        caches.append(filled)
        assert jnp.abs(logits[0] - rounded[text, length - 1]).max() <= limit
    for _ in range(MODEL.context - lengths.max()):
        rows = np.arange(3)
        logits, caches = decode(cast, tuple(caches), texts[rows, lengths], lengths)
        assert jnp.abs(logits - rounded[rows, lengths]).max() <= limit
        lengths += 1


def test_on_a_cpu_text_is_computed_in_float32():
    assert decoder.computed_in(Compute(dtype="bfloat16")).dtype == "float32"
