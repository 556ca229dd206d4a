"""The train step under each objective: on several devices, and that it learns what the objective asks for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models import blocks, logits
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import advantages, policy, preference, reward
from jaxgpt.options.config import Compute, Config, Model, Objective, Optimizer, Parallel, Training
from jaxgpt.training import memory_plan, step
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import init_state, initial_state
from tests.nightly import nightly

MODEL = Model(layers=1, heads=2, width=16, context=6, vocabulary_size=11)
MICRO_BATCHES, ROWS, T = 2, 8, 6
OBJECTIVES = {
    "reward": Objective(name="reward", completions=3, centre=0.01),
    "preference": Objective(name="preference", beta=0.3),
    "policy": Objective(name="policy", kl_coefficient=0.1, entropy_coefficient=0.01),
    "policy with values": Objective(name="policy", value_coefficient=0.5),
}


def config(objective, devices=1, zero=0, steps=3, reproducible=False):
    return Config(
        model=MODEL,
        compute=Compute(classifier_chunk=8, layers="unrolled", recompute="none", attention="blocks"),
        parallel=Parallel(devices=devices, zero=zero, reproducible=reproducible),
        training=Training(steps=steps, micro_batches=MICRO_BATCHES, batch_size=ROWS, sequence_length=T),
        optimizer=Optimizer(learning_rate=0.01, schedule="constant", weight_decay=0.0),
        objective=objective,
    )


def batch(objective: Objective, seed: int):
    rng = np.random.default_rng(seed)
    integers = functools.partial(rng.integers, dtype=np.int32)
    rows, V = (MICRO_BATCHES, ROWS), MODEL.vocabulary_size
    match objective.name:
        case "reward":
            texts = (*rows, objective.completions)
            return reward.Batch(integers(V, size=(*texts, T)), integers(T, size=texts), integers(-1, 3, size=texts))
        case "preference":
            tokens, targets = integers(V, size=(2, *rows, 2, T))
            targets[..., : T // 2] = IGNORED
            return preference.Batch(tokens, targets, rng.normal(size=(*rows, 2)).astype(np.float32) - 7)
    tokens, targets = integers(V, size=(2, *rows, T))
    numbers = rng.normal(size=(6, *rows, T)).astype(np.float32)
    numbers[0], numbers[2:4] = 1, numbers[2:4] - 2.4
    return policy.Batch(tokens, targets, *numbers)


@functools.cache
def run(name, devices=1, zero=0, reproducible=False):
    """The losses and gradient norms of three steps, and the parameters after them."""
    made = config(OBJECTIVES[name], devices, zero, reproducible=reproducible)
    placement = Resharding(made)
    state = initial_state(made)
    compiled = step.make_train_step(made).lower(
        jax.eval_shape(lambda: init_state(made)), None, batch(made.objective, 0)
    )
    compiled = compiled.compile()
    seen = []
    for seed in range(3):
        state, metrics = compiled(state, None, batch(made.objective, seed))
        assert metrics.taken
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(seen), jax.tree.map(np.asarray, blocks.stacked(placement.to_save(state).params))


@pytest.mark.parametrize("name", nightly(OBJECTIVES, every_time=list(OBJECTIVES)[-1:]))
@pytest.mark.parametrize(("devices", "zero"), [pytest.param(4, 1, marks=pytest.mark.slow), (4, 3)])
def test_several_devices_do_what_one_does(name, devices, zero):
    """Sums in another order differ by some float32 eps, which Adam makes larger where gradients are small."""
    seen, params = run(name, devices, zero)
    one_seen, one_params = run(name)
    np.testing.assert_allclose(seen, one_seen, rtol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (params, one_params)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b) + 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_shapes_are_those_of_a_batch(name):
    made = config(OBJECTIVES[name])
    _, _, shapes = step.shapes(made)
    found = batch(made.objective, 0)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), found
    )
    assert memory_plan.measure(made).activations  # from these shapes


@pytest.mark.slow
def test_reproducible_sums_too(all_optimizations):
    """One device and two have the same bits, compiled as users have it."""
    (seen, params), (other_seen, other_params) = (run("preference", devices, 0, True) for devices in (1, 2))
    assert seen.tolist() == other_seen.tolist()
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


def trained(made, batches, params=None):
    """The state after these steps, and the metrics of each."""
    train_step, state = step.make_train_step(made), initial_state(made, params)
    seen = []
    for one in batches:
        state, metrics = train_step(state, None, one)
        seen.append({"loss": float(metrics.loss)} | {key: float(value) for key, value in metrics.family.items()})
    return state, seen


def rankings(seed):
    """Texts, the better the more often the token 3 is in them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 6, size=(MICRO_BATCHES, ROWS, 3, T), dtype=np.int32)
    scores = (tokens == 3).sum(-1)
    ranks = (scores[..., :, None] < scores[..., None, :]).sum(-1).astype(np.int32)  # alike texts have the same rank
    return reward.Batch(tokens, np.full(ranks.shape, T - 1, np.int32), ranks)


