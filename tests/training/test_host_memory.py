"""Moments in the host's memory: the same numbers, saved and resumed. A CPU has such memory, though it saves nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.errors import UserError
from jaxgpt.options.config import Compute, Config, Model, Parallel, Training
from jaxgpt.runs import checkpoints, saving
from jaxgpt.training import host_memory, step
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import initial_state

CONFIG = Config(
    model=Model(layers=2, heads=2, width=16, context=16, vocabulary_size=130),
    compute=Compute(classifier_chunk=32, attention_block=16, attention="blocks"),
    training=Training(batch_size=4, sequence_length=16, steps=4),
)


def with_moments(memory: str, devices: int = 1, zero: int = 0) -> Config:
    parallel = Parallel(devices=devices, zero=zero, moments=memory)  # type: ignore[arg-type]
    return dataclasses.replace(CONFIG, parallel=parallel)


def stepped(config: Config, state=None, steps: int = 2):
    tokens = np.random.default_rng(0).integers(0, 130, (1, 4, 16), dtype=np.int32)
    state = initial_state(config) if state is None else state
    train_step = step.compile_step(config)
    for _ in range(steps):
        state, _ = train_step(state, None, Batch(tokens, tokens))
    return state


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(jax.device_get(a), jax.device_get(b)) for a, b in pairs)


@pytest.mark.parametrize(("devices", "zero"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 2)])
def test_the_numbers_are_those_of_moments_on_the_device(devices, zero):
    on_device, on_host = (stepped(with_moments(memory, devices, zero)) for memory in ("device", "host"))
    assert kinds(on_host.moments) == {host_memory.KIND}
    assert kinds(on_host.params) == kinds(on_device.moments) == {"device"}
    assert same((on_host.params, on_host.moments), (on_device.params, on_device.moments))


@pytest.mark.parametrize(("devices", "zero"), [(1, 0), (2, 1)])
@pytest.mark.slow
def test_a_checkpoint_goes_on_to_the_same_bits(tmp_path, devices, zero):
    """It is saved with moments on the host, and resumed with them on either."""
    config = with_moments("host", devices, zero)
    ended, half = stepped(config, steps=4), stepped(config)
    with saving.Writer(tmp_path / "checkpoints", config.checkpoint) as writer:
        path = writer.save_and_wait(Resharding(config).to_save(half), {})
    for memory in ("host", "device"):
        resumed = with_moments(memory, devices, zero)
        resharding = Resharding(resumed)
        state = resharding.from_saved(checkpoints.load_state(path, resharding.saved_shapes()))
        assert same(stepped(resumed, state).params, ended.params)


def test_a_device_without_such_memory_is_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "has", lambda device: False)
    with pytest.raises(UserError, match=r"--parallel\.moments host: programs of the cpu don't reach"):
        host_memory.check(with_moments("host"))
