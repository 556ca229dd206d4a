"""cuDNN's attention: what is handed to XLA for an NVIDIA GPU; with a reference in its place, that every argument goes
where it belongs; and, where there is such a GPU, its numbers."""

import collections
import functools
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec

from jaxgpt.kernels import cudnn_attention
from jaxgpt.layers import attention
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import arrange
from jaxgpt.options.config import Compute, Model
from tests import whole

SCRIPT = Path(__file__).with_name("compare_kernels.py")
specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
assert specification is not None
assert specification.loader is not None
compare = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compare)

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
B, T, H, D = 2, 40, 3, 16  # no other size of the model is T, so that T×T can be looked for
SQUARE = rf"[<x]{T}x{T}x"  # in an array's type
ARRAY = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)
MODEL = Model(layers=3, heads=H, width=H * D, context=T, vocabulary_size=130)


# What is handed to XLA


def lowered(function, *shapes):
    """The program for a CUDA GPU, as StableHLO text; none need be there."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text):
    """(target, operands, cudnn's configuration, the call's types) of each in the text."""
    pattern = r'custom_call @(\S+?)\((.*?)\) \{.*?backend_config = "(.*?)".*?\} : (.*)'
    for target, operands, configuration, types in re.findall(pattern, text):
        settings = json.loads(configuration.replace(r"\22", '"'))["cudnn_fmha_backend_config"]
        yield target, operands.split(", "), settings, types


def executed(text):
    """Returns how often the program runs each custom call's target; a loop's body counts once."""
    bodies = {part.partition("@")[2].partition("(")[0]: part for part in text.split("func.func ")[1:]}

    @functools.cache
    def count(name):
        total = collections.Counter(re.findall(r"custom_call @(__cudnn\S+?)\(", bodies[name]))
        for callee in re.findall(r"\bcall @(\w+)", bodies[name]):
            total += count(callee)
        return total

    return dict(count("main"))


def check_settings(settings):
    assert settings["fmha_scale"] == D**-0.5
    assert settings["mask_type"] == "CAUSAL"
    assert settings["dropout_rate"] == 0
    assert settings["sliding_window_length"] == 0
    assert settings["is_flash_attention"] is True
    assert settings["intermediate_tensor_shape"]["dimensions"] == [str(n) for n in (B, H, T, T)]
    assert settings["intermediate_tensor_shape"]["element_type"] == "BF16"


def test_forward_is_one_call_on_the_arrays_as_they_are():
    text = lowered(lambda q, k, v: cudnn_attention.forward(q, k, v, block=8), ARRAY, ARRAY, ARRAY)
    ((target, operands, settings, types),) = custom_calls(text)
    assert (target, operands) == (FORWARD, ["%arg0", "%arg1", "%arg2"])
    check_settings(settings)
    # batch and head are the batch dimensions of BTHD, its width is contracted
    assert settings["bmm1_dot_dimension_numbers"] == {
        "lhs_contracting_dimensions": ["3"],
        "rhs_contracting_dimensions": ["3"],
        "lhs_batch_dimensions": ["0", "2"],
        "rhs_batch_dimensions": ["0", "2"],
    }
    assert f"tensor<{B}x{H}x{T}xf32>" in types.partition("->")[2]  # the logsumexp, not rounded


def test_groups_and_a_window_are_the_kernels():
    """Fewer key heads go in, and their gradients come out, as they are: nothing is repeated."""
    few = jax.ShapeDtypeStruct((B, T, 1, D), jnp.bfloat16)

    def run(q, k, v, dout):
        _, residuals = cudnn_attention.forward(q, k, v, block=8, window=6)
        return cudnn_attention.backward(residuals, dout, block=8, window=6)

    assert [leaf.shape[2] for leaf in jax.eval_shape(run, ARRAY, few, few, ARRAY)] == [H, 1, 1]
    calls = list(custom_calls(lowered(run, ARRAY, few, few, ARRAY)))
    assert [target for target, *_ in calls] == [FORWARD, BACKWARD]
    for _, operands, settings, _ in calls:
        assert operands[:3] == ["%arg0", "%arg1", "%arg2"]
        assert settings["sliding_window_length"] == 6
        assert settings["mask_type"] == "CAUSAL"


def test_backward_is_one_call_with_its_operands_in_cudnns_order():
    """q, k, v, logsumexp, dout, out; the residuals come as q, k, v, out, logsumexp."""
    residuals = cudnn_attention.Residuals(ARRAY, ARRAY, ARRAY, ARRAY, jax.ShapeDtypeStruct((B, H, T), jnp.float32))
    text = lowered(lambda residuals, dout: cudnn_attention.backward(residuals, dout, block=8), residuals, ARRAY)
    ((target, operands, settings, _),) = custom_calls(text)
    assert target == BACKWARD
    assert operands == [f"%arg{number}" for number in (0, 1, 2, 4, 5, 3)]
    check_settings(settings)


@pytest.mark.parametrize(
    ("layers", "recompute", "expected"),
    [
        ("scanned", "norms", {FORWARD: 1, BACKWARD: 1}),
        ("scanned", "block", {FORWARD: 2, BACKWARD: 1}),
        ("unrolled", "none", {FORWARD: 3, BACKWARD: 3}),
        ("unrolled", "block", {FORWARD: 6, BACKWARD: 3}),
    ],
)
def test_gpt2_has_a_call_for_each_layer_and_no_square(layers, recompute, expected):
    compute = Compute(dtype="bfloat16", attention="cudnn", layers=layers, recompute=recompute)
    text = lowered(loss_and_grads(compute), params("bfloat16", compute), tokens(), tokens())
    assert executed(text) == expected
    assert not re.search(SQUARE, text)


def test_blocks_of_all_queries_would_have_the_square():
    """This shows that the search above finds what it looks for."""
    compute = Compute(dtype="bfloat16", attention="blocks", attention_block=T)
    text = lowered(loss_and_grads(compute), params("bfloat16"), tokens(), tokens())
    assert executed(text) == {}
    assert re.search(SQUARE, text)


def test_under_shard_map_each_device_calls_it_on_its_own_sequences():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def run(q, k, v, dout):
        _, residuals = cudnn_attention.forward(q, k, v, block=8)
        return cudnn_attention.backward(residuals, dout, block=8)

    over = PartitionSpec("data")
    text = lowered(jax.shard_map(run, mesh=mesh, in_specs=over, out_specs=over), *[ARRAY] * 4)
    assert [target for target, *_ in custom_calls(text)] == [FORWARD, BACKWARD]


def loss_and_grads(compute):
    return lambda params, tokens, targets: whole.loss_and_grads(params, tokens, targets, MODEL, compute)


def params(dtype, compute=Compute(layers="scanned")):  # noqa: B008  (immutable)
    return jax.eval_shape(lambda: arrange(gpt2.init(MODEL, jax.random.key(0), dtype), compute))


def tokens():
    return jax.ShapeDtypeStruct((B, T), jnp.int32)


# Where the arguments go: a reference in the place of cuDNN's kernels


def causal_scores(query, key, scale):
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key)
    return jnp.where(jnp.tri(query.shape[1], dtype=bool), scores, -jnp.inf)


def reference_forward(query, key, value, scale):
    scores = causal_scores(query, key, scale)
    logsumexp = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(scores - logsumexp[..., None]), value), logsumexp


def reference_backward(query, key, value, activation, fwd_output, grad_output, scale):
    """Computes the gradients from the kernel's own inputs; only the scores are computed again."""
    weights = jnp.exp(causal_scores(query, key, scale) - activation[..., None])
    delta = jnp.einsum("bqhd,bqhd->bhq", fwd_output, grad_output)
    dscores = weights * (jnp.einsum("bqhd,bkhd->bhqk", grad_output, value) - delta[..., None])
    return (
        scale * jnp.einsum("bhqk,bkhd->bqhd", dscores, key),
        scale * jnp.einsum("bhqk,bqhd->bkhd", dscores, query),
        jnp.einsum("bhqk,bqhd->bkhd", weights, grad_output),
    )


