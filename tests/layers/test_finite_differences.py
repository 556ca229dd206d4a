"""Finite differences of forward alone, against both `jax.grad` and the hand-written gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import cases as proof_cases
from jaxgpt.proof import objective_cases

MODEL = Model(layers=2, heads=2, width=4, context=4, vocabulary_size=5)
COMPUTE = Compute(attention_block=2, classifier_chunk=4)
NAMES = [
    *("embedding", "linear", "layernorm", "gelu", "attention", "residual", "cross_entropy", "unembedding"),
    *("rmsnorm", "rotary", "soft_cap", "swiglu", "router", "moe", "gpt2"),
    *("embedding_of_documents", "attention_of_documents", "attention_of_groups_in_a_window", "router_of_switch"),
    *("lora", "gpt2_adapters", "dropout", "attention_of_groups_with_dropout", "gpt2_with_dropout", "fp8"),
]
NIGHTLY = (
    "moe",
    "unembedding",
    "attention_of_groups_with_dropout",
    "gpt2_adapters",
    "gpt2_with_dropout",
    "llama",
    "mixtral",
)


@functools.cache
def cases():
    return {case.name: case for case in proof_cases.cases(MODEL, COMPUTE, 2, 3, jax.random.key(0))}


def case_of(family):
    experts = {"experts": 3, "router_z": 0.1} if family == "mixtral" else {}
    model = dataclasses.replace(MODEL, family=family, **experts)
    return objective_cases.model_case(jax.random.key(0), 2, 3, model, COMPUTE)


def test_no_case_is_left_out(x64):
    assert sorted(cases()) == sorted(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in NIGHTLY)) for name in [*NAMES, "llama", "mixtral"]]
)
def test_gradients_predict_the_change_of_the_loss(x64, name):
    """(f(x + hu) - f(x - hu)) / 2h = ∇f·u in a random direction u of each tensor, |u| = |x|, the others held still.

    The left side errs by h²/6 times the third derivative and, from the rounding of f, by some eps |f|/h, |f| being the
    size of the terms that are summed. With h = eps^(1/3) = 6e-6 both are about h²: of |∇f| |u| times what the curvature
    is worth, for which 100 is allowed, and of |f| times the number of roundings, for which 10 is.
    """
    case = cases()[name] if name in NAMES else case_of(name)
    output = jax.jit(case.forward)(case.inputs)
    rng = np.random.default_rng(0)
    dy = jnp.asarray(rng.normal(size=output.shape))

    @jax.jit
    def loss(inputs):
        return jnp.sum(case.forward(inputs) * dy)

    by_autodiff = jax.tree.leaves(jax.jit(jax.grad(loss))(case.inputs))
    by_hand = jax.tree.leaves(jax.jit(case.backward)(case.inputs, dy))
    leaves, structure = jax.tree.flatten(case.inputs)
    leaves = [np.asarray(leaf) for leaf in leaves]
    h = np.finfo(np.float64).eps ** (1 / 3)

    def loss_at(index, moved):
        return float(loss(structure.unflatten([*leaves[:index], moved, *leaves[index + 1 :]])))

    for i, x in enumerate(leaves):
        u = rng.normal(size=x.shape)
        u *= np.linalg.norm(x) / np.linalg.norm(u)
        difference = (loss_at(i, x + h * u) - loss_at(i, x - h * u)) / (2 * h)
        for gradient in (np.asarray(by_autodiff[i]), np.asarray(by_hand[i])):
            largest = np.linalg.norm(gradient) * np.linalg.norm(u)
            error = 100 * h**2 * largest + 10 * h**2 * np.abs(output * dy).sum()
            assert error < 1e-4 * largest  # far below what a wrong term would bring
            assert abs(difference - (gradient * u).sum()) < error
