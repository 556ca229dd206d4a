"""The proof notices wrong gradients of objectives. Mutants are as in test_mutations.py, made in another way.

A term's function returns its value and its derivative together, and both change alike where what they share is dropped.
So each mutant's gradient is compared with the autodiff of the forward as it is, and its loss with the loss as it is.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.objectives import comparisons, policy, preference, reward, surrogates
from jaxgpt.options.config import Compute, Model, Objective
from jaxgpt.proof import gradcheck, objective_cases
from tests.proof.test_mutations import compiled, definition, layer, mutants

MODEL = Model(layers=1, heads=2, width=4, context=4, vocabulary_size=5)
COMPUTE = Compute(attention_block=2)
TERMS = [
    *((comparisons, name) for name in ("ranking_loss", "sigmoid_loss", "square_loss")),
    *((surrogates, name) for name in ("reinforce", "clipped", "divergence", "value_loss", "is_clipped")),
]
OBJECTIVES = [
    (reward, "loss_and_grads"),
    (preference, "margins"),
    (preference, "loss_and_grads"),
    (policy, "_chunk_loss"),
    (policy, "_of_values"),
    (policy, "loss_and_grads"),
]
UNSEEN = "returned metrics = 0"  # neither a gradient nor a loss


@functools.cache
def cases() -> dict[str, gradcheck.Case]:
    key = jax.random.key(0)
    preferences = {
        f"preference_of_{name}": objective_cases.preference_case(key, 3, 4, MODEL, COMPUTE, options)
        for name, options in objective_cases.PREFERENCES.items()
    }
    found = {
        "reward": objective_cases.reward_case(key, 2, 3, 4, MODEL, COMPUTE),
        "policy": objective_cases.policy_case(key, 2, 4, MODEL, COMPUTE, objective_cases.EVERYTHING, scale=0.3),
        "policy_of_reinforce": objective_cases.policy_case(
            key, 2, 4, MODEL, COMPUTE, Objective(surrogate="reinforce"), scale=0.3
        ),
        **preferences,
    }
    return found | {case.name: case for case in objective_cases.term_cases(key, 3, 8)}


@functools.cache
def expected(name: str) -> tuple[Any, Any, Any]:
    """The gradient by the output that is taken, the output, and the gradient by the inputs by autodiff."""
    case = cases()[name]
    inputs = jax.tree.map(jnp.asarray, case.inputs)
    output = case.forward(inputs)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(output.shape))
    return dy, output, jax.grad(lambda inputs: jnp.sum(case.forward(inputs) * dy))(inputs)


def noticed(module: Any, name: str, mutant: Any, monkeypatch: Any) -> bool:
    """Returns whether some case of the module sees the mutant, in its gradient or its loss."""
    with jax.disable_jit():
        names = [name for name in cases() if name.startswith(layer(module))]
        before = {name: expected(name) for name in names}
        monkeypatch.setattr(module, name, mutant)
        for case, (dy, output, gradient) in before.items():
            inputs = jax.tree.map(jnp.asarray, cases()[case].inputs)
            pairs = zip(*map(jax.tree.leaves, (cases()[case].backward(inputs, dy), gradient)), strict=True)
            pairs = [*pairs, (cases()[case].forward(inputs), output)]
            if any(not np.linalg.norm(a - b) <= 1e-10 * np.linalg.norm(b) for a, b in pairs):
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), TERMS + OBJECTIVES, ids=lambda part: getattr(part, "__name__", part))
def test_the_source_as_it_is_is_right(x64, monkeypatch, module, name):
    assert not noticed(module, name, compiled(module, definition(module, name)), monkeypatch)


def seen() -> Iterator[Any]:
    for mutant in mutants(TERMS + OBJECTIVES):
        if UNSEEN not in str(mutant.id):
            yield mutant


@pytest.mark.slow
@pytest.mark.parametrize(("module", "mutant"), list(seen()))
def test_mutants_are_noticed(x64, monkeypatch, module, mutant):
    assert noticed(module, mutant.name, compiled(module, mutant), monkeypatch)
