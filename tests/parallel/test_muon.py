"""Muon on simulated devices: the same numbers at every stage, and each matrix one device's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxgpt.data.loader import Batch
from jaxgpt.models import blocks
from jaxgpt.optimizers import newton_schulz
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel, Training
from jaxgpt.parallel import traffic
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import layout_of, state_shapes
from tests.parallel.collectives import collectives

STEPS, DEVICES = 10, 8
# Of which no size is divisible by 8: 3 layers of queries of 15 columns, keys and values of 5, an MLP of 21.
MODEL = Model(
    family="llama",
    layers=3,
    heads=3,
    kv_heads=1,
    head_width=6,
    width=15,
    feed_forward=21,
    context=5,
    vocabulary_size=11,
)
STAGES = [*(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 1, 2)), 3]


def config(
    devices: int, zero: int, *, layers: str = "unrolled", dtype: str = "float32", model: Model = MODEL
) -> Config:
    return Config(
        model=model,
        compute=Compute(classifier_chunk=8, layers=layers, recompute="none", dtype=dtype),  # type: ignore[arg-type]
        parallel=Parallel(devices=devices, zero=zero),  # type: ignore[arg-type]
        training=Training(steps=STEPS, micro_batches=2, batch_size=8, sequence_length=5),
        optimizer=Optimizer(name="muon", learning_rate=0.01, muon_learning_rate=0.02, warmup_steps=3, clip_norm=0.5),
    )


def batch(seed: int) -> Batch:
    return Batch(*np.random.default_rng(seed).integers(11, size=(2, 2, 8, 5), dtype=np.int32))


@functools.cache
def program(devices: int, zero: int, layers: str = "unrolled", dtype: str = "float32"):
    return step.compile_step(config(devices, zero, layers=layers, dtype=dtype))


@functools.cache
def run(devices: int, zero: int, layers: str = "unrolled"):
    """Losses, and the whole first and last parameters and momenta, with layers stacked."""
    placement = Resharding(config(devices, zero, layers=layers))
    state, train_step = placement.first_state(), program(devices, zero, layers)
    first, losses = whole(placement, state), []
    for seed in range(STEPS):
        state, metrics = train_step(state, None, batch(seed))
        losses.append(float(metrics.loss))
        assert metrics.taken
    return losses, first, whole(placement, state), state


def whole(placement: Resharding, state):
    saved = placement.to_save(state)
    return [jax.tree.map(np.asarray, blocks.stacked(tree)) for tree in (saved.params, saved.moments.first)]


@pytest.mark.parametrize("zero", STAGES)
def test_losses_parameters_and_momenta_are_those_of_one_device(zero):
    """Ten steps. Float32 sums in another order differ by some eps; an iteration makes up to 990 times as much of it."""
    losses, start, expected, _ = run(1, 0)
    seen, first, last, _ = run(DEVICES, zero)
    jax.tree.map(np.testing.assert_array_equal, first, start)
    np.testing.assert_allclose(seen, losses, rtol=1e-4)
    for a, b, c in zip(*map(jax.tree.leaves, (last, expected, start)), strict=True):
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b - c)


@pytest.mark.slow
def test_stacked_layers_too():
    losses, start, expected, _ = run(1, 0)
    seen, _, last, _ = run(DEVICES, 3, "scanned")
    np.testing.assert_allclose(seen, losses, rtol=1e-4)
    for a, b, c in zip(*map(jax.tree.leaves, (last, expected, start)), strict=True):
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b - c)


# Whose matrices


@pytest.mark.parametrize("tensors", [1, 8, 13])
def test_each_tensor_has_one_owner(tensors):
    """All devices' own tensors, one after another, are the tensors once each, and then zeros; the way back is exact."""
    layout, numbers = layout_of(config(DEVICES, 1)), 21
    given = np.pad(np.random.default_rng(0).normal(size=(tensors, numbers)).astype(np.float32), ((0, 0), (0, 3)))

    def there_and_back(shards):
        own = layout.to_owners(shards)
        return own, layout.to_shards(own, tensors)

    divided, rows = PartitionSpec(None, AXIS), PartitionSpec(AXIS)
    own, back = layout.jit(there_and_back, in_specs=(divided,), out_specs=(rows, divided))(jnp.asarray(given))
    np.testing.assert_array_equal(own[:tensors], given)
    assert len(own) == -(-tensors // DEVICES) * DEVICES
    assert not own[tensors:].any()
    np.testing.assert_array_equal(back, given)


@pytest.mark.parametrize(
    ("zero", "layers"),
    [(0, "unrolled"), (3, "scanned")]
    + [pytest.param(zero, layers, marks=pytest.mark.slow) for zero in (1, 2) for layers in ("unrolled", "scanned")],
)
def test_no_device_orthogonalises_what_another_does(monkeypatch, zero, layers):
    """One device's trace has all layers of each kind of tensor at stage 0, and one layer of each from stage 1 on."""
    sizes: dict[tuple[int, int], int] = {}
    original = newton_schulz.orthogonalise

    def counted(given):
        sizes[given.shape[1:]] = sizes.get(given.shape[1:], 0) + len(given)
        return original(given)

    monkeypatch.setattr(newton_schulz, "orthogonalise", counted)
    made = config(DEVICES, zero, layers=layers)
    jax.eval_shape(step.make_train_step(made), *step.shapes(made))
    of_a_layer = {(15, 18): 2, (6, 15): 2, (15, 21): 3}  # queries, output; keys, values; gate, up, and the MLP's output
    each = MODEL.layers if zero == 0 else 1  # three layers on eight devices: a layer's tensor, or zeros
    assert sizes == {size: count * each for size, count in of_a_layer.items()}


@pytest.mark.parametrize(("zero", "dtype"), [(3, "float32"), pytest.param(1, "bfloat16", marks=pytest.mark.slow)])
def test_bytes_that_cross_the_network(zero, dtype):
    """Gradients as with AdamW, and two exchanges. A CPU's program sends bfloat16 as float32, or as its bits."""
    made = config(DEVICES, zero, dtype=dtype)
    sent: dict[str, int] = {}
    for kind, size, times in collectives(program(DEVICES, zero, dtype=dtype).as_text()):
        if size:
            sent[kind] = sent.get(kind, 0) + size * times
    layout, width = layout_of(made), 4 if dtype == "float32" else 2
    options = {"devices": DEVICES, "zero": zero, "micro_batches": 2, "weight_bytes": width}
    expected = traffic.traffic(layout.shapes, **options, matrices=layout.matrices)
    without = traffic.traffic(layout.shapes, **options)
    assert expected.items() >= without.items()
    assert sent["all-to-all"] in (expected["all-to-all"], 2 * expected["all-to-all"])
    if dtype == "float32":
        assert sent == expected


@pytest.mark.slow
def test_stage_0_exchanges_nothing():
    found = {one.kind for one in collectives(program(DEVICES, 0).as_text())}
    assert found == {"all-reduce"}


# What each device has


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_state_of_one_device(zero):
    """Matrices of blocks have masters and momentum, all else a second moment too; an eighth of each when sharded."""
    *_, state = run(DEVICES, zero)
    matrices, rest = 0, 0
    for path, leaf in jax.tree.leaves_with_path(layout_of(config(DEVICES, zero)).shapes):
        size = math.prod(leaf.shape)
        each = -(-size // DEVICES) if zero else size
        if path[0].name == "blocks" and len(leaf.shape) > 1:
            matrices += each
        else:
            rest += each
    leaves = jax.tree.leaves((state.params, state.moments))
    for device in range(DEVICES):
        held = sum(leaf.addressable_shards[device].data.nbytes for leaf in leaves)
        assert held == 4 * (2 * matrices + 3 * rest)


def test_a_state_comes_back_from_its_saved_form():
    """All bits are kept, from shards to whole tensors with layers stacked, and on one device the same."""
    placement, (*_, state) = Resharding(config(DEVICES, 3)), run(DEVICES, 3)
    saved = placement.to_save(state)
    assert blocks.are_stacked(saved.params.blocks)
    again = placement.from_saved(saved)
    for a, b in zip(*(jax.tree.leaves(one._replace(key=None)) for one in (again, state)), strict=True):
        np.testing.assert_array_equal(a, b)
    one = jax.eval_shape(blocks.stacked, state_shapes(config(1, 0)).moments.second)
    assert jax.tree.structure(saved.moments.second) == jax.tree.structure(one)


@pytest.mark.slow
@pytest.mark.usefixtures("all_optimizations")
def test_reproducible_bits_on_any_number_of_devices():
    """Each device orthogonalises all of them, from the same gradients by the same program."""
    found = []
    for devices in (1, 2, 4, 8):
        made = config(devices, 0, layers="scanned")
        made = Config(
            made.model,
            made.compute,
            Parallel(devices=devices, reproducible=True),
            training=made.training,
            optimizer=made.optimizer,
        )
        state, train_step = Resharding(made).first_state(), step.make_train_step(made)
        for seed in range(3):
            state, _ = train_step(state, None, batch(seed))
        found.append(jax.tree.map(np.asarray, (state.params, state.moments)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
