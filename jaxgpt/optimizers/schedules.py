"""The learning rate as a function of the step.

    warm-up     peak (step + 1) / warmup_steps                                  for step < warmup_steps
    cosine      final + (peak - final) (1 + cos(π r)) / 2                       r from 0 to 1 after warm-up
    linear      peak + (final - peak) r
    constant    peak
    wsd         peak until 80% of the steps, then final + (peak - final) (1 - √s), s from 0 to 1 over the last 20%

with final = final_fraction · peak (Loshchilov and Hutter 2017, arXiv:1608.03983; wsd: Hu et al. 2024, arXiv:2404.06395,
with the square root of Hägele et al. 2024, arXiv:2405.18392).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.options.config import Optimizer

WSD_FLAT = 0.8


def learning_rate(step: Int[Array, ""], steps: int, options: Optimizer) -> Float[Array, ""]:
    """Returns the rate at `step`, from 0 to `steps` - 1. The step may be traced: a change of phase compiles nothing."""
    peak, final = options.learning_rate, options.final_fraction * options.learning_rate
    warmup = options.warmup_steps
    progress = _progress(step, warmup, steps)
    match options.schedule:
        case "cosine":
            rate = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        case "linear":
            rate = peak + (final - peak) * progress
        case "constant":
            rate = jnp.asarray(peak)
        case "wsd":
            rate = final + (peak - final) * (1 - jnp.sqrt(_progress(step, int(WSD_FLAT * steps), steps)))
    return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), rate).astype(jnp.float32)


def _progress(step: Int[Array, ""], start: int, end: int) -> Float[Array, ""]:
    """Returns 0 up to `start`, 1 at `end`, and is linear between."""
    return jnp.clip((step - start) / max(end - start, 1), 0, 1)