def test_a_reward_model_learns_a_known_preference():
    """Its accuracy on comparisons that it hasn't seen goes from chance to over 90%."""
    made = config(Objective(name="reward", completions=3), steps=120)
    _, seen = trained(made, map(rankings, range(120)))
    assert seen[0]["accuracy"] < 0.7
    assert np.mean([one["accuracy"] for one in seen[-10:]]) > 0.9  # each batch is new


def test_dpo_raises_the_margin_of_what_was_chosen():
    rng = np.random.default_rng(0)
    shape = (MICRO_BATCHES, ROWS, 2, T)
    tokens = rng.integers(11, size=shape, dtype=np.int32)
    targets = np.where(np.arange(T) < 2, IGNORED, rng.integers(11, size=shape)).astype(np.int32)
    made = config(Objective(name="preference", beta=0.5), steps=40)
    reference = np.full(shape[:3], -4 * np.log(11), np.float32)  # near what the random weights say
    _, seen = trained(made, [preference.Batch(tokens, targets, reference)] * 40)
    assert seen[0]["margin"] == pytest.approx(0, abs=0.1)
    assert seen[0]["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert seen[-1]["margin"] > 1
    assert seen[-1]["accuracy"] == 1


def test_reinforcement_makes_rewarded_tokens_likelier():
    """A bandit: tokens are drawn from the policy itself, the token 3 is rewarded, and groups are compared."""
    made = config(Objective(name="policy"), steps=40)
    rng = np.random.default_rng(0)
    train_step, state = step.make_train_step(made), initial_state(made)
    shares = []

    @jax.jit
    def probabilities(params):
        return jax.nn.softmax(logits(params, jnp.zeros((1, 1), jnp.int32), Context(MODEL, made.compute))[0, 0])

    for _ in range(40):
        p = np.asarray(probabilities(state.params), np.float64)
        drawn = rng.choice(11, size=(MICRO_BATCHES, ROWS), p=p / p.sum()).astype(np.int32)
        A = advantages.of_groups((drawn == 3).astype(np.float64), divide=True).astype(np.float32)
        first = np.arange(T) == 0
        targets = np.where(first, drawn[..., None], IGNORED).astype(np.int32)
        old = np.where(first, np.log(p[drawn])[..., None], 0).astype(np.float32)
        weights, zeros = np.broadcast_to(first, old.shape).astype(np.float32), np.zeros_like(old)
        numbers = weights, A[..., None] * weights, old, old, zeros, zeros
        state, metrics = train_step(state, None, policy.Batch(np.zeros_like(targets), targets, *numbers))
        assert metrics.family["ratio"] == pytest.approx(1, abs=1e-5)  # drawn by the weights that are trained
        shares.append(p[3])
    assert shares[0] < 0.15
    assert shares[-1] > 0.8
