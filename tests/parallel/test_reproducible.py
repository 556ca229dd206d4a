"""A reproducible run has the same bits on any number of devices."""

import jax
import numpy as np
import pytest

from jaxgpt.data.loader import IGNORED, Batch
from jaxgpt.errors import UserError
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel, Training
from jaxgpt.parallel import mesh
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding

MODEL = Model(layers=2, heads=3, width=15, context=12, vocabulary_size=101)
STEPS = 5


def config(devices: int, *, reproducible: bool = True, dtype: str = "float32", zero=0, batch_size: int = 16) -> Config:
    return Config(
        model=MODEL,
        compute=Compute(dtype=dtype, classifier_chunk=16, attention_block=8, layers="scanned"),
        parallel=Parallel(devices=devices, zero=zero, reproducible=reproducible),
        training=Training(steps=STEPS, batch_size=batch_size, micro_batches=2, sequence_length=12),
        optimizer=Optimizer(learning_rate=0.01, clip_norm=0.2),
    )


def run(config: Config):
    state, train_step = Resharding(config).first_state(), step.make_train_step(config)
    losses = []
    for seed in range(STEPS):
        batch = Batch(*np.random.default_rng(seed).integers(101, size=(2, 2, 16, 12), dtype=np.int32))
        batch.targets[:, :3, 1:] = IGNORED
        state, metrics = train_step(state, None, batch)
        losses.append(float(metrics.loss))
    return losses, jax.tree.map(np.asarray, state._replace(key=None))


@pytest.mark.slow
@pytest.mark.usefixtures("all_optimizations")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_two_four_and_eight_devices_give_the_same_bits(dtype):
    """All of the state but its random key, after steps with all optimizations of the compiler."""
    losses, state = run(config(1, dtype=dtype))
    for devices in (2, 4, 8):
        others, other = run(config(devices, dtype=dtype))
        assert others == losses
        jax.tree.map(np.testing.assert_array_equal, other, state)


@pytest.mark.slow
def test_it_is_the_same_step_but_for_rounding():
    losses, state = run(config(2))
    others, other = run(config(1, reproducible=False))
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (other.params, state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"zero": 1}, r"--parallel.zero 0 \(it is 1\)"),
        ({"batch_size": 12}, r"sequences that are divisible by 8 \(--training.batch-size is 12\)"),
        ({"devices": 3, "batch_size": 24}, r"1, 2, 4 or 8 devices \(--parallel.devices; here it would be 3\)"),
    ],
)
def test_what_it_needs(changes, needs):
    with pytest.raises(UserError, match=f"--parallel.reproducible needs {needs}"):
        mesh.check(config(**{"devices": 4} | changes))
