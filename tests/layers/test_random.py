"""The random numbers are those of jax.random, whichever way they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers import random

SHAPES = [(), (1,), (7,), (3, 5, 129)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_bits_are_those_of_jax_random(shape, dtype):
    key = jax.random.key(11)
    ours = random.bits(key, shape, dtype)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, jax.random.bits(key, shape, dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_normal_numbers_are_those_of_jax_random(shape, dtype, seed):
    key = jax.random.fold_in(jax.random.key(seed), 3)
    ours = jax.jit(random.normal, static_argnums=(1, 2))(key, shape, dtype)
    theirs = jax.jit(jax.random.normal, static_argnums=(1, 2))(key, shape, dtype)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("change", [{"jax_threefry_partitionable": False}, {"jax_default_prng_impl": "rbg"}])
def test_with_another_generator_too(change):
    before = {name: getattr(jax.config, name) for name in change}
    try:
        for name, value in change.items():
            jax.config.update(name, value)
        key = jax.random.key(5)
        np.testing.assert_array_equal(random.bits(key, (6, 3)), jax.random.bits(key, (6, 3)))
        np.testing.assert_array_equal(random.normal(key, (6, 3)), jax.random.normal(key, (6, 3)))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_more_numbers_than_a_word_counts_are_made_by_jax_random():
    """The shapes alone are computed: 16 GiB would be drawn."""
    shape = (3, 2**31)
    program = jax.make_jaxpr(lambda: random.bits(jax.random.key(0), shape))()
    assert "random_bits" in str(program)
    assert "random_bits" not in str(jax.make_jaxpr(lambda: random.bits(jax.random.key(0), (2, 2**31 - 1)))())


def test_drawing_keeps_nothing_beside_its_result():
    """jax.random needs twice the result's memory on a CPU, which the first train state would have to have free."""
    size = 2**20
    compiled = jax.jit(lambda key: random.normal(key, (size,))).lower(jax.random.key(0)).compile()
    found = compiled.memory_analysis()
    assert found is not None
    assert found.temp_size_in_bytes < size  # a quarter of the result's bytes
