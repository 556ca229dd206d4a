import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.optimizers import adamw, rounding
from jaxgpt.options.config import Optimizer

DRAWS = 4096


def draws(values):
    """Returns DRAWS roundings of each value, in float64."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rounded = jax.jit(jax.vmap(lambda key: rounding.stochastic(jnp.asarray(values, jnp.float32), key)))(keys)
    assert rounded.dtype == jnp.bfloat16
    return np.asarray(rounded, np.float64)


def test_it_is_unbiased_and_one_of_the_two_neighbours():
    """A draw is one of two values a step apart: the mean of n errs by at most step/2/√n; five times that is allowed."""
    random = np.random.default_rng(0)
    values = np.float32(random.standard_normal(64) * 10.0 ** random.integers(-20, 20, 64))
    rounded = draws(values)
    step = 2.0 ** (np.floor(np.log2(np.abs(values.astype(np.float64)))) - 7)  # 8 bits of mantissa, the first implied
    assert (np.abs(rounded - values) < step).all()
    assert (np.abs(rounded.mean(axis=0) - values) <= 5 * step / 2 / np.sqrt(DRAWS)).all()
    assert (rounded.min(axis=0) < rounded.max(axis=0)).all()


def test_what_needs_no_rounding_stays():
    values = np.array([0.0, -0.0, 1.0, -2.5, 3.0e38, 2.0**-126, np.inf, -np.inf, np.nan], np.float32)
    exact = np.asarray(jnp.asarray(values).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(draws(exact), np.broadcast_to(exact.astype(np.float64), (DRAWS, len(exact))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_updates_are_not_lost(dtype):
    """Each is 1/40 of a parameter's last bit; rounded to nearest, bfloat16 would not move at all."""
    size, steps = 4096, 20
    options = Optimizer(weight_decay=0.0, beta1=0.0, beta2=0.0)
    params = jnp.ones(size, dtype)
    rate = 2.0**-8 / 40  # below 1 a bfloat16's last bit is 2**-8; AdamW's direction is 1 here

    @jax.jit
    def update(params, moments, step):
        return adamw.update(
            params, moments, jnp.ones(size, jnp.float32), False, step, jnp.float32(rate), options, key=jax.random.key(1)
        )

    moments = adamw.init(params)
    assert moments.first.dtype == jnp.float32
    for step in range(steps):
        params, moments = update(params, moments, jnp.int32(step))
        assert params.dtype == dtype
    moved = 1 - np.asarray(params, np.float64)
    expected = steps * rate
    # A bfloat16 has moved by a whole number of bits, of a deviation of up to √(steps/40): the mean is far nearer.
    assert abs(moved.mean() - expected) <= 5 * 2.0**-8 * np.sqrt(steps / 40) / np.sqrt(size) + 1e-6


def test_the_same_key_and_step_round_the_same_and_others_differ():
    x = jnp.linspace(1, 2, 1000)
    again, same, other = (rounding.stochastic(x, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(again, same)
    assert (np.asarray(again) != np.asarray(other)).any()
