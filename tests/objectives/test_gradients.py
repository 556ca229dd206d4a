"""Gradients of whole models under each objective, in ways that `run.py gradcheck` doesn't take the time for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models import family
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import policy, preference, reward
from jaxgpt.options.config import Compute, Model, Objective
from jaxgpt.proof import gradcheck, objective_cases
from tests.nightly import nightly

MODEL = Model(layers=1, heads=2, width=4, context=6, vocabulary_size=5)
COMPUTE = Compute(attention_block=2, classifier_chunk=4)
MIXTURE = dataclasses.replace(
    MODEL, family="mixtral", kv_heads=1, experts=3, router_balance=0.7, router_z=0.6, tied=True, logit_soft_cap=3.0
)
KEY = jax.random.key(0)
POLICIES = {
    "reinforce": Objective(surrogate="reinforce"),
    "ppo": Objective(entropy_coefficient=0.3, value_coefficient=0.7),
    "grpo": Objective(kl_coefficient=0.4, kl="k3"),
    "everything": objective_cases.EVERYTHING,
}


@pytest.mark.parametrize("name", nightly(POLICIES, every_time=["everything"]))
def test_policies(assert_exact, name):
    assert_exact(objective_cases.policy_case(KEY, 2, 5, MODEL, COMPUTE, POLICIES[name]))


@pytest.mark.parametrize("name", nightly(objective_cases.PREFERENCES, every_time=["dpo", "ipo"]))
def test_preferences(assert_exact, name):
    assert_exact(objective_cases.preference_case(KEY, 3, 5, MODEL, COMPUTE, objective_cases.PREFERENCES[name]))


@pytest.mark.parametrize(("B", "K", "T"), [(1, 2, 1), (3, 5, 4)])
def test_rewards_of_odd_sizes(assert_exact, B, K, T):
    assert_exact(objective_cases.reward_case(KEY, B, K, T, MODEL, COMPUTE))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "preference", "policy"])
def test_mixtures_whose_routers_have_a_loss_too(assert_exact, name):
    assert_exact(_case(name, MIXTURE))


def _case(name, model=MODEL):
    match name:
        case "reward":
            return objective_cases.reward_case(KEY, 2, 3, 4, model, COMPUTE)
        case "preference":
            return objective_cases.preference_case(KEY, 2, 4, model, COMPUTE, objective_cases.PREFERENCES["dpo"])
        case _:
            return objective_cases.policy_case(KEY, 2, 4, model, COMPUTE, objective_cases.EVERYTHING, scale=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["reward", "preference", "policy"])
def test_the_dtypes_of_training(x64, name, dtype):
    rows = gradcheck.check(_case(name), dtype)
    assert [row for row in rows if not row.passed] == []


@functools.cache
def small_cases():
    cases = objective_cases.cases(MODEL, COMPUTE, 2, 4, KEY)
    return {case.name: case for case in cases}


NAMES = [
    *("scalar_head", "scalar_head_of_places", "entropy", "unembedding_of_entropy", "comparisons_of_rankings"),
    *("comparisons_of_sigmoid", "comparisons_of_square", "surrogates_of_reinforce", "surrogates_of_clipping"),
    *("surrogates_of_k1", "surrogates_of_k2", "surrogates_of_k3", "surrogates_of_clipped_values"),
    *("surrogates_of_values", "reward", "preference", "policy"),
]


def test_no_case_is_left_out(x64):
    assert list(small_cases()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(x64, name):
    """(f(x + hu) - f(x - hu)) / 2h = ∇f·u in random directions u of all tensors together, |u| = 1.

    The left side errs by h²/6 times the third derivative, and by the rounding of f over h: with h = 1e-5 both are about
    1e-10 of what is summed. The inputs stay 0.03 and more from the edges of the clips.
    """
    case = small_cases()[name]
    inputs = jax.tree.map(jnp.asarray, case.inputs)
    output = jax.jit(case.forward)(inputs)
    rng = np.random.default_rng(0)
    dy = jnp.asarray(rng.normal(size=output.shape))
    by_hand = jax.jit(case.backward)(inputs, dy)
    leaves, structure = jax.tree.flatten(inputs)
    directions = [rng.normal(size=leaf.shape) for leaf in leaves]
    norm = np.sqrt(sum(np.sum(np.square(direction)) for direction in directions))
    h = 1e-5

    def loss_at(step):
        moved = [leaf + step * u / norm for leaf, u in zip(leaves, directions, strict=True)]
        return float(jnp.sum(jax.jit(case.forward)(structure.unflatten(moved)) * dy))

    difference = (loss_at(h) - loss_at(-h)) / (2 * h)
    gradients = jax.tree.leaves(by_hand)
    predicted = sum(float(np.sum(np.asarray(g) * u)) for g, u in zip(gradients, directions, strict=True)) / norm
    size = np.sqrt(sum(float(np.sum(np.square(g))) for g in gradients))
    assert abs(difference - predicted) < 1e-6 * size


@pytest.mark.parametrize(
    "objective", [*(pytest.param(one, marks=pytest.mark.slow) for one in (reward, preference)), policy]
)
def test_micro_batches_add_up(x64, objective):
    """Scaled by the whole batch, the losses, metrics and gradients of its two halves sum to the batch's."""
    rng = np.random.default_rng(0)
    integers = functools.partial(rng.integers, dtype=np.int32)
    B, T, V = 4, 5, MODEL.vocabulary_size
    if objective is reward:
        batch = reward.Batch(integers(V, size=(B, 3, T)), integers(T, size=(B, 3)), integers(-1, 3, size=(B, 3)))
    elif objective is preference:
        batch = preference.Batch(*integers(V, size=(2, B, 2, T)), rng.normal(size=(B, 2)) - 5)
    else:
        batch = policy.Batch(*integers(V, size=(2, B, T)), *np.abs(rng.normal(size=(6, B, T))))
    batch = jax.tree.map(jnp.asarray, batch)
    module, options = family(MODEL), Objective(kl_coefficient=0.1)
    params = module.init(MODEL, KEY, jnp.float64)
    if objective is reward:
        params = jax.tree.map(jnp.asarray, objective_cases.params_with_scalar(KEY, MODEL, COMPUTE))
    context = Context(MODEL, COMPUTE, objective=options)
    scale = 1 / objective.count(batch)
    run = jax.jit(lambda batch: objective.loss_and_grads(module, params, batch, context, scale=scale))
    halves = [run(jax.tree.map(lambda array, part=part: array[part], batch)) for part in (slice(2), slice(2, None))]
    together = jax.tree.map(jnp.add, *halves)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14),
        together,
        objective.loss_and_grads(module, params, batch, context),
    )
    assert objective.loss(module, params, batch, context) == pytest.approx(float(together[0]), rel=1e-12)


