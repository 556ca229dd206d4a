"""The fused attention in Pallas: interpreted on the CPU beside the blocks', and what is handed to XLA for a GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxgpt.kernels import pallas_attention
from jaxgpt.layers import attention
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import arrange
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import gradcheck
from jaxgpt.proof.inputs import document_starts
from tests import whole
from tests.kernels.triton_calls import H100, calls, deprecated, lowered
from tests.proof import test_mutations as mutation

NAMES = ("out", "logsumexp", "dq", "dk", "dv")
# B, T, H, K, D, documents, window: of one tile of 16 and of several, some of which no query of a tile sees
SHAPES = [
    (1, 1, 1, 1, 1, False, 0),
    (2, 5, 3, 3, 4, False, 0),
    (2, 70, 4, 2, 20, True, 0),
    (1, 70, 3, 1, 8, False, 33),
    (2, 48, 2, 2, 16, True, 17),
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_attention, "TILE_BYTES", 1)


def arrays(shape, dtype):
    """q, k, v, dout, and the documents' starts."""
    B, T, H, K, D, documents, _ = shape
    rng = np.random.default_rng(0)
    made = [jnp.asarray(rng.normal(size=(B, T, heads, D)), dtype) for heads in (H, K, K, H)]
    return made, document_starts(jax.random.key(1), B, T) if documents else None


def run(layer, made, starts, window):
    """Returns one layer's outputs and gradients, in the order of NAMES."""

    def both(q, k, v, dout):
        out, residuals = layer.forward(q, k, v, block=64, starts=starts, window=window)
        return out, residuals.logsumexp, *layer.backward(residuals, dout, block=64, starts=starts, window=window)

    return jax.jit(both)(*made)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_blocks(x64, small_tiles, shape):
    """They agree to float64's last digits. A query that sees only itself has ∂q = 0, but for rounding."""
    made, starts = arrays(shape, jnp.float64)
    for name, ours, exact in zip(
        NAMES, *(run(layer, made, starts, shape[-1]) for layer in (pallas_attention, attention)), strict=True
    ):
        assert ours.dtype == exact.dtype
        np.testing.assert_allclose(ours, exact, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 2.0**-18), (jnp.bfloat16, 2.0**-6)])
def test_rounds_no_more_than_its_dtype(x64, small_tiles, dtype, limit):
    """Relative to the norm; in bfloat16 weights, output and ∂s are rounded on the way, each by 2⁻⁹ at most."""
    made, starts = arrays(SHAPES[2], dtype)
    ours = run(pallas_attention, made, starts, 0)
    exact = run(attention, [array.astype(jnp.float64) for array in made], starts, 0)
    assert [array.dtype for array in ours] == [dtype, jnp.float32, dtype, dtype, dtype]
    for name, a, b in zip(NAMES, ours, exact, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < limit * np.linalg.norm(b), name


def case(shape):
    """The gradient check's case: the blocks' forward, which `jax.grad` differentiates, and the kernels' gradients."""
    made, starts = arrays(shape, jnp.float64)
    options = {"block": 64, "starts": starts, "window": shape[-1]}

    def backward(inputs, dout):
        _, residuals = pallas_attention.forward(*(inputs[name] for name in "qkv"), **options)
        return dict(zip("qkv", pallas_attention.backward(residuals, dout, **options), strict=True))

    inputs = dict(zip("qkv", made, strict=False))
    return gradcheck.Case(
        "pallas_attention",
        inputs,
        lambda inputs: attention.forward(*(inputs[name] for name in "qkv"), **options)[0],
        backward,
    )


def test_gradients_are_autodiffs(assert_exact, small_tiles):
    assert_exact(case((2, 37, 4, 2, 5, True, 9)))


KERNELS = [(pallas_attention, f"_{name}_kernel") for name in ("forward", "backward_queries", "backward_keys")]


# Without it a program only walks over further tiles, of which nothing is seen.
ONLY_FURTHER = {"2 = 0"}


def mutants():
    made = mutation.mutants([*KERNELS, (pallas_attention, "_scores")])
    return [mutant for mutant in made if mutant.id.partition(": ")[2].partition("_")[0] not in ONLY_FURTHER]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "tree"), mutants())
def test_a_dropped_term_is_noticed(x64, monkeypatch, small_tiles, module, tree):
    monkeypatch.setattr(module, tree.name, mutation.compiled(module, tree))
    for shape in ((1, 70, 2, 1, 5, True, 0), (1, 70, 2, 1, 5, False, 20)):
        made, starts = arrays(shape, jnp.float64)
        exact, found = (run(layer, made, starts, shape[-1]) for layer in (attention, pallas_attention))
        if not all(np.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, exact, strict=True)):
            return
    pytest.fail("nothing of what it computes has changed")


MODEL = Model(layers=1, heads=2, width=16, context=24, vocabulary_size=30)


def loss_and_grads(compute, model=MODEL):
    return lambda params, tokens, targets: whole.loss_and_grads(params, tokens, targets, model, compute)


@pytest.mark.parametrize("recompute", ["norms", pytest.param("block", marks=pytest.mark.slow)])
def test_gpt2_of_documents_equals_blocks(recompute):
    model = dataclasses.replace(MODEL, document_start=3)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 30)
    params = gpt2.init(model, jax.random.key(1))
    found = [
        jax.jit(loss_and_grads(Compute(attention=name, recompute=recompute), model))(params, tokens, tokens)
        for name in ("pallas", "blocks")
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


# What is handed to XLA for a GPU. There a kernel's name is in the call.


def both(q, k, v, dout):
    _, residuals = pallas_attention.forward(q, k, v, block=8, window=70)
    return pallas_attention.backward(residuals, dout, block=8, window=70)


def shapes(heads, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct((2, 128, count, 64), dtype) for count in heads]


@deprecated
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_three_kernels_read_the_arrays_as_they_are(dtype):
    """Fewer key heads too: nothing is repeated, transposed or filled up."""
    text = lowered(both, *shapes((4, 2, 2, 4), dtype))
    (forward, *_), (queries, *_), (keys, *_) = found = calls(text)
    assert [forward, queries, keys] == ["forward_kernel", "backward_queries_kernel", "backward_keys_kernel"]
    for _, operands in found:
        assert operands[:3] == ["%arg0", "%arg1", "%arg2"]
    assert not re.search(r"stablehlo\.(transpose|pad|concatenate|convert)", text)


@deprecated
def test_no_square_of_scores():
    model = Model(layers=3, heads=2, width=64, context=137, vocabulary_size=130)
    compute = Compute(attention="pallas", layers="unrolled")
    params = jax.eval_shape(lambda: arrange(gpt2.init(model, jax.random.key(0)), compute))
    tokens = jax.ShapeDtypeStruct((2, 137), jnp.int32)
    text = lowered(loss_and_grads(compute, model), params, tokens, tokens)
    assert len(calls(text)) == 3 * 3
    assert not re.search(r"[<x]1(37|92)x1(37|92)x", text)
    assert re.search(r"[<x]192x", text)  # what tiles of 64 are filled up to is there


@deprecated
def test_under_shard_map_each_device_has_its_own_sequences():
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=H100)
    over = PartitionSpec("data")
    run = jax.shard_map(both, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    assert len(calls(lowered(run, *shapes((2, 2, 2, 2))))) == 3
