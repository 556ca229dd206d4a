"""Parameters kept in bfloat16, rounded at random, whose masters nobody has: at every ZeRO stage.

Stage 0 rounds each tensor with one stream of random bits, the same on all devices; from stage 1 on each device rounds
its own pieces with its own. So the stages' bits differ, and these must hold instead: what is rounded is the number that
float32 parameters would have become, up or down by chance and right on average; no two pieces are rounded alike; and of
what is not divided, all devices have the same bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxgpt.data.loader import Batch
from jaxgpt.models import blocks
from jaxgpt.optimizers import rounding
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel, Training
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import layout_of

DEVICES, STEPS = 4, 20
MODEL = Model(layers=1, heads=3, width=45, context=6, vocabulary_size=131)  # no size is divisible by 4
STAGES = [0, 1, 2, 3]


def config(parameters: str, devices: int, zero: int) -> Config:
    return Config(
        model=MODEL,
        compute=Compute(parameters=parameters, classifier_chunk=64, recompute="none"),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(steps=STEPS, micro_batches=2, batch_size=8, sequence_length=6),
        # Of a large epsilon: noise of gradients that are 0 but for rounding stays noise, and is not made an update.
        optimizer=Optimizer(learning_rate=0.003, schedule="constant", epsilon=1e-3),
    )


def batch(seed: int) -> Batch:
    return Batch(*np.random.default_rng(seed).integers(131, size=(2, 2, 8, 6), dtype=np.int32))


@functools.cache
def trained(parameters: str, devices: int, zero: int, steps: int = 1, key: int = 0):
    """The losses and the whole parameters after some steps from the same bfloat16 numbers, and the last state."""
    made = config(parameters, devices, zero)
    placement, train_step = Resharding(made), step_of(parameters, devices, zero)
    state = placement.first_state()
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(array.dtype), state.params)
    state = state._replace(params=rounded, key=jax.random.key(key))
    losses = []
    for seed in range(steps):
        state, metrics = train_step(state, None, batch(seed))
        losses.append(float(metrics.loss))
    whole = blocks.stacked(placement.to_save(state).params)
    return losses, [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(whole)], state


@functools.cache
def step_of(parameters: str, devices: int, zero: int):
    return step.make_train_step(config(parameters, devices, zero))


def ulp(exact: np.ndarray) -> np.ndarray:
    """Returns the distance between a number's two bfloat16 neighbours."""
    return np.ldexp(np.float32(1), np.frexp(exact)[1] - 8)


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
def test_each_update_is_a_neighbour_of_the_exact_one_and_right_on_average(zero):
    """The exact one is a float32 of one device, whose sums in another order move it by a tenth of the last bit at most.

    That is where it is at least 1e-4, as all are that don't stand for 0.
    """
    _, exact, _ = trained("float32", 1, 0)
    errors, chances = [], []
    for key in range(4):
        _, rounded, _ = trained("bfloat16", DEVICES, zero, key=key)
        for a, b in zip(rounded, exact, strict=True):
            a, b = a[np.abs(b) > 1e-4], b[np.abs(b) > 1e-4]
            error = (a - b) / ulp(b)
            assert np.abs(error).max(initial=0) < 1.1
            up = np.abs(b / ulp(b)) % 1  # the chance to be rounded up in magnitude
            errors.append(error)
            chances.append(up)
    errors, chances = np.concatenate(errors), np.concatenate(chances)
    assert errors.size > 50_000
    assert abs(np.mean(errors)) < 5 * np.sqrt(np.mean(chances * (1 - chances)) / errors.size)
    assert np.mean(errors**2) == pytest.approx(np.mean(chances * (1 - chances)), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
def test_twenty_steps_train_as_float32_parameters_do(zero):
    """Every step's rounding moves the losses by less than a thousandth, as one stage does as another."""
    exact, _, _ = trained("float32", 1, 0, STEPS)
    losses, _, _ = trained("bfloat16", DEVICES, zero, STEPS)
    np.testing.assert_allclose(losses, exact, rtol=2e-3)
    assert losses[-1] != exact[-1]


@pytest.mark.slow
def test_devices_that_have_the_same_round_the_same():
    _, _, state = trained("bfloat16", DEVICES, 0, STEPS)
    for leaf in jax.tree.leaves(state.params):
        assert leaf.dtype == jnp.bfloat16
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf.addressable_data(0))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_stages_that_divide_round_the_same(zero):
    """They have the same pieces and keys; gradients are summed in another order, which turns one in hundreds."""
    _, rounded, _ = trained("bfloat16", DEVICES, 3)
    _, other, _ = trained("bfloat16", DEVICES, zero)
    same = [a == b for a, b in zip(rounded, other, strict=True)]
    assert np.mean(np.concatenate([part.ravel() for part in same])) > 0.99


def test_no_two_pieces_are_rounded_alike():
    layout = layout_of(config("bfloat16", DEVICES, 1))

    def rounded(key):
        return rounding.stochastic(jnp.full((1, 400), 1 + 2.0**-8, jnp.float32), layout.own_key(key))

    pieces = layout.jit(rounded, in_specs=PartitionSpec(), out_specs=PartitionSpec(AXIS))(jax.random.key(1))
    up = np.asarray(pieces, np.float32) > 1 + 2.0**-8
    assert up.shape == (DEVICES, 400)
    agreement = np.asarray(np.corrcoef(up))[~np.eye(DEVICES, dtype=bool)]
    assert np.abs(agreement).max() < 5 / 20
