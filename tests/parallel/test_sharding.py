"""The step on simulated devices: the same numbers at every stage, what is sent, and what each device has."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxgpt.data.loader import IGNORED, Batch
from jaxgpt.models import blocks, gpt2
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel, Training
from jaxgpt.parallel import traffic
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import init_state
from tests.parallel.collectives import collectives

MODEL = Model(layers=2, heads=3, width=15, context=5, vocabulary_size=11)  # of which no size is divisible by 2, 4 or 8
MICRO_BATCHES, SEQUENCES, STEPS = 3, 8, 20
SHAPES = jax.eval_shape(lambda: blocks.unstacked(gpt2.init(MODEL, jax.random.key(0))))
STAGES = [
    pytest.param(devices, zero, marks=() if devices == 8 and zero == 3 else pytest.mark.slow)
    for devices in (2, 4, 8)
    for zero in (0, 1, 2, 3)
]


def config(devices: int, zero: int, **changes) -> Config:
    return Config(
        model=MODEL,
        compute=Compute(classifier_chunk=8, layers=changes.pop("layers", "unrolled"), recompute="none"),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(steps=STEPS, micro_batches=MICRO_BATCHES, batch_size=SEQUENCES, sequence_length=5),
        optimizer=Optimizer(learning_rate=0.01, warmup_steps=5, clip_norm=0.5),
    )


def batch(seed: int) -> Batch:
    """Returns a batch with unevenly ignored targets, so that devices have different numbers of them."""
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(11, size=(2, MICRO_BATCHES, SEQUENCES, 5), dtype=np.int32)
    targets[:, : random.integers(SEQUENCES), 1:] = IGNORED
    return Batch(tokens, targets)


@functools.cache
def first_state():
    """Returns the initial state on the host, as it is saved; of the random key it has the data."""
    state = Resharding(config(1, 0, layers="scanned")).first_state()
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


@functools.cache
def program(devices: int, zero: int, layers: str = "unrolled"):
    """The compiled step, and what places its state."""
    made = config(devices, zero, layers=layers)
    placement = Resharding(made)
    train_step = step.make_train_step(made)
    return train_step.lower(jax.eval_shape(lambda: init_state(made)), None, batch(0)).compile(), placement


@functools.cache
def run(devices: int, zero: int, layers: str = "unrolled"):
    """The losses, gradient norms and parameters of all steps, and the last state."""
    compiled, placement = program(devices, zero, layers)
    state = first_state()._replace(key=jax.random.wrap_key_data(first_state().key))
    shapes = placement.saved_shapes()
    state = placement.from_saved(state if devices > 1 else jax.tree.map(jax.numpy.asarray, arranged(state, shapes)))
    seen = []
    for seed in range(STEPS):
        state, metrics = compiled(state, None, batch(seed))
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
        assert metrics.taken
    return np.array(seen), jax.tree.map(np.asarray, blocks.stacked(placement.to_save(state).params)), state


def arranged(state, shapes):
    if blocks.are_stacked(shapes.params.blocks):
        return state
    moments = state.moments._replace(**{name: blocks.unstacked(tree) for name, tree in state.moments._asdict().items()})
    return state._replace(params=blocks.unstacked(state.params), moments=moments)


@pytest.mark.parametrize(("devices", "zero"), STAGES)
def test_losses_and_parameters_are_those_of_one_device(devices, zero):
    """20 steps. Sums in another order differ by some float32 eps; what they become in Adam is 1e-3 of all movement."""
    one_seen, one_params, _ = run(1, 0)
    seen, params, _ = run(devices, zero)
    np.testing.assert_allclose(seen, one_seen, rtol=1e-4)
    start = first_state().params
    for a, b, c in zip(*map(jax.tree.leaves, (params, one_params, start)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b - c)


@pytest.mark.slow
def test_stacked_layers_too():
    one_seen, one_params, _ = run(1, 0)
    seen, params, _ = run(4, 3, "scanned")
    np.testing.assert_allclose(seen, one_seen, rtol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (params, one_params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# What crosses the network


def padded(shapes, devices: int) -> int:
    """Numbers in all tensors, each filled up to a multiple of the number of devices."""
    return sum(-(-math.prod(leaf.shape) // devices) * devices for leaf in jax.tree.leaves(shapes))


def sent(devices: int, zero: int, layers: str = "unrolled") -> dict[str, int]:
    """Bytes of each kind in one step."""
    total: dict[str, int] = {}
    for kind, size, times in collectives(program(devices, zero, layers)[0].as_text()):
        if size:
            total[kind] = total.get(kind, 0) + size * times
    return total


def expected(devices: int, zero: int) -> dict[str, int]:
    """Returns the formula's bytes; no output is recomputed here, so that no backward needs a bias."""
    return traffic.traffic(SHAPES, devices=devices, zero=zero, micro_batches=MICRO_BATCHES, weight_bytes=4)


