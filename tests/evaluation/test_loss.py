"""The validation loss: the plain mean over all of a split's targets."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.evaluation.scoring import make_validation_loss
from jaxgpt.models import gpt2
from jaxgpt.options.config import Config, Model, Training
from tests import whole

LENGTH = 7
CONFIG = Config(model=Model(layers=1, heads=1, width=8, context=9, vocabulary_size=20))
TOKENS = np.random.default_rng(0).integers(0, 20, size=53).astype(np.uint16)  # 52 targets: 7 windows and 3 tokens more


@pytest.fixture(scope="module")
def params():
    """Parameters larger than at initialisation, so that targets differ in their loss."""
    return jax.tree.map(lambda array: 10 * array, gpt2.init(CONFIG.model, jax.random.key(0)))


@pytest.fixture(scope="module")
def losses(params):
    """-ln p of every target by the forward pass alone, each window on its own, in float64 from its logits on."""
    forward = jax.jit(lambda tokens: whole.logits(params, tokens, CONFIG.model, CONFIG.compute))
    found = []
    for start in range(0, len(TOKENS) - 1, LENGTH):
        window = TOKENS[start : start + LENGTH + 1].astype(np.int64)
        padded = np.zeros((1, LENGTH), np.int64)
        padded[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(forward(jnp.asarray(padded, jnp.int32))[0], np.float64)[: len(window) - 1]
        normaliser = np.log(np.sum(np.exp(logits), axis=-1))
        found += (normaliser - logits[np.arange(len(logits)), window[1:]]).tolist()
    assert len(found) == len(TOKENS) - 1
    return found


def validation_loss(params, *, batch_size=3, batches=0, tokens=TOKENS, config=CONFIG):
    training = Training(batch_size=batch_size, evaluation_batches=batches)
    return make_validation_loss(dataclasses.replace(config, training=training), tokens, LENGTH)(params)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_it_is_the_mean_over_all_targets_whatever_the_batch_size(params, losses, batch_size):
    """This holds too if a batch has more places than there are tokens."""
    assert validation_loss(params, batch_size=batch_size) == pytest.approx(np.mean(losses), rel=1e-5)
    assert np.std(losses) > 1  # a wrong weighting would show


def test_a_limit_takes_batches_from_the_beginning(params, losses):
    """Two batches of three windows of seven: the mean over the first 42 targets."""
    assert validation_loss(params, batches=2) == pytest.approx(np.mean(losses[: 2 * 3 * LENGTH]), rel=1e-5)


def test_a_limit_beyond_the_end_is_no_limit(params, losses):
    assert validation_loss(params, batches=1000) == pytest.approx(np.mean(losses), rel=1e-5)


def test_one_target_is_enough(params, losses):
    assert validation_loss(params, tokens=TOKENS[:2]) == pytest.approx(losses[0], rel=1e-5)


def test_parameters_of_zero_know_nothing(params):
    """Every token has the same probability, 1 of V: padding has none of it."""
    nothing = jax.tree.map(jnp.zeros_like, params)
    assert validation_loss(nothing) == pytest.approx(math.log(20), rel=1e-6)


def test_one_evaluation_after_another_compiles_nothing(params):
    """It leaves the parameters alone: they are the training state's."""
    evaluate = make_validation_loss(CONFIG, TOKENS, LENGTH)
    before = jax.device_get(params)
    first = evaluate(params)
    compilations = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert evaluate(params) == first
        assert not compilations
        jax.jit(lambda x: x + 1)(jnp.ones(3))
        assert compilations  # the listener would have heard one
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    jax.tree.map(np.testing.assert_array_equal, params, before)
