"""The devices' peaks, by the names that JAX calls them."""

import dataclasses
import types

import jax
import pytest

from jaxgpt.options.config import Compute
from jaxgpt.training import peaks


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
        assert peaks.peak(Compute(dtype=dtype)) == (None if peak is None else pytest.approx(peak * 1e12))


def test_float32_is_never_faster_than_bfloat16():
    assert all(bfloat16 is None or bfloat16 >= float32 > 0 for bfloat16, float32 in peaks.PEAKS.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpus_peak_is_measured_when_asked_for(monkeypatch, dtype):
    compute = dataclasses.replace(Compute(dtype=dtype), measure_peak=True)
    assert 1e6 < peaks.measured(dtype, 128, 0.0) < 1e14  # one product, on a machine that may be busy
    monkeypatch.setattr(peaks, "measured", lambda dtype: {"float32": 1.0, "bfloat16": 2.0}[dtype])
    assert peaks.peak(compute) == {"float32": 1.0, "bfloat16": 2.0}[dtype]


def test_only_a_cpus_is_measured(monkeypatch):
    monkeypatch.setattr(jax, "devices", device("NVIDIA H300"))
    assert peaks.peak(dataclasses.replace(Compute(), measure_peak=True)) is None
