"""The train step with Muon: each family's matrices, what a step does and doesn't do, and what it takes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.models import blocks, family
from jaxgpt.optimizers import matrices
from jaxgpt.optimizers.matrices import Matrices
from jaxgpt.options.config import Compute, Config, Model, Objective, Optimizer, Training
from jaxgpt.training import memory_plan, step
from jaxgpt.training.state import init_state, layout_of

MODELS = {
    "gpt2": Model(layers=2, heads=2, width=8, context=6, vocabulary_size=11),
    "llama": Model(
        family="llama", layers=2, heads=4, kv_heads=2, width=16, context=6, vocabulary_size=11, feed_forward=20
    ),
    "mixtral": Model(
        family="mixtral", layers=2, heads=2, width=8, context=6, vocabulary_size=11, feed_forward=20, experts=3
    ),
}
# By hand: (M, N) of one layer's matrices.
MATRICES = {
    "gpt2": {"qkv": [(8, 8)] * 3, "attention_out": [(8, 8)], "mlp_in": [(8, 32)], "mlp_out": [(32, 8)]},
    "llama": {
        "qkv": [(16, 16), (16, 8), (16, 8)],
        "attention_out": [(16, 16)],
        "mlp_in": [(16, 20)] * 2,
        "mlp_out": [(20, 16)],
    },
    "mixtral": {"qkv": [(8, 8)] * 3, "attention_out": [(8, 8)], "w_in": [(8, 20)] * 6, "w_out": [(20, 8)] * 3},
}


def config(of: str, layers="scanned", **optimizer) -> Config:
    return Config(
        model=MODELS[of],
        compute=Compute(classifier_chunk=8, layers=layers),
        training=Training(steps=20, stop_after_nonfinite=2, batch_size=4, sequence_length=6),
        optimizer=Optimizer(**{"name": "muon", "learning_rate": 0.05, "warmup_steps": 2} | optimizer),
    )


def batch(seed=0) -> Batch:
    return Batch(*np.random.default_rng(seed).integers(11, size=(2, 1, 4, 6), dtype=np.int32))


@functools.cache
def train_step(name: str):
    return step.make_train_step(config(name))


def new_state(made: Config):
    return jax.jit(lambda: init_state(made))()


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
@pytest.mark.parametrize("name", MODELS)
def test_the_matrices_of_a_family(name, layers):
    """All of the blocks' but a router, each by itself; and none of the tables, norms and biases."""
    made = config(name, layers)
    tree: Any = layout_of(made).matrices
    found: dict[str, list[tuple[int, int]]] = {}
    for path, kind in jax.tree.leaves_with_path(tree):
        assert path[0].name == "blocks"
        field = next(part.name for part in reversed(path) if getattr(part, "name", "weight") != "weight")
        found[field] = kind.each
        assert kind.layers == (2 if layers == "scanned" else 0)
    assert found == MATRICES[name]
    assert len(jax.tree.leaves(tree)) == len(found) * (1 if layers == "scanned" else 2)


def test_a_scalar_head_is_adamws():
    made = dataclasses.replace(config("gpt2"), objective=Objective(name="reward"))
    tree: Any = layout_of(made).matrices
    assert jax.tree.leaves(tree.blocks)
    assert jax.tree.leaves((tree.ends, tree.scalar)) == []


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mixtral"))]
)
def test_loss_falls_on_a_batch_seen_again_and_again(name):
    state, losses = new_state(config(name)), []
    for _ in range(20):
        state, metrics = train_step(name)(state, None, batch())
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(11), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_that_is_not_finite_keeps_the_momentum():
    """After a NaN in one parameter all parameters, momenta and moments keep their bits; the step counter goes on."""
    state, _ = train_step("gpt2")(new_state(config("gpt2")), None, batch())
    broken = state.params.final_norm.scale.at[0].set(jnp.nan)
    params = state.params._replace(final_norm=state.params.final_norm._replace(scale=broken))
    before = jax.tree.map(np.asarray, (params, state.moments))
    state, metrics = train_step("gpt2")(state._replace(params=params), None, batch(1))
    assert not np.isfinite(metrics.loss)
    assert (int(state.step), int(state.nonfinite)) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.moments), before)
    assert np.asarray(state.moments.first.blocks.qkv.weight).any()


def test_what_it_is_given_is_clipped():
    """The gradients that the first moments began with have together the largest norm that is allowed."""
    made = config("gpt2", clip_norm=0.1)
    state, metrics = step.make_train_step(made)(new_state(made), None, batch())
    assert metrics.grad_norm > 0.2
    tree: Any = layout_of(made).matrices
    squares = jax.tree.map(
        lambda moment, kind: float(jnp.sum(jnp.square(moment / (1 - (0.95 if kind else 0.9))))),
        state.moments.first,
        tree,
    )
    assert sum(jax.tree.leaves(squares)) ** 0.5 == pytest.approx(0.1, rel=1e-4)


def test_adamws_state_is_what_it_was():
    """Two moments for every tensor, and no matrices."""
    made = config("gpt2", name="adamw")
    assert layout_of(made).matrices is None
    state = jax.eval_shape(lambda: init_state(made))
    assert jax.tree.structure(state.moments.second) == jax.tree.structure(state.params)


@pytest.mark.parametrize("parameters", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_it_trains_in_bfloat16(parameters):
    made = config("gpt2")
    made = dataclasses.replace(made, compute=dataclasses.replace(made.compute, dtype="bfloat16", parameters=parameters))
    state, train, losses = new_state(made), step.make_train_step(made), []
    for _ in range(20):
        state, metrics = train(state, None, batch())
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.moments)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {parameters}


# What it takes


def numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_plan_has_half_of_the_matrices_moments():
    made = config("llama")
    shapes = jax.eval_shape(lambda: family(made.model).init(made.model, jax.random.key(0)))
    of_muon = sum(kind.rows * kind.numbers for kind in jax.tree.leaves(layout_of(made).matrices))
    assert of_muon == 2 * (16 * 32 + 16 * 16 + 16 * 40 + 20 * 16)
    assert memory_plan.measure(made).moments == 4 * (2 * numbers(shapes) - of_muon)


def test_operations_of_a_step():
    """The count by hand for two layers: five iterations of 4 M² N + 2 M³."""

    def iterations(M, N):
        return 5 * (4 * M * M * N + 2 * M**3)

    made = config("gpt2")
    layer = 4 * iterations(8, 8) + 2 * iterations(8, 32)
    tree: Any = layout_of(made).matrices
    assert matrices.operations(tree) == 2 * layer
    assert matrices.operations(tree, 8) == layer  # two layers on eight devices: one, or zeros
    assert matrices.operations(None) == 0


def test_stacks_and_tensors_apart_are_the_same_matrices():
    shapes = layout_of(config("gpt2")).shapes
    columns = family(MODELS["gpt2"]).columns(MODELS["gpt2"])
    assert blocks.as_matrices(shapes, columns).blocks.qkv.weight == Matrices(2, (8, 24), (8, 8, 8))
    apart = jax.eval_shape(blocks.unstacked, shapes)
    assert blocks.as_matrices(apart, columns).blocks[1].mlp_out.weight == Matrices(0, (32, 8), (8,))
