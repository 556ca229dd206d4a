"""Rollouts: where answers end, and that the engine draws from the distribution that the trainer differentiates."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.generation import decoder, rollouts
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models import cache, family
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import policy
from jaxgpt.options.config import Compute, Config, Model, Objective, Parallel, Sampling, Training
from jaxgpt.training import log_probabilities
from jaxgpt.training.state import init_params

MODEL = Model(layers=2, heads=2, width=16, context=24, vocabulary_size=13, family="llama", kv_heads=1)
COMPUTE = Compute(attention="blocks", recompute="none", layers="unrolled", classifier_chunk=16)
CONFIG = Config(model=MODEL, compute=COMPUTE, training=Training(batch_size=4, sequence_length=20))
PROMPTS = [np.array(prompt, np.int32) for prompt in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2])]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda array: 3 * array, init_params(CONFIG))  # so that tokens differ in probability


def draw(params, seeds=(1, 2, 3, 4), **options):
    return rollouts.draw(params, PROMPTS, seeds, model=MODEL, compute=COMPUTE, most=12, **options)


@jax.jit
def prefill(params, kept, tokens, length):
    return cache.prefill(family(MODEL), params, kept, tokens, length, Context(MODEL, COMPUTE))


@jax.jit
def decode(params, caches, tokens, lengths):
    return cache.decode(family(MODEL), params, caches, tokens, lengths, Context(MODEL, COMPUTE))


def engine_logp(params, prompt, answer):
    """The log-probability of each token of an answer by prefill and decode, a token at a time."""
    kept = cache.init_cache(params, 32, MODEL, jnp.float32)
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt)] = prompt
    logits, kept = prefill(params, kept, jnp.asarray(tokens), jnp.int32(len(prompt)))
    found, caches = [], (kept,)
    for place, token in enumerate(answer):
        found.append(float(jax.nn.log_softmax(logits[0])[token]))
        length = jnp.asarray([len(prompt) + place], jnp.int32)
        logits, caches = decode(params, caches, jnp.asarray([token], jnp.int32), length)
    return found


def test_engine_and_trainer_agree_and_the_first_ratio_is_1(params):
    answers = draw(params)
    tokens, targets = rollouts.arrays(PROMPTS, answers, 20)
    found = log_probabilities.make_forward(CONFIG)(params, None, tokens, targets)
    assert found.values is None
    logp = np.asarray(found.logp)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        there = targets[row] != IGNORED
        assert targets[row][there].tolist() == answer
        np.testing.assert_allclose(logp[row][there], engine_logp(params, prompt, answer), atol=2e-5)
        assert not logp[row][~there].any()

    weights, zeros = (targets != IGNORED).astype(np.float32), np.zeros_like(logp)
    batch = policy.Batch(*map(jnp.asarray, (tokens, targets, weights, weights, logp, logp, zeros, zeros)))
    context = Context(MODEL, COMPUTE, objective=Objective(name="policy"))
    _, metrics, _ = policy.loss_and_grads(family(MODEL), params, batch, context)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_of_update"] == pytest.approx(0, abs=1e-6)


def test_answers_end(params):
    """An answer ends at its longest, or with the token that ends it, which is part of the answer."""
    whole = draw(params)
    assert [len(answer) for answer in whole] == [12] * 4
    end = whole[0][5]
    for answer, cut in zip(whole, draw(params, ends=lambda answer: answer[-1] == end), strict=True):
        assert cut == (answer[: answer.index(end) + 1] if end in answer else answer)


def test_an_answer_depends_on_its_prompt_and_seed_alone(params, monkeypatch):
    """Other answers drawn beside it don't matter, as far as rounding lets tokens be the same."""
    together = draw(params)
    monkeypatch.setattr(rollouts, "MOST_SLOTS", 1)
    assert draw(params) == together
    assert draw(params, seeds=(5, 6, 7, 8)) != together


def test_tokens_come_as_often_as_their_probability(params):
    """Hundreds of first tokens: within 5 standard deviations of what the trainer's distribution says."""
    n = 600
    answers = rollouts.draw(params, [PROMPTS[0]] * n, range(n), model=MODEL, compute=COMPUTE, most=1)
    counts = np.bincount([answer[0] for answer in answers], minlength=13)
    tokens, targets = np.tile(PROMPTS[0], (13, 1)), np.full((13, 3), IGNORED, np.int32)
    targets[:, 2] = np.arange(13)
    config = dataclasses.replace(CONFIG, training=Training(sequence_length=3))
    p = np.exp(np.asarray(log_probabilities.make_forward(config)(params, None, tokens, targets).logp[:, 2]))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_greedy_answers_too(params):
    once, again = (draw(params, seeds=seeds, sampling=Sampling(temperature=0.0)) for seeds in ((1,) * 4, (2,) * 4))
    assert once == again


