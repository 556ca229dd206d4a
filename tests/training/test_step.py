import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.data.loader import IGNORED, Batch
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Training
from jaxgpt.training import step
from jaxgpt.training.state import init_state, layout_of
from tests import whole

MODEL = Model(layers=2, heads=2, width=8, context=6, vocabulary_size=11)
CONFIG = Config(
    model=MODEL,
    compute=Compute(classifier_chunk=8, layers="scanned"),
    training=Training(steps=20, stop_after_nonfinite=2),
    optimizer=Optimizer(learning_rate=0.02, warmup_steps=2, weight_decay=0.1, clip_norm=0.2),
)


@functools.cache
def train_step():
    return step.make_train_step(CONFIG)


@functools.cache
def _init_state(config):
    """Returns the initial state as NumPy arrays, which no step can donate; of the random key it has the data."""
    state = jax.jit(lambda: init_state(config))()
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def new_state(config=CONFIG):
    state = _init_state(config)
    return state._replace(key=jax.random.wrap_key_data(state.key))


def batch(micro_batches=2, sequences=2, seed=0):
    shape = (2, micro_batches, sequences, 6)
    return Batch(*np.random.default_rng(seed).integers(MODEL.vocabulary_size, size=shape, dtype=np.int32))


def assert_close(actual, expected, tolerance):
    """Each tensor's difference measured against the tensor."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= tolerance * np.linalg.norm(b)


@functools.partial(jax.jit, static_argnums=2)
def loss_and_grads(params, batch, compute=CONFIG.compute):
    config = dataclasses.replace(CONFIG, compute=compute)
    loss, _, grads = step.batch_loss_and_grads(params, None, batch, config, layout_of(CONFIG))
    return loss, grads


def test_a_state_that_is_made_without_jit_can_be_given_away():
    """No two of its arrays may share memory: the step would be given it twice."""
    state = init_state(CONFIG)
    state, _ = train_step()(state, None, batch())
    assert int(state.step) == 1


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """The micro-batches may have unequal numbers of targets, and one of them none."""
    whole = batch(1, 8)
    whole.targets[0, :2] = IGNORED  # all of the first piece's
    whole.targets[0, 2, 1:4] = whole.targets[0, 7, 0] = IGNORED
    cut = Batch(*(array.reshape(4, 2, 6) for array in whole[:2]))
    params = new_state().params
    loss, grads = loss_and_grads(params, whole)
    cut_loss, cut_grads = loss_and_grads(params, cut)
    assert cut_loss == pytest.approx(float(loss), rel=1e-6)
    assert_close(cut_grads, grads, 1e-5)
    assert {grad.dtype for grad in jax.tree.leaves(cut_grads)} == {jnp.dtype("float32")}


def test_steps_equal_optax_on_the_gradient_of_jax():
    """Three steps, through warm-up, clipping and decay, on two micro-batches. Only the loss is the package's own."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.2),
        optax.adamw(
            lambda count: jnp.array([0.01, 0.02, 0.02])[count],  # warm-up over two steps; the cosine starts at its peak
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: path[-1].name in ("weight", "token", "position"), params
            ),
        ),
    )

    @jax.jit
    def oracle_step(params, state, batch):
        def loss(params):
            tokens, targets = (array.reshape(-1, 6) for array in batch[:2])
            return whole.loss(params, tokens, targets, MODEL, CONFIG.compute)

        loss, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    state = new_state()
    params = jax.tree.map(jnp.asarray, state.params)
    oracle_state = optimizer.init(params)
    for seed in range(3):
        state, metrics = train_step()(state, None, batch(seed=seed))
        params, oracle_state, loss, norm = oracle_step(params, oracle_state, batch(seed=seed))
        assert metrics.loss == pytest.approx(float(loss), rel=1e-5)
        assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert metrics.grad_norm > 0.2  # or clipping isn't tried
        assert metrics.nonfinite == 0
        difference = np.concatenate(
            [np.ravel(a - b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)]
        )
        # Adam's direction is g/√v: a gradient near 0 may have any sign, and the step may go that far either way.
        assert np.quantile(np.abs(difference), 0.99) < 1e-5
        assert np.abs(difference).max() < 0.05
    assert state.step == 3


