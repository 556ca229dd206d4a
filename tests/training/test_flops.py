"""Operations per token, and the devices' peaks."""

import types

import jax
import pytest

from jaxgpt.config import Compute, Model
from jaxgpt.training import flops

GPT2_124M = Model(layers=12, heads=12, width=768, context=1024, vocabulary_size=50_257)


def test_gpt2_124m_counts_as_llm_c_counts_it():
    """train_gpt2.cu: 6 N + 6 L C T, with N all of the parameters."""
    assert flops.per_token(GPT2_124M, 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024


@pytest.mark.parametrize(("lengths"), [(1, 2), (64, 1024)])
def test_only_attention_depends_on_the_length(lengths):
    short, long = lengths
    assert flops.per_token(GPT2_124M, long) - flops.per_token(GPT2_124M, short) == 6 * 12 * 768 * (long - short)


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756.0, 378.0),  # the longest match, not the first one
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0),
        ("TPU v5 lite", 197.0, 197.0),
        ("TPU v5", 459.0, 459.0),
        ("cpu", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_the_peak_is_the_devices_at_the_compute_dtype(monkeypatch, kind, bfloat16, float32):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    for compute, peak in ((Compute(dtype="bfloat16"), bfloat16), (Compute(dtype="float32"), float32)):
        assert flops.peak(compute) == (None if peak is None else pytest.approx(peak * 1e12))
