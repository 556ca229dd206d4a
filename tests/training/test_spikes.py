"""The spike detector, against one that looks back over the whole history in float64; advice that changes something."""

import re
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.options.config import Compute, Config, Optimizer
from jaxgpt.training import spikes

SIZE = 7


def scores(values, take, size=SIZE):
    """The detector's z-scores of a series, and its window at the end."""

    def one(window, pair):
        return spikes.update(window, *pair)

    series = jnp.asarray(values, jnp.float32), jnp.asarray(take)
    window, z = jax.jit(lambda series: jax.lax.scan(one, spikes.init(size), series))(series)
    return np.asarray(z), window


def expected(values, take, size=SIZE):
    seen, result = [], []
    for value, taken in zip(values, take, strict=True):
        if not taken:
            result.append(np.nan)
            continue
        seen.append(float(value))
        last = np.array(seen[-size:], np.float64)
        defined = len(seen) > size
        result.append((last[-1] - last.mean()) / last.std() if defined and last.std() else 0.0 if defined else np.nan)
    return np.array(result)


@pytest.mark.parametrize("seed", range(3))
def test_z_scores_are_those_of_the_last_values(seed):
    """The series falls, with noise and spikes, and some of its values are left out."""
    random = np.random.default_rng(seed)
    values = (4 / np.sqrt(1 + np.arange(60)) + 0.1 * random.standard_normal(60)).astype(np.float32)
    values[random.integers(60, size=4)] *= 3
    take = random.random(60) > 0.2
    values[~take] = np.nan  # as they are left out
    z, window = scores(values, take)
    np.testing.assert_allclose(z, expected(values, take), rtol=1e-4, atol=1e-5)
    assert window.count == take.sum()


def test_undefined_until_the_window_was_full():
    z, _ = scores(np.arange(SIZE + 2.0), np.ones(SIZE + 2, bool))
    assert np.isnan(z).tolist() == [True] * SIZE + [False] * 2


def test_equal_values_have_no_spike():
    z, _ = scores(np.full(2 * SIZE, 0.1), np.ones(2 * SIZE, bool))
    assert (z[SIZE:] == 0).all()


def test_the_largest_z_is_the_root_of_the_window_less_one():
    """One value above W-1 equal ones, whatever its size."""
    values = np.ones(SIZE + 1)
    values[-1] = 1e6
    z, _ = scores(values, np.ones(SIZE + 1, bool))
    assert z[-1] == pytest.approx(np.sqrt(SIZE - 1), rel=1e-5)


def test_a_spike_is_above_the_threshold_and_0_means_none():
    z = jnp.array([7.1, 7.0, -9.0, np.nan])
    assert spikes.is_spike(z, 7.0).tolist() == [True, False, False, False]
    assert not spikes.is_spike(z, 0.0).any()


# Advice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("step", [1, 1000])
def test_nothing_that_is_so_already(dtype, parameters, clip_norm, warmup, step):
    config = Config(
        compute=Compute(dtype=dtype, parameters=parameters),
        optimizer=Optimizer(clip_norm=clip_norm, warmup_steps=warmup),
    )
    text = spikes.advice_after_nonfinite(config, step)
    assert "--optimizer.learning-rate" in text
    for option, value in re.findall(r"--([a-z.-]+\.[a-z-]+) ([a-z0-9]+)", text):
        section, key = option.replace("-", "_").split(".")
        if value in ("float32", "1"):
            assert str(getattr(getattr(config, section), key)) != value
    assert ("--compute.dtype" in text) == (dtype != "float32")
    assert ("--compute.parameters" in text) == (parameters != "float32")
    assert ("a smaller --optimizer.clip-norm" in text) == (clip_norm > 0)
    assert ("gradients are not clipped" in text) == (clip_norm == 0)
    assert ("a longer --optimizer.warmup-steps" in text) == (warmup > 0 and step <= 20)


def test_every_option_that_is_advised_exists():
    config = Config(compute=Compute(dtype="bfloat16", parameters="bfloat16"), optimizer=Optimizer(clip_norm=0))
    for option in re.findall(r"--([a-z.-]+\.[a-z-]+)", spikes.advice_after_nonfinite(config, 1)):
        section, key = option.replace("-", "_").split(".")
        assert key in {field.name for field in fields(getattr(config, section))}
