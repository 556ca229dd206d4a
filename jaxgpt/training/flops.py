"""Floating-point operations of training, and what devices could do at most."""

import jax

from jaxgpt.config import Compute, Model
from jaxgpt.models import gpt2

# Dense peaks in TFLOP/s as the makers state them: (bfloat16, float32 products as JAX runs them by default: TF32 on
# NVIDIA since Ampere, bfloat16 passes on TPUs). Keys are beginnings of jax.Device.device_kind, the longest match wins.
PEAKS = {
    "NVIDIA B200": (2250.0, 1125.0),
    "NVIDIA H200": (989.4, 494.7),
    "NVIDIA H100 PCIe": (756.0, 378.0),
    "NVIDIA H100": (989.4, 494.7),
    "NVIDIA A100": (312.0, 156.0),
    "NVIDIA A10": (125.0, 62.5),
    "NVIDIA L40S": (362.1, 183.0),
    "NVIDIA L4": (121.0, 60.0),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),
}


def per_token(model: Model, sequence_length: int) -> int:
    """Operations of forward and backward for one token, as llm.c counts: 6N + 6LCT, N being all parameters.

    6N is a multiplication and an addition for each parameter in the forward and twice that in the backward; 6LCT is
    attention's share, with causality halving 12LCT.
    """
    return 6 * gpt2.parameter_count(model) + 6 * model.layers * model.width * sequence_length


def peak(compute: Compute) -> float | None:
    """The device's dense peak in FLOP/s at the compute dtype, None where it isn't known."""
    kind = jax.devices()[0].device_kind
    matches = [name for name in PEAKS if kind.startswith(name)]
    if not matches:
        return None
    bfloat16, float32 = PEAKS[max(matches, key=len)]
    return 1e12 * (bfloat16 if compute.dtype == "bfloat16" else float32)