def test_a_text_that_is_longer_than_the_context_is_refused(params):
    with pytest.raises(ValueError, match="a prompt and 20 tokens are 25 tokens, and the context has 24"):
        rollouts.draw(params, PROMPTS, (1, 2, 3, 4), model=MODEL, compute=COMPUTE, most=20)


@pytest.mark.parametrize(("devices", "zero"), [(2, 1), (4, 3)])
def test_log_probabilities_and_values_on_several_devices(devices, zero):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(13, size=(2, 4, 20), dtype=np.int32)
    objective = Objective(name="policy", value_coefficient=0.1)
    one = dataclasses.replace(CONFIG, objective=objective)
    several = dataclasses.replace(one, parallel=Parallel(devices=devices, zero=zero))
    expected = log_probabilities.make_forward(one)(init_params(one), None, tokens, targets)
    params = jax.jit(lambda: init_params(several))()
    found = log_probabilities.make_forward(several)(params, None, tokens, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_what_is_drawn_side_by_side_does_not_depend_on_time(params, monkeypatch):
    """Bursts whose length depended on time, as a server's does, would change the rounding, and so a resumed run."""
    decoded, whole = [], decoder.Decoder._decode

    def noted(self, slots, count):
        decoded[-1].append((tuple(slots), count))
        return whole(self, slots, count)

    monkeypatch.setattr(decoder.Decoder, "_decode", noted)
    drawn = []
    for tick in (1e-9, 1e-3, 10.0):
        clock = itertools.count(1)
        monkeypatch.setattr(decoder.time, "perf_counter", lambda clock=clock, tick=tick: tick * next(clock))
        decoded.append([])
        drawn.append(draw(params, ends=lambda answer: answer[-1] < 2))
    assert decoded[0] == decoded[1] == decoded[2]
    assert drawn[0] == drawn[1] == drawn[2]


def test_several_devices_draw_what_one_does(params):
    several = [jax.device_put(params, device) for device in jax.devices()[:3]]
    options = {"model": MODEL, "compute": COMPUTE, "most": 12}
    assert rollouts.draw_on_devices(several, PROMPTS, (1, 2, 3, 4), **options) == draw(params)
    assert rollouts.draw_on_devices(several, [], (), **options) == []


def test_seeds_are_functions_of_run_rollout_and_place():
    found = {(seed, rollout): rollouts.seeds_of(seed, rollout, range(50)) for seed in range(3) for rollout in range(3)}
    assert len({seed for seeds in found.values() for seed in seeds}) == 9 * 50
    assert rollouts.seeds_of(2, 1, [7, 3]) == [found[2, 1][7], found[2, 1][3]]


@pytest.mark.parametrize("text", ["Answer: 4<|im_end|>", "é<|im_end|>", "<|im_end|>", "<|im_end<|im_end|>"])
def test_an_answer_ends_with_its_stop_text(text):
    """It keeps the token that completes the stop text, and none after it; the text is the part before it."""
    tokenizer, stops = tokenizers.make("bytes", ""), ("<|im_end|>", "</s>")
    ends, tokens = rollouts.end_of_answer(tokenizer, stops), tokenizer.encode(text + "more").tolist()
    first = next(n for n in range(1, len(tokens)) if ends(tokens[:n]))
    assert tokenizer.decode(tokens[:first]) == text
    assert rollouts.text_of(tokens[:first], tokenizer, stops) == text.removesuffix("<|im_end|>")
    assert rollouts.text_of(tokens[: first - 1], tokenizer, stops) == text[:-1]


def test_an_answer_ends_with_the_end_of_a_text():
    tokenizer = tokenizers.make("gpt2", "")
    tokens = [*tokenizer.encode("4").tolist(), tokenizer.end_of_text]
    ends = rollouts.end_of_answer(tokenizer, ())
    assert [ends(tokens[:1]), ends(tokens)] == [False, True]
    assert rollouts.text_of(tokens, tokenizer, ()) == "4"
