import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.optimizers import schedules
from jaxgpt.options.config import Optimizer

STEPS, WARMUP = 100, 10
OPTIONS = Optimizer(learning_rate=0.5, warmup_steps=WARMUP, final_fraction=0.1)
SHAPES = ["cosine", "linear", "constant", "wsd"]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rates(steps, length, options):
    return jax.vmap(lambda step: schedules.learning_rate(step, length, options))(steps)


def rates(length, options):
    """The learning rates of steps 0 to `length`, one more than there are, so that the last is where it all leads to."""
    return np.asarray(_rates(jnp.arange(length + 1), length, options))


def after_warmup(schedule):
    return rates(STEPS, dataclasses.replace(OPTIONS, schedule=schedule))[WARMUP:]


def of_optax(schedule):
    return np.array([schedule(step) for step in range(STEPS - WARMUP + 1)])


def test_cosine_is_optax_s():
    expected = of_optax(optax.cosine_decay_schedule(0.5, STEPS - WARMUP, alpha=0.1))
    np.testing.assert_allclose(after_warmup("cosine"), expected, rtol=1e-6)


def test_linear_is_optax_s():
    expected = of_optax(optax.linear_schedule(0.5, 0.05, STEPS - WARMUP))
    np.testing.assert_allclose(after_warmup("linear"), expected, rtol=1e-6)


def test_constant():
    assert (after_warmup("constant") == 0.5).all()


def test_wsd_as_in_llm_c():
    """Flat until 80% of the steps, then final + (1 - √r) (peak - final)."""
    flat, fall = 80 - WARMUP, 20
    expected = [0.5] * flat + [0.05 + (1 - math.sqrt(i / fall)) * 0.45 for i in range(fall + 1)]
    np.testing.assert_allclose(after_warmup("wsd"), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", SHAPES)
def test_warmup_is_linear_and_ends_at_the_peak(schedule):
    """The first step already learns, with 1/warmup_steps of the peak; the last of the warm-up has the peak."""
    values = rates(STEPS, dataclasses.replace(OPTIONS, schedule=schedule))
    expected = [optax.linear_schedule(0.0, 0.5, WARMUP)(step + 1) for step in range(WARMUP)]
    np.testing.assert_allclose(values[:WARMUP], expected, rtol=1e-6)
    assert values[WARMUP - 1] == values[WARMUP] == np.float32(0.5)


@given(
    schedule=st.sampled_from(SHAPES),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 70),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_length(schedule, steps, warmup, final):
    """The rate rises to the peak, never rises again, and ends at the final rate; no NaN, no 0/0."""
    options = Optimizer(learning_rate=0.5, schedule=schedule, warmup_steps=warmup, final_fraction=final)
    values = rates(steps, options)
    peak, last = np.float32(0.5), np.float32(0.5 * final)
    changes = np.diff(values)
    assert values.dtype == np.float32
    assert ((values > 0) | (values >= last)).all()
    assert (values <= peak).all()
    assert (changes[: max(warmup - 1, 0)] > 0).all()
    assert (changes[warmup:] <= 0).all()
    if warmup < steps:
        assert values[warmup] == peak
        assert values[steps] == pytest.approx(0.5 if schedule == "constant" else last, abs=1e-7)


@pytest.mark.parametrize("schedule", SHAPES)
def test_continuous(schedule):
    """No step changes the rate by more than its share: halving the steps' length halves the largest change.

    wsd falls as a root, so that there a quarter of the length halves it.
    """
    options = dataclasses.replace(OPTIONS, schedule=schedule, warmup_steps=0)
    factor = 4 if schedule == "wsd" else 2
    coarse = np.abs(np.diff(rates(STEPS, options))).max()
    fine = np.abs(np.diff(rates(factor * STEPS, options))).max()
    assert fine == pytest.approx(coarse / 2, rel=0.02)
