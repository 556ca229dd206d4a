"""The fused norms in Pallas: interpreted on the CPU beside the layers', and what is handed to XLA for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxgpt import models
from jaxgpt.kernels import pallas_norm
from jaxgpt.layers import layernorm, rmsnorm
from jaxgpt.models.blocks import RECOMPUTE_LEVELS
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import gradcheck
from tests import whole
from tests.kernels.triton_calls import H100, calls, deprecated, lowered
from tests.proof import test_mutations as mutation

LAYERS = pytest.mark.parametrize("layer", [layernorm, rmsnorm], ids=lambda layer: layer.__name__.rpartition(".")[2])
SHAPES = [(1, 1), (5, 3), (37, 20), (70, 768), (3, 5000)]  # N, C: of no power of 2, of one row of a tile and of several


@pytest.fixture
def few_programs(monkeypatch):
    """Backward's programs, so few that each takes several tiles."""
    monkeypatch.setattr(pallas_norm, "PROGRAMS", 3)
    monkeypatch.setattr(pallas_norm, "TILE", 256)


def arrays(layer, shape, dtype=jnp.float64):
    """The layer's parameters, x, ∂y and the gradient that goes past."""
    rng = np.random.default_rng(0)
    params = layer.Params(*(jnp.asarray(rng.normal(size=shape[1]), dtype) for _ in layer.Params._fields))
    return params, *(jnp.asarray(2 + 3 * rng.normal(size=shape), dtype) for _ in range(3))


def by_layer(layer, params, x, dy, past):
    """Output, residuals, the parameters' gradients, and the sum of the gradients by x."""
    y, residuals = layer.forward(params, x, epsilon=1e-3)
    grads, dx = layer.backward(params, residuals, dy)
    return y, residuals, grads, dx + past


def by_kernels(params, x, dy, past):
    y, residuals = pallas_norm.forward(params, x, epsilon=1e-3)
    return y, residuals, *pallas_norm.backward(params, residuals, dy, past)


@LAYERS
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_layer(x64, few_programs, layer, shape):
    """In float64, to its last digits, and of the same types."""
    made = arrays(layer, shape)
    found, exact = by_kernels(*made), by_layer(layer, *made)
    assert jax.tree.structure(found) == jax.tree.structure(exact)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


@LAYERS
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 2.0**-20), (jnp.bfloat16, 2.0**-8)])
def test_rounds_no_more_than_its_dtype(x64, layer, dtype, limit):
    """Relative to the norm: output and gradient by x are rounded once, to nearest, all else is of 24 bits."""
    made = arrays(layer, (70, 96), dtype)
    found = by_kernels(*made)
    exact = by_layer(layer, *jax.tree.map(lambda array: array.astype(jnp.float64), made))
    y, residuals, grads, dx = found
    assert [array.dtype for array in (y, residuals.rstd, grads.scale, dx)] == [dtype, jnp.float32, jnp.float32, dtype]
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - expected) <= limit * np.linalg.norm(expected)


@LAYERS
def test_gradients_are_autodiffs(assert_exact, few_programs, layer):
    """The layer's forward, which `jax.grad` differentiates, and the kernel's gradients, without one that goes past."""
    params, x, *_ = arrays(layer, (21, 10))

    def backward(inputs, dy):
        _, residuals = pallas_norm.forward(inputs["params"], inputs["x"], epsilon=1e-5)
        grads, dx = pallas_norm.backward(inputs["params"], residuals, dy)
        return {"params": grads, "x": dx}

    def forward(inputs):
        return layer.forward(inputs["params"], inputs["x"])[0]

    assert_exact(gradcheck.Case("pallas_norm", {"params": params, "x": x}, forward, backward))


KERNELS = [(pallas_norm, f"_{name}_kernel") for name in ("forward", "backward")]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "tree"), list(mutation.mutants(KERNELS)))
def test_a_dropped_term_is_noticed(x64, few_programs, monkeypatch, module, tree):
    monkeypatch.setattr(module, tree.name, mutation.compiled(module, tree))
    for layer in (layernorm, rmsnorm):
        made = arrays(layer, (70, 20))
        found, exact = by_kernels(*made), by_layer(layer, *made)
        if not all(
            np.allclose(a, b, rtol=1e-10, atol=1e-12)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        ):
            return
    pytest.fail("nothing of what it computes has changed")


FAMILIES = {
    "gpt2": Model(layers=2, heads=2, width=16, context=12, vocabulary_size=30),
    "llama": Model(family="llama", layers=2, heads=2, width=16, context=12, vocabulary_size=30, logit_soft_cap=5.0),
    "mixtral": Model(family="mixtral", layers=1, heads=2, width=16, context=12, vocabulary_size=30, experts=3),
}
EVERY_NIGHT = [("llama", "none"), ("mixtral", "norms"), *(("gpt2", level) for level in RECOMPUTE_LEVELS[1:])]


@pytest.mark.parametrize(
    ("name", "recompute"), [("gpt2", "none"), *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_NIGHT)]
)
def test_a_model_by_kernels_has_the_same_gradients(x64, name, recompute):
    """With the classifier's softmax, several chunks and ignored targets."""
    model = FAMILIES[name]
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 30)
    targets = tokens.at[0, 3].set(-1)
    params = models.family(model).init(model, jax.random.key(1), jnp.float64)
    found, exact = (
        whole.loss_and_grads(
            params, tokens, targets, model, Compute(kernels=kernels, recompute=recompute, classifier_chunk=7)
        )
        for kernels in ("pallas", "xla")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


# What is handed to XLA for a GPU


def both(layer, params, x, dy, past):
    _, residuals = pallas_norm.forward(params, x, epsilon=1e-5)
    return pallas_norm.backward(params, residuals, dy, past)


def shapes(layer, shape, dtype=jnp.bfloat16):
    small = jax.ShapeDtypeStruct((shape[1],), jnp.float32)
    return layer.Params(*[small] * len(layer.Params._fields)), *[jax.ShapeDtypeStruct(shape, dtype)] * 3


@deprecated
@LAYERS
def test_two_kernels_read_the_arrays_as_they_are(layer):
    """Nothing of the tokens' size is copied, converted or filled up."""
    text = lowered(functools.partial(both, layer), *shapes(layer, (4096, 768)))
    (forward, of_forward), (backward, of_backward) = calls(text)
    assert (forward, backward) == ("forward_kernel", "backward_kernel")
    x, dy, past = (f"%arg{number}" for number in range(len(layer.Params._fields), len(layer.Params._fields) + 3))
    assert of_forward[0] == of_backward[0] == x
    assert of_backward[-2:] == [dy, past]
    others = [line for line in text.splitlines() if "4096x768" in line and "custom_call" not in line]
    assert re.findall(r"stablehlo\.(?!return)\w+", "\n".join(others)) == []


@deprecated
def test_under_shard_map_each_device_has_its_own_tokens():
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=H100)
    specs = (PartitionSpec(), *[PartitionSpec("data")] * 3)
    run = jax.shard_map(
        functools.partial(both, layernorm),
        mesh=mesh,
        in_specs=specs,
        out_specs=(PartitionSpec(), PartitionSpec("data")),
        check_vma=False,
    )
    assert len(calls(lowered(run, *shapes(layernorm, (64, 32))))) == 2