def test_one_device_sends_nothing():
    assert collectives(program(1, 0)[0].as_text()) == []


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_bytes_that_cross_the_network_in_a_step(devices, zero):
    assert sent(devices, zero) == expected(devices, zero)


def test_bytes_with_stacked_layers():
    assert sent(4, 3, "scanned") == expected(4, 3)


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_cross_the_network_once_in_a_step(zero):
    """No loop, such as that over the micro-batches, has a collective in it."""
    found = collectives(program(8, zero)[0].as_text())
    assert {one.times for one in found} == {1}


# What each device has


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_state_of_one_device(zero):
    """Masters and two moments: all of them in stage 0, and an eighth from stage 1 on."""
    _, _, state = run(8, zero)
    numbers = padded(SHAPES, 8) // 8 if zero else padded(SHAPES, 1)
    leaves = jax.tree.leaves((state.params, state.moments))
    for device in range(8):
        assert sum(leaf.addressable_shards[device].data.nbytes for leaf in leaves) == 3 * 4 * numbers


@pytest.fixture(scope="module")
def memory():
    """A device's argument and temporary bytes by stage, of a model that is nearly all blocks."""
    model = Model(layers=6, heads=1, width=64, context=2, vocabulary_size=100)
    compute = Compute(layers="unrolled")
    training = Training(steps=1, micro_batches=2, batch_size=4, sequence_length=2)
    tokens = jax.ShapeDtypeStruct((2, 4, 2), np.int32)
    found = []
    for zero in range(4):
        made = Config(model=model, compute=compute, parallel=Parallel(devices=4, zero=zero), training=training)
        state = jax.eval_shape(lambda made=made: init_state(made))
        found.append(step.make_train_step(made).lower(state, None, Batch(tokens, tokens)).compile().memory_analysis())
    shapes = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
    arguments, temporaries = ([getattr(one, f"{kind}_size_in_bytes") for one in found] for kind in ("argument", "temp"))
    return arguments, temporaries, 4 * padded(shapes, 1), 4 * padded(shapes.blocks, 1) / model.layers


@pytest.mark.slow
def test_memory_falls_as_the_arithmetic_says(memory):
    """P bytes of parameters on D = 4 devices; gradients of one of two micro-batches, and their sum."""
    arguments, temporaries, P, layer = memory
    assert 6 * layer > 0.85 * P
    assert arguments == pytest.approx([3 * P, 3 * P / 4, 3 * P / 4, 3 * P / 4], rel=0.01)
    ends = P - 6 * layer
    assert temporaries[0] < 2.1 * P
    assert temporaries[1] < 3.1 * P  # and the gathered parameters
    assert temporaries[2] < 1.1 * P + 2 * P / 4 + layer + 2 * ends
    assert temporaries[3] < 0.1 * P + 2 * P / 4 + 2 * layer + 3 * ends
    peaks = np.add(arguments, temporaries)
    assert (peaks[1:] < peaks[:-1]).all()