def test_learning_rate_in_the_metrics_follows_the_schedule():
    state, seen = new_state(), []
    for seed in range(4):
        state, metrics = train_step()(state, None, batch(seed=seed))
        seen.append(float(metrics.learning_rate))
    assert seen[:3] == pytest.approx([0.01, 0.02, 0.02])
    assert seen[3] < seen[2]


def test_the_state_is_donated():
    """Parameters and moments exist once: the old ones' memory is the new ones'."""
    state = jax.tree.map(jnp.asarray, new_state())
    old = jax.tree.leaves((state.params, state.moments))
    new, _ = train_step()(state, None, batch())
    jax.block_until_ready(new)
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_loss_falls_on_a_batch_seen_again_and_again():
    state, losses = new_state(), []
    for _ in range(20):
        state, metrics = train_step()(state, None, batch())
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(11), abs=0.1)
    assert losses[-1] < 0.6 * losses[0]


def spoiled(state):
    """Returns the state with one parameter that is not a number."""
    weight = state.params.blocks.qkv.weight.copy()
    weight[0, 1, 2] = np.nan
    blocks = state.params.blocks._replace(qkv=state.params.blocks.qkv._replace(weight=weight))
    return state._replace(params=state.params._replace(blocks=blocks))


def assert_kept(state, expected):
    """Parameters and moments are the same bits; NaN is equal to NaN here."""
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.moments), (expected.params, expected.moments))


def test_a_step_that_is_not_finite_changes_nothing():
    """The second in a row is one too many: from there on not even the count of steps moves."""
    state = before = spoiled(new_state())
    seen = []
    for seed in range(4):
        state, metrics = train_step()(state, None, batch(seed=seed))
        assert_kept(state, before)
        assert not np.isfinite(metrics.loss)
        assert metrics.nonfinite == state.nonfinite
        seen.append((int(state.step), int(state.nonfinite)))
    assert seen == [(1, 1), (1, 2), (1, 2), (1, 2)]
    assert int(state.skipped) == 1  # those that stop the run are not passed over
    assert int(state.losses.count) == 0  # NaN never gets into the spike detector


def test_a_finite_step_starts_the_count_again():
    before = new_state()._replace(nonfinite=np.int32(1))
    state, metrics = train_step()(before, None, batch())
    assert state.step == 1
    assert state.nonfinite == metrics.nonfinite == 0
    assert (np.asarray(state.params.embedding.token) != before.params.embedding.token).any()


def test_a_stopped_state_takes_no_finite_step_either():
    """Steps that were dispatched before the loop read of the stop must leave the last good state alone."""
    before = new_state()._replace(nonfinite=np.int32(2), step=np.int32(5))
    state, metrics = train_step()(before, None, batch())
    assert_kept(state, before)
    assert np.isfinite(metrics.loss)
    assert (int(state.step), int(state.nonfinite)) == (5, 2)


def test_a_spike_is_skipped_and_remembered():
    """A loss far above those of the window, with a threshold for it: a step that counts and changes no parameter."""
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, loss_spike_z=7.0))
    flat = np.float32(0.5) + np.float32(0.001) * np.arange(step.spikes.SPIKE_WINDOW, dtype=np.float32)
    losses = step.spikes.Window(flat, np.int32(len(flat)))
    before = new_state()._replace(losses=losses)
    state, metrics = step.make_train_step(config)(before, None, batch())
    assert metrics.loss_z > 7.0  # ln 11, which is 2.4, among 0.5 to 0.6
    assert not metrics.taken
    assert_kept(state, before)
    assert (int(state.step), int(state.skipped), int(state.nonfinite)) == (1, 1, 0)
    assert state.losses.values[0] == metrics.loss
    assert state.norms.values[0] == metrics.grad_norm

    state, metrics = train_step()(
        new_state()._replace(losses=losses), None, batch()
    )  # without a threshold the same step is taken
    assert metrics.loss_z > 7.0
    assert metrics.taken
    assert int(state.skipped) == 0


