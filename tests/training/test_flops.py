"""Operations per token against the products in the traced program, and the devices' peaks by JAX's names for them."""

import dataclasses
import math
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.interpreters import partial_eval

from jaxgpt.models import family, gpt2
from jaxgpt.options.config import Compute, Model
from jaxgpt.training import flops
from tests import whole
from tests.nightly import nightly

GPT2_124M = Model(layers=12, heads=12, width=768, context=1024, vocabulary_size=50_257)
SMALL = Model(layers=3, heads=2, width=12, context=20, vocabulary_size=130)


def test_gpt2_124m_counts_as_llm_c_counts_it():
    """train_gpt2.cu: 6 N + 6 L C T, with N all of the parameters."""
    assert flops.per_token(GPT2_124M, 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024


def test_a_window_bounds_what_llm_cs_count_says_of_a_token():
    """The keys seen are 1, 2, 3, 3, 3 by hand; a token costs nearly the same in long sequences of any length."""
    model = dataclasses.replace(SMALL, **GROUPED, window=3)
    parameters = family(model).parameter_count(model)
    assert flops.per_token(model, 5) == 6 * parameters + round(6 * 3 * 2 * 10 * (2 * 12 / 5 - 1))
    longer = [flops.per_token(model, length) - 6 * parameters for length in (1000, 100_000)]
    assert longer[0] == pytest.approx(longer[1], rel=0.01)
    wide = [flops.per_token(dataclasses.replace(model, window=window), 20) for window in (0, 20, 50)]
    assert wide == [6 * parameters + 6 * 3 * 2 * 10 * 20] * 3


@pytest.mark.parametrize(("lengths"), [(1, 2), (64, 1024)])
def test_only_attention_depends_on_the_length(lengths):
    short, long = lengths
    for count in (flops.per_token, gpt2.flops_per_token):
        assert count(GPT2_124M, long) - count(GPT2_124M, short) == 6 * 12 * 768 * (long - short)


def is_sum(equation: Any) -> bool:
    """Returns whether it is a product with a vector of ones: a sum, written so because a CPU is faster that way."""
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    return equation.invars[1].aval.ndim == len(contracted) + len(batch)


def operations(jaxpr: Any) -> int:
    """Returns the operations of all matrix products in a traced program; a loop's count once for each turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and not is_sum(equation):
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes)
        if equation.primitive.name == "cond":  # as of a form for each platform
            total += max(operations(branch.jaxpr) for branch in equation.params["branches"])
            continue
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                total += turns * operations(inner.jaxpr)
    return total


def traced_per_token(model: Model, compute: Compute, batch: int, length: int) -> float:
    """Returns the operations of the model's forward and backward, without those whose results nobody uses."""
    params = jax.eval_shape(lambda: family(model).init(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), np.int32)
    program = jax.make_jaxpr(lambda *inputs: whole.loss_and_grads(*inputs, model, compute))(params, tokens, tokens)
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return operations(needed) / (batch * length)


GROUPED = {"family": "llama", "kv_heads": 1, "head_width": 10, "feed_forward": 22}
VARIANTS = {
    "gpt2": {},
    "llama": {"family": "llama"},
    "grouped": GROUPED,
    "window": GROUPED | {"window": 6},
    "qwen3": GROUPED | {"query_key_norm": True, "tied": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("recompute", nightly(["none", "norms", "projection", "block"], every_time=["norms"]))
@pytest.mark.parametrize(("length", "block"), [(20, 20), (20, 7), (1, 7)])
def test_the_count_is_that_of_the_program(name, recompute, length, block):
    """The two counts agree to the last operation."""
    model = dataclasses.replace(SMALL, **VARIANTS[name])
    compute = Compute(classifier_chunk=length, attention_block=block, recompute=recompute)
    assert traced_per_token(model, compute, 2, length) == pytest.approx(
        flops.hardware_per_token(model, compute, length), rel=1e-12
    )


def test_with_one_query_a_block_only_the_scores_are_computed_again():
    compute = Compute(attention_block=1, recompute="none")
    again = 20 * SMALL.layers * 2 * SMALL.width * (20 + 1) / 2 / 20
    assert flops.hardware_per_token(SMALL, compute, 20) == pytest.approx(gpt2.flops_per_token(SMALL, 20) + again)


def test_both_counts_of_gpt2_124m_are_near():
    """They differ by the positions, norms and biases, which no product multiplies, and by the padding: under 1%."""
    assert gpt2.flops_per_token(GPT2_124M, 1024) == pytest.approx(flops.per_token(GPT2_124M, 1024), rel=0.01)


# Peaks


def device(kind, platform="gpu"):
    return lambda: [types.SimpleNamespace(device_kind=kind, platform=platform)]


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756.0, 378.0),  # the longest match, not the first one
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA GH200 480GB", 989.4, 494.7),
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0),
        ("NVIDIA A100 80GB PCIe", 312.0, 156.0),
        ("NVIDIA A10", 125.0, 62.5),
        ("NVIDIA A10G", None, None),  # another device than the A10
        ("NVIDIA L40S", 362.0, 183.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9, 43.9),
        ("Tesla V100-SXM2-16GB", None, 15.7),  # no bfloat16 products
        ("TPU v5 lite", 197.0, 197.0),
        ("TPU v5", 459.0, 459.0),
        ("cpu", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_the_peak_is_the_devices_at_the_compute_dtype(monkeypatch, kind, bfloat16, float32):
    monkeypatch.setattr(jax, "devices", device(kind))
    for dtype, peak in (("bfloat16", bfloat16), ("float32", float32)):
        assert flops.peak(Compute(dtype=dtype)) == (None if peak is None else pytest.approx(peak * 1e12))


def test_float32_is_never_faster_than_bfloat16():
    assert all(bfloat16 is None or bfloat16 >= float32 > 0 for bfloat16, float32 in flops.PEAKS.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpus_peak_is_measured_when_asked_for(monkeypatch, dtype):
    compute = dataclasses.replace(Compute(dtype=dtype), measure_peak=True)
    assert 1e6 < flops.measured(dtype, 128, 0.0) < 1e14  # one product, on a machine that may be busy
    monkeypatch.setattr(flops, "measured", lambda dtype: {"float32": 1.0, "bfloat16": 2.0}[dtype])
    assert flops.peak(compute) == {"float32": 1.0, "bfloat16": 2.0}[dtype]


def test_only_a_cpus_is_measured(monkeypatch):
    monkeypatch.setattr(jax, "devices", device("NVIDIA H300"))
    assert flops.peak(dataclasses.replace(Compute(), measure_peak=True)) is None
