import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.optimizers import adamw
from jaxgpt.options.config import Optimizer

DECAYS = {"matrix": True, "vector": [False]}


def tree(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {"matrix": rng.normal(size=(3, 4)).astype(dtype), "vector": [rng.normal(size=5).astype(dtype)]}


@functools.partial(jax.jit, static_argnums=5)
def update(params, moments, grads, step, learning_rate, options, advance=True):
    return adamw.update(params, moments, grads, DECAYS, step, learning_rate, options, advance=advance)


def assert_close(actual, expected, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), actual, expected)


def follow_optax(dtype, tolerance):
    """Six steps beside `optax.adamw` with the same learning rates, checking parameters and moments after each."""
    options = Optimizer(beta1=0.8, beta2=0.97, epsilon=1e-6, weight_decay=0.2)
    rates = np.array([0.1, 0.2, 0.05, 0.1, 0.0, 0.1], dtype)
    oracle = optax.adamw(
        lambda step: jnp.asarray(rates)[step], b1=0.8, b2=0.97, eps=1e-6, weight_decay=0.2, mask=DECAYS
    )

    @jax.jit
    def oracle_update(params, state, grads):
        updates, state = oracle.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = expected = jax.tree.map(jnp.asarray, tree(0, dtype))
    moments, oracle_state = adamw.init(params), oracle.init(params)
    for step, rate in enumerate(rates):
        grads = jax.tree.map(jnp.asarray, tree(step + 1, dtype))
        params, moments = update(params, moments, grads, jnp.int32(step), jnp.asarray(rate), options)
        expected, oracle_state = oracle_update(expected, oracle_state, grads)
        assert_close(params, expected, tolerance)
        assert_close(moments, adamw.Moments(oracle_state[0].mu, oracle_state[0].nu), tolerance)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, moments))} == {jnp.dtype(dtype)}


def test_equals_optax_in_float32():
    follow_optax("float32", 2e-6)


def test_equals_optax_in_float64(x64):
    follow_optax("float64", 1e-13)


def test_first_step_is_as_long_as_the_learning_rate():
    """Corrected for their start at 0, the moments of one gradient are it and its square: each number moves by ±η."""
    params, grads = tree(0), tree(1)
    options = Optimizer(weight_decay=0.0, epsilon=1e-12)
    new, _ = update(params, adamw.init(params), grads, jnp.int32(0), jnp.float32(0.125), options)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, new, params)
    assert_close(moved, jax.tree.map(lambda grad: -0.125 * np.sign(grad), grads), 1e-5)


def test_only_what_is_marked_decays():
    """A zero gradient leaves the decay alone: θ (1 - ηλ), and θ where a parameter is not marked."""
    params = tree(0)
    grads = jax.tree.map(np.zeros_like, params)
    options = Optimizer(weight_decay=0.5)
    new, _ = update(params, adamw.init(params), grads, jnp.int32(3), jnp.float32(0.1), options)
    np.testing.assert_allclose(new["matrix"], 0.95 * params["matrix"], rtol=1e-6)
    np.testing.assert_array_equal(new["vector"][0], params["vector"][0])


@pytest.mark.parametrize("gradient", [np.nan, np.inf, 1.0])
def test_without_advance_nothing_changes(gradient):
    """The gradient may even be NaN: parameters and moments keep their values."""
    params = tree(0)
    moments = adamw.Moments(tree(1), jax.tree.map(np.abs, tree(2)))
    grads = jax.tree.map(lambda grad: grad + np.float32(gradient), tree(3))
    state = update(params, moments, grads, jnp.int32(3), jnp.float32(0.1), Optimizer(), advance=False)
    jax.tree.map(np.testing.assert_array_equal, state, (params, moments))
