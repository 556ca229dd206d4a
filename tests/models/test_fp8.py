"""Whole models whose products have factors of 8 bits."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import models
from jaxgpt.data.loader import Batch
from jaxgpt.layers import fp8 as layer
from jaxgpt.models import blocks, fp8
from jaxgpt.models.blocks import RECOMPUTE_LEVELS, Context
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Compute, Model

GPT2 = Model(layers=2, heads=2, width=8, context=6, vocabulary_size=11)
LLAMA = dataclasses.replace(GPT2, family="llama", kv_heads=1, query_key_norm=True)
QUICK = {("gpt2", "norms", "scanned"), ("llama", "block", "unrolled")}
CASES = [
    pytest.param(model, level, layers, marks=[] if (model.family, level, layers) in QUICK else [pytest.mark.slow])
    for model, level, layers in itertools.product((GPT2, LLAMA), RECOMPUTE_LEVELS, ("scanned", "unrolled"))
]


def gradients(model, compute, params, largest=None):
    """The gradient, and the magnitudes that products of 8 bits saw; without 8 bits None."""
    family, context = models.family(model), Context(model, compute)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary_size, (2, 3, 7), dtype=np.int32)
    batch = Batch(jnp.asarray(tokens[0, :, :6]), jnp.asarray(tokens[1, :, :6]))

    def run(params):
        whole, attached = params, context
        if compute.products == "fp8":
            whole, attached = fp8.attach(params, largest, context)
        return fp8.detach(next_token.loss_and_grads(family, whole, batch, attached)[2])

    return jax.jit(run)(params)


def params_of(model, compute, dtype):
    params = models.family(model).init(model, jax.random.key(0), dtype)
    return blocks.unstacked(params) if compute.layers == "unrolled" else params


@pytest.mark.parametrize(("model", "level", "layers"), CASES)
def test_without_rounding_the_gradient_is_the_plain_one(x64, monkeypatch, model, level, layers):
    """The whole model is compared in float64, with three scales for each of the products."""
    exact = layer.quantise
    monkeypatch.setattr(layer, "quantise", lambda x, form, expected=None: exact(x, None, expected))
    compute = Compute(recompute=level, layers=layers, classifier_chunk=8)
    params = params_of(model, compute, jnp.float64)
    largest = 0.1 + jnp.asarray(np.random.default_rng(0).random((2, 4, 3)))
    expected, nothing = gradients(model, compute, params)
    found, seen = gradients(model, dataclasses.replace(compute, products="fp8"), params, largest)
    assert nothing is None
    assert seen.shape == (2, 4, 3)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_magnitudes_are_those_of_each_layers_products():
    """Magnitudes of the weights are known from the weights; scanned and unrolled layers have the same."""
    compute = Compute(products="fp8", classifier_chunk=8)
    found = []
    for layers in ("scanned", "unrolled"):
        compute = dataclasses.replace(compute, layers=layers)
        params = params_of(GPT2, compute, jnp.float32)
        found.append(gradients(GPT2, compute, params)[1])
    stacked = blocks.stacked(params).blocks
    names = fp8.products(stacked)
    assert names == ["qkv", "attention_out", "mlp_in", "mlp_out"]
    expected = np.stack([np.abs(getattr(stacked, name).weight).max(axis=(1, 2)) for name in names], axis=1)
    np.testing.assert_array_equal(found[0][..., 1], expected)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