def under_jaxs_names(signature_of, reference):
    """The reference as the lowering of a primitive of JAX's, each argument found by the name that JAX gives it."""

    def call(*arguments, **parameters):
        given = inspect.signature(signature_of).bind(*arguments, **parameters).arguments
        assert given["mask_type"] is cudnn.MaskType.CAUSAL
        assert given["layout"] == cudnn.AttentionLayout.BTNH.value
        assert given["dropout_rate"] == 0
        assert given["variadic_args"] == (False, False)
        assert given["sliding_window_length"] is None
        names = inspect.signature(reference).parameters
        wide = {name: jnp.asarray(given[name], jnp.float32) for name in names if name != "scale"}
        results = reference(**wide, scale=given["scale"])
        return [result.astype(given["query"].dtype if result.ndim == 4 else jnp.float32) for result in results]

    return mlir.lower_fun(call, multiple_results=True)


@pytest.fixture(scope="module")
def reference():
    """cuDNN's primitives run on the CPU, by the reference."""
    for primitive, signature_of, function in (
        (cudnn._dot_product_attention_fwd_p, cudnn._dot_product_attention_fwd_abstract, reference_forward),
        (cudnn._dot_product_attention_bwd_p, cudnn._dot_product_attention_bwd_abstract, reference_backward),
    ):
        mlir.register_lowering(primitive, under_jaxs_names(signature_of, function), platform="cpu")


