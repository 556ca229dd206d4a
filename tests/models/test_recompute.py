"""Recomputing, writing layers out and the sizes of chunks and blocks change memory and time, and not the gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models import blocks, gpt2
from jaxgpt.options.config import Compute, Model
from tests import whole

MODEL = Model(layers=3, heads=2, width=16, context=24, vocabulary_size=150)
KEEP_ALL = Compute(recompute="none", classifier_chunk=48, attention_block=24)


def gradients(compute: Compute) -> gpt2.Params:
    params = jax.jit(lambda: gpt2.init(MODEL, jax.random.key(0)))()
    if compute.layers == "unrolled":
        params = blocks.unstacked(params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 150, (2, 24)), jnp.int32)
    _, grads = jax.jit(lambda params: whole.loss_and_grads(params, tokens, jnp.roll(tokens, -1, 1), MODEL, compute))(
        params
    )
    return blocks.stacked(grads)


@pytest.fixture(scope="module")
def kept() -> gpt2.Params:
    return gradients(KEEP_ALL)


@pytest.mark.parametrize("recompute", ["gelu", "norms", "projection", "block"])
def test_recomputed_gradients_are_the_kept_ones(kept, recompute):
    """The rounding of a few operations may differ: the compiler may fuse, and so round, a recomputed value
    differently."""
    again = gradients(dataclasses.replace(KEEP_ALL, recompute=recompute))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(kept), strict=True):
        assert np.linalg.norm(a - b) <= 8 * np.finfo(np.float32).eps * np.linalg.norm(b)


@pytest.mark.slow
def test_each_level_needs_less_memory():
    """The compiled program's own temporaries, at a size where the residuals outweigh the rest."""
    model = dataclasses.replace(MODEL, layers=8, width=64, context=256)

    def temporaries(recompute: str) -> int:
        compute = dataclasses.replace(KEEP_ALL, recompute=recompute)
        params = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
        program = jax.jit(lambda *inputs: whole.loss_and_grads(*inputs, model, compute)).lower(params, tokens, tokens)
        memory = program.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    none, gelu, norms, block = (temporaries(level) for level in ("none", "gelu", "norms", "block"))
    token_bytes = 4 * 8 * 256 * model.width  # one (B, T, C) array
    assert none - gelu >= 0.9 * 4 * model.layers * token_bytes  # GELU's output is 4C wide
    assert gelu - norms >= 0.9 * 2 * model.layers * token_bytes
    assert norms - block >= 0.5 * 9 * model.layers * token_bytes  # all but the input, and one block's residuals instead


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "norms", "block"])
def test_unrolling_changes_nothing(kept, recompute):
    unrolled = gradients(dataclasses.replace(KEEP_ALL, layers="unrolled", recompute=recompute))
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(kept), strict=True):
        assert np.linalg.norm(a - b) <= 8 * np.finfo(np.float32).eps * np.linalg.norm(b)


def test_parameters_are_stacked_and_taken_apart_without_loss():
    params = jax.jit(lambda: gpt2.init(MODEL, jax.random.key(0)))()
    apart = blocks.unstacked(params)
    assert [block.qkv.weight.shape for block in tuple(apart.blocks)] == 3 * [(16, 48)]  # type: ignore[union-attr]
    jax.tree.map(np.testing.assert_array_equal, blocks.stacked(apart), params)
    jax.tree.map(np.testing.assert_array_equal, blocks.unstacked(apart), apart)
