"""Floating-point operations of training per token, and those that devices do in a second at most.

A multiplication and an addition are two operations. There are two counts of what the model needs. llm.c's, by which
`mfu` in metrics.jsonl compares with other programs':

    6 N + 6 L C T                        N: all parameters that a token meets, V rows in a table

and the matrix products alone, exactly, which each family counts itself (`flops_per_token`). `hardware_per_token` adds
the operations of this program beyond those: attention's scores computed again, the part of each block of queries that
the mask hides, and with recompute = "block" each block's forward but its last product.
"""

import re
import time

import jax
import jax.numpy as jnp

from jaxgpt.layers import attention
from jaxgpt.models import family
from jaxgpt.options.config import Compute, Model


def per_token(model: Model, sequence_length: int) -> int:
    """Returns llm.c's count, 6N + 6LCT.

    6N is a multiplication and an addition for each parameter in the forward and twice that in the backward; 6LCT is
    attention's share, with causality halving 12LCT. For C stands the width of all heads, H D, whatever the number of
    key heads. For T stands 2S - 1 where a query sees S keys on average, which is T without a window.
    """
    parameters = family(model).parameter_count(model, active=True)
    keys = 2 * attention.keys_seen(sequence_length, model.window) - 1
    return 6 * parameters + round(6 * model.layers * model.heads * model.width_per_head * keys)


def hardware_per_token(model: Model, compute: Compute, sequence_length: int) -> float:
    """Returns the family's `flops_per_token` and the operations that the program repeats or does in vain, together.

    Counted for `layers/attention.py`, and for tokens that fill the classifier's chunks; a device-specific kernel skips
    other parts of the square.
    """
    T, window, product = sequence_length, model.window, 2 * model.heads * model.width_per_head
    needed = 8 if compute.recompute == "block" else 6  # attention's products; ∂p, ∂q, ∂k and ∂v are 4 of them
    multiplied = (needed + 1) * attention.keys_multiplied(T, compute.attention_block, window)  # the scores again
    beyond = product * (multiplied - needed * attention.keys_seen(T, window))
    return family(model).flops_per_token(model, T, recompute=compute.recompute) + model.layers * beyond


# Peak FLOP/s of devices: the denominator of the model FLOPs utilisation (MFU). Dense figures in TFLOP/s as the makers
# state them, without the sparsity that doubles most headlines: (bfloat16 summed in float32, float32 products as JAX
# runs them by default). The latter is TF32 on NVIDIA since Ampere, the ordinary units before, and bfloat16 passes on
# TPUs. Sources: NVIDIA's data sheets of the data-centre cards (HGX for B200); its whitepapers of GA102, Ada and RTX
# Blackwell, whose GeForce cards sum in float32 at half the rate of their headline; Google Cloud's page on each TPU. A
# device that isn't here, or that has no bfloat16 products, has no known peak.
PEAKS: dict[str, tuple[float | None, float]] = {
    "Tesla V100-SXM2": (None, 15.7),
    "Tesla V100-PCIE": (None, 14.0),
    "Tesla T4": (None, 8.1),
    "NVIDIA A10": (125.0, 62.5),
    "NVIDIA A30": (165.0, 82.0),
    "NVIDIA A40": (149.7, 74.8),
    "NVIDIA A100": (312.0, 156.0),
    "NVIDIA L4": (121.0, 60.0),
    "NVIDIA L40": (181.0, 90.5),
    "NVIDIA L40S": (362.0, 183.0),
    "NVIDIA H100": (989.4, 494.7),
    "NVIDIA H100 PCIe": (756.0, 378.0),
    "NVIDIA H100 NVL": (835.5, 417.5),
    "NVIDIA H200": (989.4, 494.7),
    "NVIDIA H200 NVL": (835.5, 417.5),
    "NVIDIA GH200": (989.4, 494.7),
    "NVIDIA B200": (2250.0, 1125.0),
    "NVIDIA GB200": (2500.0, 1250.0),
    "NVIDIA RTX A6000": (154.8, 77.4),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 182.1),
    "NVIDIA GeForce RTX 3070": (40.6, 20.3),
    "NVIDIA GeForce RTX 3080": (59.5, 29.8),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "NVIDIA GeForce RTX 4080": (97.5, 48.7),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 5070": (61.7, 30.9),
    "NVIDIA GeForce RTX 5070 Ti": (87.9, 43.9),
    "NVIDIA GeForce RTX 5080": (112.6, 56.3),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
    # A chip of v2, v3 and 7x is two devices to JAX, and each has half of the chip's figure.
    "TPU v2": (22.5, 22.5),
    "TPU v3": (61.5, 61.5),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5e": (197.0, 197.0),
    "TPU v5": (459.0, 459.0),
    "TPU v5p": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),
    "TPU v6e": (918.0, 918.0),
    "TPU7x": (1153.5, 1153.5),
}

# What may follow a name there: the socket and the memory. "Ti", "Laptop GPU" or "D" make it another device.
VARIANT = re.compile(r"(?:[ -](?:SXM\d?|PCIe|PCIE|HBM\w*|\d+GB?))*")

MEASURED_SECONDS = 0.5
MEASURED_WIDTH = 2048


def peak(compute: Compute, devices: int = 1) -> float | None:
    """Returns the dense peak in FLOP/s of so many devices at the compute dtype; None where it isn't known.

    With `compute.measure_peak` a CPU's is what it reaches on one large product, timed here in about a second.
    """
    device = jax.devices()[0]
    if (known := known_peak(device.device_kind, compute.dtype)) is not None:
        return known * devices
    # A CPU's devices are simulated: together they are one CPU. How many processes share it isn't known.
    timed = compute.measure_peak and device.platform == "cpu" and jax.process_count() == 1
    return measured(compute.dtype) if timed else None


def known_peak(kind: str, dtype: str) -> float | None:
    """Returns the dense peak in FLOP/s of a device that JAX names so; None where it isn't known."""
    name = max((name for name in PEAKS if kind.startswith(name)), key=len, default=None)
    if name is None or not VARIANT.fullmatch(kind.removeprefix(name)):
        return None
    bfloat16, float32 = PEAKS[name]
    teraflops = bfloat16 if dtype == "bfloat16" else float32
    return None if teraflops is None else 1e12 * teraflops


def measured(dtype: str, width: int = MEASURED_WIDTH, seconds: float = MEASURED_SECONDS) -> float:
    """Times products of two square matrices, summed in float32 as the layers sum; returns the fastest one's FLOP/s."""
    a = jnp.ones((width, width), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    fastest, started = float("inf"), time.perf_counter()
    while (before := time.perf_counter()) < started + seconds or fastest == float("inf"):
        product(a).block_until_ready()
        fastest = min(fastest, time.perf_counter() - before)
    return 2 * width**3 / fastest