def test_layer_equals_blocks(reference):
    """The reference takes float32: output, logsumexp and gradients are compared."""
    for name, (error, _) in compare.layer_errors((2, 7, 3, 4), jnp.float32).items():
        assert error < 1e-6, name


def test_layer_in_bfloat16_is_within_the_limit_for_the_gpu(reference):
    errors = compare.layer_errors((2, 37, 2, 16), jnp.bfloat16)
    assert all(max(pair) < compare.LIMIT for pair in errors.values()), errors


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gpt2_equals_blocks(reference, recompute):
    errors = compare.model_errors(Compute(recompute=recompute))
    assert all(error < 1e-5 for error in errors.values()), errors


def test_gradients_have_the_dtype_of_dout(reference):
    shape = (1, 4, 2, 8)
    _, residuals = cudnn_attention.forward(*[jnp.ones(shape, jnp.bfloat16)] * 3, block=2)
    gradients = cudnn_attention.backward(residuals, jnp.ones(shape, jnp.float32), block=2)
    assert [gradient.dtype for gradient in gradients] == [jnp.float32] * 3


@pytest.mark.parametrize("layer", [attention, cudnn_attention])
def test_output_is_forwards(reference, layer):
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5, 3, 4)), jnp.float32)
    out, residuals = layer.forward(q, k, v, block=2)
    np.testing.assert_array_equal(layer.output(residuals), out)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", compare.FLOAT32_LIMIT), ("bfloat16", compare.LIMIT)])
def test_norms_and_softmax_in_pallas_are_within_the_limit_for_the_gpu(dtype, limit):
    errors = {**compare.norm_errors((37, 96), dtype), **compare.softmax_errors((37, 96), dtype)}
    assert len(errors) == 4 + 3 + 2
    assert all(error < limit for error in errors.values()), errors


# On a GPU


@pytest.mark.skipif(
    shutil.which("nvidia-smi") is None
    or not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs an NVIDIA GPU, and jax[cuda12] or jax[cuda13]",
)
def test_on_a_gpu_equals_blocks():
    """The GPU is used by a process of its own: the tests' is on the CPU."""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    environment |= {"PYTHONPATH": str(root), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