def test_the_first_update_of_ppo_is_reinforce(x64):
    """The gradients are the same at ratio 1: nothing is clipped, and there is no divergence yet."""
    case = objective_cases.policy_case(KEY, 2, 5, MODEL, COMPUTE, Objective())
    rng, module = np.random.default_rng(0), family(MODEL)
    targets = jnp.asarray(rng.integers(5, size=(2, 5), dtype=np.int32))
    logp, _ = objective_cases.logp_and_values(case.inputs, targets, targets, MODEL, COMPUTE, False)
    parts = [jnp.asarray(part) for part in (np.ones((2, 5)), rng.normal(size=(2, 5)), logp, logp, logp, logp)]
    batch = policy.Batch(targets, targets, *parts)
    params = jax.tree.map(jnp.asarray, case.inputs)
    found = {}
    for surrogate in ("reinforce", "clipped"):
        context = Context(MODEL, COMPUTE, objective=Objective(surrogate=surrogate))
        _, metrics, found[surrogate] = policy.loss_and_grads(module, params, batch, context)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), *found.values())
    assert metrics["ratio"] == pytest.approx(1)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_of_update"] == pytest.approx(0, abs=1e-15)


def test_nothing_drawn_is_no_gradient(x64):
    """A batch of nothing but filling: loss and gradients are 0, and no NaN."""
    ignored = jnp.full((2, 5), -1, jnp.int32)
    batch = policy.Batch(jnp.zeros((2, 5), jnp.int32), ignored, *[jnp.zeros((2, 5))] * 6)
    params = family(MODEL).init(MODEL, KEY, jnp.float64)
    value, _, grads = policy.loss_and_grads(family(MODEL), params, batch, Context(MODEL, COMPUTE))
    assert value == 0
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