def test_a_gradient_norm_that_is_a_spike_is_skipped_too():
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, grad_norm_spike_z=7.0))
    norms = step.spikes.Window(np.float32(1e-3) * np.arange(step.spikes.SPIKE_WINDOW, dtype=np.float32), np.int32(500))
    before = new_state()._replace(norms=norms)
    state, metrics = step.make_train_step(config)(before, None, batch())
    assert metrics.grad_norm_z > 7.0
    assert_kept(state, before)
    assert int(state.skipped) == 1


def test_without_targets_only_the_decay_is_left():
    """A batch whose targets are all ignored: loss and gradient 0, finite, and no parameter but the matrices moves."""
    nothing = batch()
    nothing.targets[:] = IGNORED
    before = new_state()
    before = before._replace(params=jax.tree.map(lambda leaf: leaf + np.float32(1), before.params))
    state, metrics = train_step()(before, None, nothing)
    assert metrics.loss == metrics.grad_norm == metrics.nonfinite == 0
    for (path, new), old in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(before.params), strict=True):
        decayed = path[-1].name in ("weight", "token", "position")
        np.testing.assert_allclose(new, old * (1 - 0.01 * 0.1 * decayed), rtol=1e-6)


def test_bfloat16_is_close_to_float32():
    """Loss and gradients in float32 of activations in bfloat16, whose eps is 0.8%; the masters stay in float32."""
    compute = dataclasses.replace(CONFIG.compute, dtype="bfloat16")
    params = new_state().params
    loss, grads = loss_and_grads(params, batch(1, 8))
    rounded_loss, rounded_grads = loss_and_grads(params, batch(1, 8), compute)
    assert rounded_loss == pytest.approx(float(loss), rel=1e-3)
    assert_close(rounded_grads, jax.tree.map(np.asarray, grads), 0.02)
    assert {grad.dtype for grad in jax.tree.leaves(rounded_grads)} == {jnp.dtype("float32")}

    rounded_step = step.make_train_step(dataclasses.replace(CONFIG, compute=compute))
    state, _ = jax.eval_shape(rounded_step, new_state(), None, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.moments))} == {jnp.dtype("float32")}


def test_the_first_state_is_a_function_of_the_seed():
    other = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, seed=1))
    state, different = _init_state(CONFIG), _init_state(other)
    assert (state.params.embedding.token != different.params.embedding.token)[:11].all()
    assert (state.key != different.key).any()
    assert_kept(state, jax.jit(lambda: init_state(CONFIG))())
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.moments))
    assert state.step == state.nonfinite == state.skipped == 0


def test_bfloat16_parameters_train_and_repeat_bit_for_bit():
    config = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, parameters="bfloat16"))
    train = step.make_train_step(config)

    def run():
        state, losses = jax.jit(lambda: init_state(config))(), []
        for _ in range(12):
            state, metrics = train(state, None, batch())
            losses.append(float(metrics.loss))
        return state, losses

    (state, losses), (again, repeated) = run(), run()
    assert losses == repeated
    assert_kept(state, again)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.moments)} == {"float32"}
    assert losses[-1] < 0.8 * losses[0]


FOR_A_GPU = {
    "xla_gpu_deterministic_ops": True,
    "xla_allow_excess_precision": False,
    "xla_gpu_all_reduce_combine_threshold_bytes": 1 << 25,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 25,
}


@pytest.mark.parametrize(("platform", "expected"), [("gpu", FOR_A_GPU), ("cpu", None)])
def test_a_gpu_is_asked_for_a_fixed_order_of_sums_and_for_no_more_bits(monkeypatch, platform, expected):
    given = {}
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "jit", lambda function, **options: given.update(options) or function)
    step.make_train_step(dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, deterministic=True)))
    assert given["compiler_options"] == expected
